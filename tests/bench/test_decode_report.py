"""Floor, ratios, slopes, JSON, table and Markdown, from fabricated times."""

from __future__ import annotations

import io
import json

import pytest
from bench.fabricated import CEILING, CONFIG, MS_A_TOKEN, report
from rich.console import Console

from clusterfusion.bench.costs import decode_bytes, kv_bytes, mean_cached_tokens, whole_step_weight_bytes
from clusterfusion.bench.decode.report import to_json
from clusterfusion.bench.decode.tables import heading, lines, markdown, table


def test_bytes_are_those_of_a_whole_step_at_the_mean_context() -> None:
    c = CONFIG
    layers = 32 * (12 * 2560**2 + 13 * 2560)
    assert whole_step_weight_bytes(c) == 2 * (layers + 2 * 2560 + c.vocab_size * 2560 + 2560)
    assert mean_cached_tokens(16, 128) == 79
    assert decode_bytes(c, 16, 128) == whole_step_weight_bytes(c) + 79 * kv_bytes(c, 1)
    assert decode_bytes(c, 16, 128, element_bytes=4) == 2 * decode_bytes(c, 16, 128)


def test_ratios_are_to_the_faster_way_of_reading() -> None:
    made = report(16, 512)
    assert made.read is not None and made.read.ceiling == pytest.approx(CEILING)
    floor = decode_bytes(CONFIG, 512, 128) / CEILING * 1e3
    assert made.floor_ms(512) == pytest.approx(floor)
    assert made.ratio(512, 2.0) == pytest.approx(2.0 / floor)


def test_slopes_are_relative_to_reading_keys_and_values() -> None:
    made = report(16, 512, 1024)
    assert made.slope("model") == pytest.approx(1.5 * MS_A_TOKEN)
    assert made.relative_slope("model") == pytest.approx(1.5)
    assert made.relative_slope("graph") == pytest.approx(0.0)
    assert report(16).slope("model") is None


def test_json_holds_every_run_and_what_makes_it_evidence() -> None:
    said = json.loads(json.dumps(to_json(report(16, 512, 1024)), allow_nan=False))
    assert {"date", "command", "device", "versions", "source_digest", "scope", "format"} <= said.keys()
    assert said["left_out"] == {"fused": "there is no fuse"}
    assert said["slopes"]["model"]["ratio_to_floor"] == pytest.approx(1.5)
    short, _, long = said["contexts"]
    graph = short["modes"]["graph"]
    assert graph["runs"][2] == {"ms_per_token": 2.04, "first_token_ms": 29.0}
    assert (graph["median_ms"], graph["tokens_per_s"], graph["first_token_ms"]) == (2.0, 500.0, 30.0)
    assert graph["ratio_to_floor"] == pytest.approx(2.0 / short["floor_ms"])
    assert graph["bytes_per_s"] == pytest.approx(short["bytes"] / 2e-3)
    assert graph["speedup_over"] == {"transformers eager": 12.5}
    assert graph["clocks"] == {
        "sm_mhz": 1590.0, "lowest_sm_mhz": 1400.0, "highest_sm_mhz": 1980.0, "watts": 698.0, "samples": 40,
    }  # fmt: skip
    assert short["modes"]["model"]["clocks"] is None
    assert long["modes"]["graph"]["speedup_over"] == {"transformers eager": 12.5, "transformers compile": 2.0}
    assert short["peers"]["transformers compile"] == {"error": "Unsupported: [no] triton"}
    assert len(short["read_ms"]["loads"]) == 100
    assert said["read_ceiling"]["variants"]["loads"]["samples"] == 300


def test_the_table_has_a_row_for_everything() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(table(report(16, 1024)))
    printed = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(printed) == 1 + 2 * (1 + 2 + 2)
    assert max(len(line.rstrip()) for line in printed) <= 120
    assert printed[1].split()[:3] == ["16", "floor", f"{decode_bytes(CONFIG, 16, 128) / CEILING * 1e3:.3f}"]
    assert printed[3].split()[:5] == ["graph", "2.000", "1.988", "2.024", "500.0"]
    assert printed[3].split()[7:9] == ["1590", "30.0"], "MHz, then ms to the first token"
    assert printed[2].split()[7] == "30.0", "nobody looked"
    assert printed[5].split() == ["transformers", "compile", "failed"]


def test_markdown_is_the_same_table() -> None:
    made = markdown(report(16, 1024))
    table_lines = [line for line in made.splitlines() if line.startswith("|")]
    assert len(table_lines) == 2 + 2 * (1 + 2 + 2)
    assert len({line.count("|") for line in table_lines}) == 1
    assert "|  | graph | 2.000 | 1.988 | 2.024 | 500.0 |" in made
    assert "`clusterfusion bench decode`" in made
    assert "read ceiling 5000 GB/s (bulk copies 5000, loads 4000; 4.0 GB read once)  \n" in made


def test_lines_say_slopes_peers_and_what_is_not_there() -> None:
    said = lines(report(16, 512, 1024))
    assert (
        "slope of model: 98.3 ns more for each cached token, 1.500 of the time that reading its keys and values takes"
        in said
    )
    assert "context 1024: model is 16.66x as fast as transformers eager, 2.67x as fast as transformers compile" in said
    assert "context 512: first token after 30.0 ms, 1.00 of transformers eager's 30.0 ms" in said
    assert "mode fused left out: there is no fuse" in said
    assert "transformers compile failed at context 16, 512: Unsupported: [no] triton" in said
    assert not any("FAILED" in line for line in said)
    assert heading(report(16))[0] == (
        "pythia-2.8b (random weights), float16, batch 1, 128 new tokens, 5 runs (transformers eager: 3), on "
        "NVIDIA Fabricated"
    )
