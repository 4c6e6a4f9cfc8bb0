"""Structs that host and kernel lay out alike. The kernels assert these sizes, at compile time."""

from __future__ import annotations

import ctypes
import re

from clusterfusion.jit import decode_step, decoder_block
from clusterfusion.jit.sources import CUDA_ROOT


def test_sizes_are_those_that_the_kernels_assert() -> None:
    asserted = {}
    for source in CUDA_ROOT.rglob("*.cuh"):
        asserted |= dict(re.findall(r"sizeof\((\w+(?:<2>)?)\) == (\d+)", source.read_text()))
    structs = {
        "LayerTensors": decoder_block.LayerTensors,
        "LayerArguments": decoder_block.LayerArguments,
        "StepArguments<2>": decode_step.step_arguments_type(2),
    }
    for name, struct in structs.items():
        assert ctypes.sizeof(struct) == int(asserted[name]), name
    assert int(asserted["Candidate"]) == 4 * decode_step.CANDIDATE_WORDS


def test_fields_are_those_of_the_kernels_struct() -> None:
    source = (CUDA_ROOT / "block" / "share.cuh").read_text()
    body = re.search(r"struct LayerTensors \{(.*?)\};", source, re.DOTALL)
    assert body
    names = re.findall(r"\*(\w+)", body[1])
    assert names == [name for name, *_ in decoder_block.LayerTensors._fields_]
