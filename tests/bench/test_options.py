"""What `bench layer` refuses, and in which words."""

from __future__ import annotations

from typing import Any

import pytest

from clusterfusion.bench.options import DEFAULT_CONTEXTS, layer_options
from clusterfusion.errors import ArgumentError, UnsupportedModelError


def test_defaults_are_the_whole_model() -> None:
    options = layer_options("pythia-2.8b")
    assert (options.layers, options.contexts, options.dtype, options.repeats) == (32, DEFAULT_CONTEXTS, "float16", 100)
    assert layer_options("pythia-2.8b", contexts=" 0, 2047", layers=1).contexts == (0, 2047)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"contexts": "16,2048"}, "contexts is 2048; it must be an int from 0 to 2047"),
        ({"contexts": "-1"}, "contexts is '-1'; it must be numbers of tokens"),
        ({"contexts": "16,,17"}, "contexts is '16,,17'; it must be numbers of tokens"),
        ({"contexts": ""}, "contexts is ''; it must be numbers of tokens"),
        ({"contexts": ()}, "at least one"),
        ({"contexts": "5,5"}, "none twice"),
        ({"contexts": (1.5,)}, "contexts is 1.5; it must be an int"),
        ({"layers": 33}, "layers is 33; it must be an int from 1 to 32"),
        ({"layers": 0}, "layers is 0; it must be an int from 1 to 32"),
        ({"repeats": 99}, "repeats is 99; it must be an int from 100"),
        ({"dtype": "float32"}, "dtype is 'float32'; it must be one of 'float16', 'bfloat16'"),
    ],
)
def test_bad_options_are_named_with_value_and_need(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        layer_options("pythia-2.8b", **options)
    assert expected in str(caught.value)


def test_shapes_that_the_kernels_do_not_run() -> None:
    with pytest.raises(UnsupportedModelError, match=r"llama-3-8b cannot be measured beside .*--no-peers"):
        layer_options("llama-3-8b")
    assert layer_options("llama-3-8b", peers=False).config.family == "llama"
    with pytest.raises(ArgumentError, match="named shape 'pythia-3b' is unknown"):
        layer_options("pythia-3b")
