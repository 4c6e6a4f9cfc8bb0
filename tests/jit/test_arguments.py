"""Structs that host and kernel lay out alike. The kernels assert these sizes, at compile time."""

from __future__ import annotations

import ctypes
import re

import pytest

from clusterfusion.errors import UnsupportedModelError
from clusterfusion.jit import decode_step, decoder_block, lm_head, read_ceiling, residual_norms, rotary_to_cache
from clusterfusion.jit.sources import CUDA_ROOT
from clusterfusion.seed_api.graph_context import VECTORS


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


def test_more_layers_than_a_launch_takes_the_addresses_of_are_refused() -> None:
    decode_step.require_arguments_fit(223)
    with pytest.raises(
        UnsupportedModelError, match="num_layers is 224; a launch of whole steps takes the addresses of 223"
    ):
        decode_step.require_arguments_fit(224)


def test_fields_are_those_of_the_kernels_struct() -> None:
    source = (CUDA_ROOT / "block" / "share.cuh").read_text()
    body = re.search(r"struct LayerTensors \{(.*?)\};", source, re.DOTALL)
    assert body
    names = re.findall(r"\*(\w+)", body[1])
    assert names == [name for name, *_ in decoder_block.LayerTensors._fields_]


@pytest.mark.parametrize(
    "struct",
    [
        *(decoder_block.LayerTensors, decoder_block.KvCache, decoder_block.Workspace, decoder_block.LayerArguments),
        *(decode_step.step_arguments_type(2), lm_head.HeadArguments, read_ceiling.ReadArguments),
        *(residual_norms.NormOfRows, residual_norms.ResidualNormsArguments, rotary_to_cache.RotaryToCacheArguments),
    ],
)
def test_a_name_that_is_no_field_is_an_error(struct: type[ctypes.Structure]) -> None:
    """ctypes would keep it as an attribute, and the kernel would read zeros."""
    with pytest.raises(AttributeError):
        struct().no_field = 1


def test_what_a_step_brings_are_fields_of_the_kernels_struct() -> None:
    fields = {name for name, *_ in decoder_block.LayerTensors._fields_}
    in_the_context = {"q_weight", "o_weight", "up_weight", "down_weight"}
    gpt_neox_has_none = {"k_weight", "k_bias", "v_weight", "v_bias", "gate_weight", "gate_bias"}
    assert set(VECTORS) == fields - in_the_context - gpt_neox_has_none
