"""One sample on a GPU, between two CUDA events, under conditions that are the same for every candidate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from clusterfusion.bench.samples import Candidate

Result = TypeVar("Result")


class DeviceTimer:
    """Takes samples on the current stream of the current device.

    Before each, `lead` puts a few hundred microseconds of reading other data on the GPU. It leaves nothing of the
    candidate's data in the L2 cache, keeps the clocks up, and gives the host time to queue what is timed: otherwise a
    short graph's time would hold the latency of its own launch.
    """

    def __init__(self, lead: Callable[[], None]) -> None:
        self._lead = lead

    def __call__(self, candidate: Candidate, count: int) -> list[float]:
        """`count` times of `candidate` in ms. Returns when the GPU is done with them."""
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, end in events:
            candidate.prepare()
            self._lead()
            start.record()
            candidate.run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]


def capture(
    run: Callable[[], Result], prepare: Callable[[], None], device: torch.device
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A CUDA graph of `run`, and what `run` returned while it was captured: tensors that every replay writes to.

    It runs a few times first, `prepare` before each, to set up libraries and allocate their workspaces.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            prepare()
            run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = run()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph, result
