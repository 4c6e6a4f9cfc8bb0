"""What `bench trace` is asked to record, checked before anything is made."""

from __future__ import annotations

import dataclasses

import torch

from clusterfusion.architecture import DecoderConfig
from clusterfusion.arguments import as_int
from clusterfusion.bench.options import ANY_POSITION
from clusterfusion.engine.modes import why_not
from clusterfusion.errors import ArgumentError, UnsupportedModelError
from clusterfusion.named_shapes import named_shape

DEFAULT_CONTEXT, DEFAULT_CTAS = 512, 16
DEFAULT_STEPS = (
    31  # launches of 1, 2, 4 and three of 8: the last step is within a launch, as most steps of decoding are
)
MODE = "model"
_MOST_CTAS = 1 << 16


@dataclasses.dataclass(frozen=True)
class TraceOptions:
    """Checked by `trace_options`. `steps` follow a prompt of `context` tokens; the last of them is recorded. `ctas` is how
    many CTAs go into the file; the figures are over all."""

    context: int
    steps: int
    ctas: int

    @property
    def room(self) -> int:
        """Tokens that the K/V cache has to have room for."""
        return self.context + self.steps

    @property
    def cached_tokens(self) -> int:
        """That the recorded step meets."""
        return self.room - 1


def trace_options(
    max_position: int | None,
    *,
    context: int | None = None,
    steps: int | None = None,
    ctas: int = DEFAULT_CTAS,
) -> TraceOptions:
    """The options, checked against a model of `max_position` positions; None for one that is not known yet.

    Raises ArgumentError naming the option, its value and what is needed.
    """
    limit = max_position or ANY_POSITION
    if steps is None:
        steps = min(DEFAULT_STEPS, limit // 2)
    steps = as_int("steps", steps, 1, limit - 1)
    if context is None:
        context = min(DEFAULT_CONTEXT, limit - steps)
    context = as_int("context", context, 1, ANY_POSITION)
    if context + steps > limit:
        raise ArgumentError(
            f"context is {context}, which makes {context + steps} tokens with {steps} steps; the model has {limit} "
            f"positions, so it must be from 1 to {limit - steps}"
        )
    return TraceOptions(context, steps, as_int("ctas", ctas, 1, _MOST_CTAS))


def require_mode(name: str, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Raise UnsupportedModelError unless mode model can run `config`."""
    obstacle = why_not(MODE, config, dtype, device)
    if obstacle is not None:
        raise UnsupportedModelError(f"bench trace records mode {MODE!r}, which cannot run {name} here: {obstacle}")


def require_shape(shape: str, device: torch.device) -> None:
    """As `require_mode`, for a named shape whose weights are not made yet."""
    require_mode(shape, named_shape(shape), torch.float16, device)
