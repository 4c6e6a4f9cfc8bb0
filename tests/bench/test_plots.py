"""Figures from fabricated and from committed results: what is drawn, and that it is the same every time."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from bench.fabricated import report

from clusterfusion.bench import plots
from clusterfusion.bench.decode.report import to_json
from clusterfusion.bench.results import times_of
from clusterfusion.errors import ClusterFusionError

pytest.importorskip("matplotlib")
LAYER = Path(__file__).resolve().parents[2] / "benchmarks/results/h200/layer_pythia_2.8b.json"


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return to_json(report(16, 1024))


def test_times_are_those_of_the_file(result: dict[str, Any]) -> None:
    times = times_of(result)
    assert (times.benchmark, times.model, times.dtype) == ("decode", "pythia-2.8b", "float16")
    assert times.names == ["transformers eager", "transformers compile", "graph", "model"]
    assert (list(times.peers()), list(times.ours())) == (times.names[:2], times.names[2:])
    short, long = times.points
    assert short.floor_ms == result["contexts"][0]["floor_ms"]
    assert short.peers == {"transformers eager": 25.0}, "what failed has no time"
    assert long.times["transformers compile"] == 4.0


def test_layers_are_read_the_same_way() -> None:
    result = json.loads(LAYER.read_text())
    times = times_of(result)
    assert (times.benchmark, times.model, len(times.points)) == ("layer", "pythia-2.8b", 4)
    assert list(times.ours()) == ["split", "split graph", "fused", "graph"]
    assert times.points[1].ours["graph"] == result["contexts"][1]["forms"]["graph"]["median_ms"]


def test_every_figure_comes_as_png_and_svg_and_the_same_twice(result: dict[str, Any]) -> None:
    made = plots.draw(result)
    assert sorted(made) == [
        f"decode_pythia-2.8b_{name}.{kind}" for name in ("read_share", "speedup", "tpot") for kind in ("png", "svg")
    ]
    assert all(content.startswith(b"\x89PNG") for name, content in made.items() if name.endswith("png"))
    again = plots.draw(result)
    svg = {name: content for name, content in made.items() if name.endswith("svg")}
    assert all(again[name] == content for name, content in svg.items())
    said = svg["decode_pythia-2.8b_tpot.svg"].decode()
    for text in ("floor: reading the bytes", "transformers eager", "NVIDIA Fabricated", "tokens of context"):
        assert text in said
    assert "against transformers compile" in svg["decode_pythia-2.8b_speedup.svg"].decode()


def test_what_is_not_there_is_not_drawn(result: dict[str, Any]) -> None:
    bare = [point | {"floor_ms": None, "peers": {}} for point in result["contexts"]]
    assert {name.rpartition("_")[2] for name in plots.draw(result | {"contexts": bare})} == {"tpot.png", "tpot.svg"}
    assert plots.draw(result | {"contexts": []}) == {}


def test_the_overview_writes_times_beside_the_bars(result: dict[str, Any]) -> None:
    layer = json.loads(LAYER.read_text())
    figure = plots.overview([times_of(result), times_of(layer)], 1024)
    said = plots.content_of(figure, "svg").decode()
    times = {float(ms) for ms in re.findall(r">([0-9.]+) ms<", said)}
    [point] = [point for point in layer["contexts"] if point["context"] == 1024]
    drawn = (point["forms"]["graph"], point["peers"]["transformers compile"])
    assert {2.0, 4.0, 25.0, *(round(each["median_ms"], 2) for each in drawn)} <= times
    assert said.count("% of the read ceiling") == 2


@pytest.mark.parametrize(
    ("model", "stem"), [("owner/name-1b", "name-1b"), ("./folder/", "folder"), ("a b:c", "a_b_c"), ("..", "model")]
)
def test_names_of_models_become_names_of_files(model: str, stem: str) -> None:
    assert plots.file_stem(model) == stem


def test_a_missing_matplotlib_is_one_line(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ClusterFusionError, match="plots need matplotlib, which is not installed: pip install"
    ) as caught:
        plots.draw(result)
    assert "\n" not in str(caught.value)
