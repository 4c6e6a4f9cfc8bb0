"""Ratios, JSON and the table, from fabricated times."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from clusterfusion.bench.costs import step_bytes
from clusterfusion.bench.environment import Origin
from clusterfusion.bench.options import layer_options
from clusterfusion.bench.read_ceiling import ReadSpeeds
from clusterfusion.bench.report import ContextTimes, LayerReport, PeerNote, failures, heading, table, to_json
from clusterfusion.bench.samples import Summary

READ_BYTES = 4_000_000_000


def times(median: float, samples: int = 100) -> Summary:
    return Summary(median, median * 0.99, median * 1.02, samples)


def report() -> LayerReport:
    read = {"bulk copies": times(1.0), "loads": times(0.8)}
    contexts = (
        ContextTimes(
            16,
            {"graph": times(1.0), "fused": times(1.1), "split": times(1.25)},
            {"transformers eager": times(50.0, 20), "transformers compile": None},
            {
                "transformers eager": PeerNote(0.001, None),
                "transformers compile": PeerNote(None, "Unsupported: [no] triton"),
            },
            read,
        ),
        ContextTimes(
            1024,
            {"graph": times(1.2), "fused": times(1.3), "split": times(1.5)},
            {"transformers eager": times(60.0, 20), "transformers compile": times(2.4, 100)},
            {"transformers eager": PeerNote(0.001, None), "transformers compile": PeerNote(0.002, None)},
            read,
        ),
    )
    return LayerReport(
        options=layer_options("pythia-2.8b", contexts=(16, 1024)),
        origin=Origin(
            date="2026-11-24T05:01:41+00:00",
            command="clusterfusion bench layer --random-weights pythia-2.8b",
            device={"name": "NVIDIA Fabricated", "driver": "580.1"},
            versions={"torch": "2.11.0", "transformers": None},
            source_digest="0" * 64,
        ),
        read=ReadSpeeds(READ_BYTES, read),
        contexts=contexts,
    )


def test_the_ceiling_is_the_faster_variant() -> None:
    read = report().read
    assert read.speed("bulk copies") == pytest.approx(4e12)
    assert read.ceiling == read.speed("loads") == pytest.approx(5e12)


def test_ratio_and_speed_are_of_the_bytes_a_step_reads() -> None:
    made = report()
    graph = made.contexts[1].ours["graph"]
    read = step_bytes(made.options.config, 1024)
    assert made.floor_ms(1024) == pytest.approx(read / 5e12 * 1e3)
    assert made.ratio(1024, graph) == pytest.approx(1.2 / (read / 5e12 * 1e3))
    assert made.speed(1024, graph) == pytest.approx(read / 1.2e-3)
    assert made.ratio(1024, graph) * made.speed(1024, graph) == pytest.approx(made.read.ceiling)


def test_json_holds_what_makes_a_number_evidence() -> None:
    said = json.loads(json.dumps(to_json(report())))
    assert said["command"].startswith("clusterfusion bench layer")
    assert said["device"]["name"] == "NVIDIA Fabricated"
    assert {"date", "versions", "source_digest", "scope", "format"} <= said.keys()
    assert said["model"] | {"shape": "pythia-2.8b", "layers": 32, "dtype": "float16"} == said["model"]
    assert said["bytes"]["weights"] == 32 * said["bytes"]["layer_weights"]
    assert said["read_ceiling"]["bytes_per_s"] == pytest.approx(5e12)
    assert said["read_ceiling"]["variants"]["bulk copies"]["bytes_per_s"] == pytest.approx(4e12)
    short, long = said["contexts"]
    assert (short["context"], long["context"]) == (16, 1024)
    assert long["bytes"] == said["bytes"]["weights"] + long["kv_bytes"]
    assert set(short["forms"]) == {"graph", "fused", "split"}
    graph = short["forms"]["graph"]
    assert {"median_ms", "p10_ms", "p90_ms", "samples", "ratio_to_floor", "bytes_per_s", "us_a_layer"} <= graph.keys()
    assert graph["us_a_layer"] == pytest.approx(1000 / 32)
    assert graph["speedup_over"] == {"transformers eager": pytest.approx(50.0)}
    assert long["forms"]["split"]["speedup_over"]["transformers compile"] == pytest.approx(1.6)
    assert short["peers"]["transformers compile"] == {"difference": None, "error": "Unsupported: [no] triton"}
    assert short["peers"]["transformers eager"]["median_ms"] == 50.0
    assert short["peers"]["transformers eager"]["error"] is None


def test_the_table_has_a_row_for_everything_and_names_failures() -> None:
    made = report()
    console = Console(file=io.StringIO(), width=120)
    console.print(table(made))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = text.splitlines()
    assert len(lines) == 1 + 2 * (1 + 3 + 2)
    assert "vs eager" in lines[0] and "vs compile" in lines[0]
    graph = next(line for line in lines if "graph" in line).split()
    assert graph[:2] == ["graph", "1.000"]
    assert graph[-1] == "50.00x"
    assert any(line.split()[-1] == "failed" and "compile" in line for line in lines)
    assert failures(made) == ["transformers compile failed at context 16: Unsupported: [no] triton"]
    assert any("read ceiling 5000 GB/s (bulk copies 4000, loads 5000" in line for line in heading(made))
