"""How a decode step can run, what each way needs, and which one `auto` takes."""

from __future__ import annotations

import dataclasses

import torch

from clusterfusion.architecture import DecoderConfig
from clusterfusion.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to run a decode step."""

    name: str
    launch: str  # what is launched for a step
    needs: str
    available: bool


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("reference", "plain PyTorch operations", "any device", available=True),
        Mode("split", "regular launches, no grid barrier", "compute capability 9.0 or later", available=False),
        Mode(
            "fused", "one cooperative launch with clusters a block", "compute capability 9.0 or later", available=False
        ),
        Mode("graph", "the fused block in a CUDA graph", "compute capability 9.0 or later", available=False),
        Mode("model", "one cooperative launch for the whole step", "compute capability 9.0 or later", available=False),
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
    if requested not in MODES:
        raise ArgumentError(f"mode is {requested!r}; it must be 'auto' or one of {', '.join(map(repr, MODES))}")
    obstacle = why_not(requested, config, dtype, device)
    if obstacle is not None:
        raise ArgumentError(f"mode {requested!r} cannot run here: {obstacle}; use mode='auto'")
    return ModeChoice(requested, "as asked")


def why_not(name: str, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """What keeps a mode from running `config`, or None."""
    if not MODES[name].available:
        return "fused kernels are not part of this version"
    return None
