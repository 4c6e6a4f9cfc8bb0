"""How a decode step can run, what each way needs, and which one `auto` takes."""

from __future__ import annotations

import dataclasses

import torch

from clusterfusion.architecture import DecoderConfig
from clusterfusion.errors import ArgumentError, DeviceError, UnsupportedModelError


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to run a decode step."""

    name: str
    launch: str  # what is launched for a step
    needs: str


_KERNELS = "a model in 16 bits on an NVIDIA GPU of compute capability 9.0 or newer"

MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("reference", "plain PyTorch operations", "any device"),
        Mode("split", "regular launches, no grid barrier", _KERNELS),
        Mode("fused", "one cooperative launch with clusters a layer", _KERNELS),
        Mode("graph", "the fused layers in a CUDA graph", _KERNELS),
        Mode("model", "one cooperative launch for whole steps", _KERNELS),
    )
}
_FASTEST_FIRST = ("model", "graph", "fused", "split", "reference")


@dataclasses.dataclass(frozen=True)
class ModeChoice:
    """The mode an engine runs in, and why."""

    name: str
    reason: str


def choose_mode(requested: str, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> ModeChoice:
    """The mode to run `config` in. `auto` takes the fastest there is. Raises ArgumentError for one that cannot run."""
    if requested == "auto":
        obstacles: list[str] = []
        for name in _FASTEST_FIRST:
            obstacle = why_not(name, config, dtype, device)
            if obstacle is None:
                return ModeChoice(name, "; ".join(obstacles) or "the fastest mode")
            if obstacle not in obstacles:
                obstacles.append(obstacle)
    if not isinstance(requested, str) or requested not in MODES:
        raise ArgumentError(f"mode is {requested!r}; it must be 'auto' or one of {', '.join(map(repr, MODES))}")
    obstacle = why_not(requested, config, dtype, device)
    if obstacle is not None:
        raise ArgumentError(f"mode is {requested!r}, which cannot run here: {obstacle}; 'auto' takes one that can")
    return ModeChoice(requested, "as asked")


def why_not(name: str, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """What keeps a mode from running `config`, or None."""
    if name == "reference":
        return None
    if device.type != "cuda":
        return f"the kernels need an NVIDIA GPU, and the device is {str(device)!r}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the kernels need 16-bit weights, and these are {str(dtype).removeprefix('torch.')}"
    from clusterfusion.jit import decode_step, decoder_block
    from clusterfusion.jit.toolchain import find_toolchain
    from clusterfusion.ops.layer_launch import ELEMENT_TYPES, plan_for

    try:
        find_toolchain()
        plan = plan_for(config, device.index)
        # CTAs that wait for one another must all be resident, which depends on the GPU's make and on who else holds it.
        if name == "model":
            decode_step.require_room(plan, ELEMENT_TYPES[dtype], device.index)
        elif name != "split":
            decoder_block.require_room(plan, ELEMENT_TYPES[dtype], device.index)
    except (DeviceError, UnsupportedModelError) as error:
        return str(error)
    return None
