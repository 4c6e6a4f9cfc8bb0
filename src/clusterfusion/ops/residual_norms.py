"""The residual stream of a prompt takes in what a layer added and is normed for what reads it next: one launch on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clusterfusion import reference
from clusterfusion.architecture import DecoderConfig
from clusterfusion.errors import UnsupportedModelError
from clusterfusion.jit.residual_norms import MAX_HIDDEN, ResidualNormsArguments, choose_residual_norms, prepare
from clusterfusion.ops.layer_launch import ELEMENT_TYPES

# weight [hidden], bias [hidden] or None, and where the normed rows go, [rows, hidden]; all of the weights' dtype.
NormOfRows = tuple[Tensor, Tensor | None, Tensor]


class ResidualNorms:
    """Of one model on one device. Its arguments belong to it alone: not for several threads at once."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
        """`dtype` is that of the weights; on a GPU it has 16 bits. Raises UnsupportedModelError for a model that is too wide,
        DeviceError on a GPU that is not supported, CompileError."""
        self._config = config
        self._launch: Callable[[], None] | None = None
        if device.type == "cuda":
            if config.hidden_size > MAX_HIDDEN:
                raise UnsupportedModelError(f"hidden_size is {config.hidden_size}; the norms take at most {MAX_HIDDEN}")
            self._arguments = ResidualNormsArguments(eps=config.norm_eps)
            chosen = choose_residual_norms(config.norm, config.hidden_size, ELEMENT_TYPES[dtype])
            self._launch = prepare(chosen, self._arguments, device.index)

    def __call__(
        self, x: Tensor, deltas: Sequence[Tensor], norms: Sequence[NormOfRows], *, fresh: bool = False
    ) -> None:
        """x [rows, hidden] becomes x + deltas, each [rows, hidden] of the weights' dtype; with `fresh` x counts as zero and is
        not read. Then the norms of it are written. At most two deltas, one or two norms. x is of
        reference.accumulate_dtype, as is all arithmetic; everything is contiguous, and on a GPU starts at a multiple of 16
        bytes."""
        if self._launch is None:
            self._compute(x, deltas, norms, fresh)
            return
        a = self._arguments
        a.x, a.rows, a.fresh = x.data_ptr(), x.shape[0], fresh
        a.delta[0] = deltas[0].data_ptr()
        a.delta[1] = deltas[1].data_ptr() if len(deltas) > 1 else None
        for index, place in enumerate(a.norm):
            if index < len(norms):
                weight, bias, out = norms[index]
                place.weight, place.out = weight.data_ptr(), out.data_ptr()
                place.bias = None if bias is None else bias.data_ptr()
            else:
                place.out = None
        self._launch()

    def _compute(self, x: Tensor, deltas: Sequence[Tensor], norms: Sequence[NormOfRows], fresh: bool) -> None:
        if fresh:
            x.zero_()
        for delta in deltas:
            x.add_(delta)
        for weight, bias, out in norms:
            out.copy_(reference.norm(self._config, x, weight, bias))
