"""Our decoder layers in their launch forms, as candidates on one residual vector and one K/V cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clusterfusion import reference
from clusterfusion.bench.device_timer import capture
from clusterfusion.bench.samples import Candidate
from clusterfusion.engine.block_decoder import BlockDecoder
from clusterfusion.errors import ClusterFusionError
from clusterfusion.weights import DecoderWeights

# graph: the fused layers in one CUDA graph; fused: a launch a layer from the host; and the same two ways of launching for
# split, so that each has its like to be compared with.
FORMS = ("graph", "split graph", "fused", "split")
_SPLIT = ("split graph", "split")
_CAPTURED = ("graph", "split graph")


class Form:
    """One launch form over its own BlockDecoder; a captured one is captured here, once, for every context."""

    @torch.no_grad()
    def __init__(self, name: str, weights: DecoderWeights, cache: reference.KVCache, x: Tensor) -> None:
        self.name = name
        self._decoder = BlockDecoder(weights, cache, "split" if name in _SPLIT else "fused")
        self._x = x
        self._step: Callable[[], Tensor] = self._decoder.run_layers
        if name in _CAPTURED:
            self.set_context(0)
            graph, out = capture(self._decoder.run_layers, self.prepare, weights.device)

            def replay() -> Tensor:
                graph.replay()
                return out

            self._step = replay

    def set_context(self, context: int) -> None:
        """The next steps stand after `context` cached tokens."""
        self._decoder.set_position(context)

    @torch.no_grad()
    def prepare(self) -> None:
        """The residual vector before the first layer, which the layers write over."""
        self._decoder.residual.copy_(self._x)

    def output(self) -> Tensor:
        """The residual vector after the last layer of one step [hidden], float32. Raises DeviceError if a wait ran out."""
        self.prepare()
        out = self._step().clone()
        torch.cuda.synchronize(out.device)
        self._decoder.check_error()
        return out

    def candidate(self, samples: int) -> Candidate:
        return Candidate(self.name, self.prepare, self._step, samples)


def agreed_output(outputs: dict[str, Tensor], context: int) -> Tensor:
    """The output that all forms agree on to the bit. Raises ClusterFusionError if one differs or is not finite."""
    first, *others = outputs.items()
    for name, out in outputs.items():
        if not torch.isfinite(out).all():
            bad = int((~torch.isfinite(out)).sum())
            raise ClusterFusionError(f"{name} at context {context}: {bad} of {out.numel()} values are not finite")
    for name, out in others:
        if not torch.equal(out, first[1]):
            differing = int((out != first[1]).sum())
            raise ClusterFusionError(
                f"{name} and {first[0]} differ at context {context} in {differing} of {out.numel()} values; every form "
                "must give the same bits, so there is no result"
            )
    return first[1]
