"""Named shapes against the parameter counts of the published models."""

from __future__ import annotations

import math

import pytest

from clusterfusion.errors import ArgumentError
from clusterfusion.named_shapes import NAMED_SHAPES, named_shape
from clusterfusion.weights import expected_tensors

# Parameters that the published checkpoints hold, each once: buffers and the second copy of tied embeddings left out.
PARAMETERS = {
    "pythia-14m": 14_067_712,
    "pythia-31m": 30_494_720,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "gpt-neox-20b": 20_554_567_680,
    # The model cards count what every tensor-parallel rank (4 and 2 of them) has a copy of once a rank: norms and the
    # biases after row-parallel products, 6 vectors in each of 16 layers and 2 at the end.
    "stablelm-alpha-3b": 3_638_525_952 - 3 * (16 * 6 + 2) * 4096,
    "stablelm-alpha-7b": 7_869_358_080 - 1 * (16 * 6 + 2) * 6144,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm-135m": 134_515_008,
    "smollm-360m": 361_821_120,
    "smollm-1.7b": 1_711_376_384,
}

# No parameter count tells how the width is divided into heads.
HEAD_DIMS = {
    32: "pythia-14m pythia-31m",
    64: "pythia-70m pythia-160m pythia-410m llama-3.2-1b tinyllama-1.1b smollm-135m smollm-360m smollm-1.7b",
    80: "pythia-2.8b redpajama-incite-3b",
    96: "gpt-neox-20b",
    128: "pythia-1.4b pythia-6.9b pythia-12b redpajama-incite-7b stablelm-alpha-3b stablelm-alpha-7b llama-2-7b "
    "llama-2-13b llama-2-70b llama-3-8b llama-3-70b llama-3.1-8b llama-3.1-70b llama-3.2-3b",
    256: "pythia-1b",
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_published_model(name: str) -> None:
    assert named_shape(name).num_parameters == PARAMETERS[name]


def test_head_dims_are_those_of_the_published_models() -> None:
    wanted = {name: head_dim for head_dim, names in HEAD_DIMS.items() for name in names.split()}
    assert {name: named_shape(name).head_dim for name in NAMED_SHAPES} == wanted


@pytest.mark.parametrize("name", NAMED_SHAPES)
def test_parameters_are_the_sum_over_the_expected_tensors(name: str) -> None:
    config = named_shape(name)
    shapes = expected_tensors(config)
    assert config.num_parameters == sum(math.prod(shape) for shape in shapes.values())
    first_layer = sum(math.prod(shape) for tensor, shape in shapes.items() if ".layers.0." in tensor)
    assert config.layer_parameters == first_layer
    assert config.kv_elements_per_token == 2 * config.num_layers * config.num_kv_heads * config.head_dim
    # A step reads every tensor but the embedding table, of which one row; a tied table it reads whole, as the head.
    table = 0 if config.tied_embeddings else config.vocab_size * config.hidden_size
    assert config.step_parameters == config.num_parameters - table + config.hidden_size


def test_names_do_not_depend_on_case() -> None:
    assert named_shape("Pythia-2.8B") == named_shape("pythia-2.8b")


@pytest.mark.parametrize("name", ["pythia-3b", "", "pythia", None, 7, ["pythia-70m"]])
def test_an_unknown_name_is_refused_with_the_known_ones(name: object) -> None:
    with pytest.raises(ArgumentError) as caught:
        named_shape(name)  # type: ignore[arg-type]
    assert repr(name) in str(caught.value)
    for known in NAMED_SHAPES:
        assert known in str(caught.value)
