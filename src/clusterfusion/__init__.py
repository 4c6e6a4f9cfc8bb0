"""ClusterFusion++: fast decoding of GPT-NeoX/Pythia and LLaMA models, one stream of tokens on one NVIDIA GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public names and where they live. They are imported at first use, so that `import clusterfusion` and the command line's
# help do not wait for PyTorch.
_PUBLIC = {
    "load": "clusterfusion.engine",
    "Engine": "clusterfusion.engine",
    "Generation": "clusterfusion.engine",
    "SamplingOptions": "clusterfusion.engine",
    "Session": "clusterfusion.engine",
    "TextStream": "clusterfusion.engine",
    "DecoderConfig": "clusterfusion.architecture",
    "RotaryConfig": "clusterfusion.architecture",
    "LayerWeights": "clusterfusion.weights",
    "NAMED_SHAPES": "clusterfusion.named_shapes",
    "named_shape": "clusterfusion.named_shapes",
    "decoder_layer": "clusterfusion.ops",
    "gpt_neox_layer": "clusterfusion.weights",
    "layer_norm": "clusterfusion.ops",
    "rms_norm": "clusterfusion.ops",
    "ClusterFusionError": "clusterfusion.errors",
    "ArgumentError": "clusterfusion.errors",
    "CheckpointError": "clusterfusion.errors",
    "CompileError": "clusterfusion.errors",
    "ContextLengthError": "clusterfusion.errors",
    "DeviceError": "clusterfusion.errors",
    "UnsupportedModelError": "clusterfusion.errors",
}

__all__ = sorted(["__version__", *_PUBLIC])

if TYPE_CHECKING:
    from clusterfusion.architecture import DecoderConfig, RotaryConfig
    from clusterfusion.engine import Engine, Generation, SamplingOptions, Session, TextStream, load
    from clusterfusion.errors import (
        ArgumentError,
        CheckpointError,
        ClusterFusionError,
        CompileError,
        ContextLengthError,
        DeviceError,
        UnsupportedModelError,
    )
    from clusterfusion.named_shapes import NAMED_SHAPES, named_shape
    from clusterfusion.ops import decoder_layer, layer_norm, rms_norm
    from clusterfusion.weights import LayerWeights, gpt_neox_layer


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'clusterfusion' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
