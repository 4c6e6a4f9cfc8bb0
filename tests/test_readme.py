"""The README's Python examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def run(example: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    return names


def the_one_with(text: str) -> str:
    (example,) = [example for example in EXAMPLES if text in example]
    return example


def test_no_example_is_left_out() -> None:
    assert len(EXAMPLES) == 2, "a new one needs a test"


def test_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(the_one_with("engine.stream"))
    assert capsys.readouterr().out.startswith(names["engine"].generate("It is a truth", max_new_tokens=60).text)
    assert names["twin"].position > names["session"].position == 4


def test_a_layer_by_itself_is_the_first_of_a_step() -> None:
    names = run(the_one_with("decoder_layer"))
    session, position = names["session"], names["position"]
    assert names["out"].isfinite().all() and names["out"].shape == names["x"].shape
    k, v = (cache[0][:, position].clone() for cache in (session.cache.k, session.cache.v))
    assert torch.equal(k, names["k_new"]) and torch.equal(v, names["v_new"])
    session.cache.k[0][:, position] = session.cache.v[0][:, position] = 0
    session.step(names["engine"].encode(" ")[-1])
    torch.testing.assert_close(session.cache.k[0][:, position], k)
    torch.testing.assert_close(session.cache.v[0][:, position], v)
