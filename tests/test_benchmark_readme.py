"""The README's table says what each row is, which file it is from, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench.fabricated import RANDOM_MODEL, decoded
from benchmark_files import RESULTS, read_results
from benchmark_readme import overview_choice, readme_block

LAYERS = RESULTS / "layer_pythia_2.8b.json"
ROOT = Path(__file__).resolve().parent.parent


def block(root: Path, **files: dict[str, Any]) -> str:
    (root / RESULTS).mkdir(parents=True)
    for name, data in files.items():
        (root / RESULTS / f"{name}.json").write_text(json.dumps(data))
    return readme_block(read_results(root)[0])


def made(name: str = RANDOM_MODEL, contexts: tuple[int, ...] = (16, 512, 1024), **more: Any) -> dict[str, Any]:
    data = decoded("full", name, **more)
    data["contexts"] = [each for each in data["contexts"] if each["context"] in contexts]
    return data | {"asked_contexts": list(contexts)}


def rows(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("| ")][2:]


def test_a_row_is_where_torch_compile_was_measured(tmp_path: Path) -> None:
    said = block(tmp_path, full=made())
    (row,) = rows(said)
    assert (
        row
        == f"| pythia-2.8b, float16 | 1024 | 5.00 | 1.130 | 1.501 (1.33) | 4.000 | 2.67x | [00000000]({RESULTS}/full.json) |"
    )
    assert "random weights, batch 1" in said and "Whole decoding" not in said
    assert "NVIDIA Fabricated. Ours: mode `model`" in said and "let the GPU cool" in said and "Two ratios" not in said


def test_or_else_at_the_shortest_context(tmp_path: Path) -> None:
    data = made()
    for each in data["contexts"]:
        each["peers"] = {}
    said = block(tmp_path, full=data)
    assert rows(said)[0].startswith("| pythia-2.8b, float16 | 16 | 5.00 | 1.064 | 1.402 (1.32) | – | – |")
    assert "let the GPU cool" not in said


def test_or_where_other_peers_were(tmp_path: Path) -> None:
    data = made()
    data["contexts"][0]["peers"] = {}
    for each in data["contexts"]:
        each["peers"].pop("transformers compile", None)
    assert rows(block(tmp_path, full=data))[0].startswith("| pythia-2.8b, float16 | 512 |")


def test_a_ratio_that_is_not_the_same_in_all_rounds_says_between_what(tmp_path: Path) -> None:
    data = made(contexts=(1024,))
    runs = data["contexts"][0]["peers"]["transformers compile"]["runs"]
    runs[1]["ms_per_token"] = 3.0
    said = block(tmp_path, full=data)
    assert " | 2.67x (2.0 … 2.7) | " in rows(said)[0] and "Two ratios: between them" in said


def test_our_fastest_mode_is_named_where_it_is_not_model(tmp_path: Path) -> None:
    data = made(contexts=(1024,))
    data["contexts"][0]["modes"]["graph"]["median_ms"] = 1.3
    assert "| 1.300 (1.15), `graph` |" in rows(block(tmp_path, full=data))[0]


def test_a_file_for_each_model_and_dtype(tmp_path: Path) -> None:
    """The newest of a kind, whatever its name, and `bench full` before `bench decode`."""
    half = made()
    half["model"] = {**half["model"], "dtype": "bfloat16"}
    said = block(
        tmp_path,
        a=made(date="2026-11-25", source_digest="1" * 64),
        b=made(),
        c=half,
        d=decoded(date="2026-11-26", source_digest="2" * 64),
        e=decoded(name="owner/other/"),
    )
    ends = {row.split(" | ")[0].removeprefix("| "): row.rpartition("](")[2] for row in rows(said)}
    assert ends == {
        "pythia-2.8b, float16, random weights": f"{RESULTS}/a.json) |",
        "pythia-2.8b, bfloat16, random weights": f"{RESULTS}/c.json) |",
        "other, float16": f"{RESULTS}/e.json) |",
    }


def test_a_file_beside_torch_compile_comes_first(tmp_path: Path) -> None:
    said = block(tmp_path, full=made(contexts=(16, 512), date="2026-11-26"), decode=decoded(interrupted=True))
    assert rows(said)[0].endswith("| 4.000 | 2.67x | [00000000](benchmarks/results/h200/decode.json) |")


def test_a_whole_file_comes_before_a_newer_one_that_is_not(tmp_path: Path) -> None:
    newer = {"date": "2026-11-26"}
    ended = made(**newer)
    del ended["contexts"][0]  # as one that was killed leaves it
    said = block(tmp_path, whole=decoded(), interrupted=made(interrupted=True, **newer), killed=ended)
    assert rows(said)[0].endswith("/whole.json) |") and "interrupted" not in said
    assert rows(block(tmp_path / "alone", killed=ended))[0].startswith("| pythia-2.8b, float16, interrupted |")


def test_rows_that_are_not_alike_say_so(tmp_path: Path) -> None:
    other = made("owner/pythia-6.9b", device={"name": "Other", "driver": "9"}, interrupted=True)
    other["contexts"][0]["differences"] = ["graph's tokens"]
    said = block(tmp_path, a=made(), b=other)
    first, second = rows(said)
    assert first.startswith("| pythia-2.8b, float16, random weights, NVIDIA Fabricated | 1024 |")
    assert second.startswith("| pythia-6.9b, float16, Other (driver 9), interrupted | 1024 |")
    assert "**tokens differ** |" in second and "tokens differ" not in first
    assert "random weights, batch 1" not in said and "\nNVIDIA" not in said


def test_layers_alone(tmp_path: Path) -> None:
    said = block(tmp_path, layer=json.loads((ROOT / LAYERS).read_text()))
    assert said.startswith("![Time of one step of the decoder layers alone, as a share")
    assert "Whole decoding is not on record yet." in said and "Ours: mode" not in said
    assert "`graph`" in rows(said)[0]


def test_models_without_a_context_in_common(tmp_path: Path) -> None:
    files = {"a": made(contexts=(16,)), "b": made("pythia-6.9b (random weights)", contexts=(1024,))}
    said = block(tmp_path, **files, layer=json.loads((ROOT / LAYERS).read_text()))
    assert len(rows(said)) == 2 and "Whole decoding" not in said and "with a context of 16 tokens" in said
    choice = overview_choice(read_results(tmp_path)[0])
    assert choice is not None and [file.path.stem for file in choice[0]] == ["a"]


@pytest.mark.parametrize(("field", "value"), [("floor_ms", None), ("modes", {})], ids=["floor", "ours"])
def test_without_a_floor_or_times_of_ours(tmp_path: Path, field: str, value: object) -> None:
    data = made(read_ceiling=None)
    for each in data["contexts"]:
        each[field] = value
    said = block(tmp_path, full=data)
    assert (
        said
        == f"Speed is not measured yet: there is no result with times of ours and a read ceiling in [{RESULTS}]({RESULTS}).\n"
    )


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / RESULTS).mkdir(parents=True)
    (tmp_path / RESULTS / "full.json").write_text("{")
    with pytest.raises(ValueError, match="full.json is not JSON: Expecting"):
        read_results(tmp_path)
