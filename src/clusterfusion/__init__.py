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
    "llama_layer": "clusterfusion.weights",
    "layer_norm": "clusterfusion.ops",
    "rms_norm": "clusterfusion.ops",
    "pythia_2b8_decoder_layer": "clusterfusion.seed_api",
    "pythia_2b8_decoder_layer_split": "clusterfusion.seed_api",
    "pythia_2b8_attention_only": "clusterfusion.seed_api",
    "pythia_2b8_mlp_only": "clusterfusion.seed_api",
    "pythia_2b8_create_graph_context": "clusterfusion.seed_api",
    "pythia_2b8_graph_decode_step": "clusterfusion.seed_api",
    "pythia_2b8_destroy_graph_context": "clusterfusion.seed_api",
    "pythia_6b9_decoder_layer": "clusterfusion.seed_api",
    "pythia_6b9_decoder_layer_split": "clusterfusion.seed_api",
    "pythia_6b9_attention_only": "clusterfusion.seed_api",
    "pythia_6b9_mlp_only": "clusterfusion.seed_api",
    "pythia_6b9_create_graph_context": "clusterfusion.seed_api",
    "pythia_6b9_graph_decode_step": "clusterfusion.seed_api",
    "pythia_6b9_destroy_graph_context": "clusterfusion.seed_api",
    "llama_decoder_layer": "clusterfusion.seed_api",
    "llama_decoder_layer_batch_decode_sglang": "clusterfusion.seed_api",
    "llama_decoder_layer_sglang": "clusterfusion.seed_api",
    "rmsnorm": "clusterfusion.seed_api",
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
    from clusterfusion.seed_api import (
        llama_decoder_layer,
        llama_decoder_layer_batch_decode_sglang,
        llama_decoder_layer_sglang,
        pythia_2b8_attention_only,
        pythia_2b8_create_graph_context,
        pythia_2b8_decoder_layer,
        pythia_2b8_decoder_layer_split,
        pythia_2b8_destroy_graph_context,
        pythia_2b8_graph_decode_step,
        pythia_2b8_mlp_only,
        pythia_6b9_attention_only,
        pythia_6b9_create_graph_context,
        pythia_6b9_decoder_layer,
        pythia_6b9_decoder_layer_split,
        pythia_6b9_destroy_graph_context,
        pythia_6b9_graph_decode_step,
        pythia_6b9_mlp_only,
        rmsnorm,
    )
    from clusterfusion.weights import LayerWeights, gpt_neox_layer, llama_layer


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'clusterfusion' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
