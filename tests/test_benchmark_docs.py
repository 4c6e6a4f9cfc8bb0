"""docs/benchmarks.md, its figures and the README's plot and table are those of the result files; sections come as files come."""

from __future__ import annotations

import importlib.util
import json
import operator
from pathlib import Path
from typing import Any

import benchmark_docs
import pytest
from bench.fabricated import RANDOM_MODEL, decoded
from benchmark_files import RESULTS, of_kind, read_results
from benchmark_page import FIGURES, PAGE, page
from benchmark_readme import OVERVIEW
from benchmark_twice import change, measured_twice

from clusterfusion.errors import ClusterFusionError

ROOT = Path(__file__).resolve().parent.parent
README = f"# Name\n\n{benchmark_docs.BEGIN}{benchmark_docs.END}\n## More\n"
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


def test_what_is_committed_is_what_the_files_say(capsys: pytest.CaptureFixture[str]) -> None:
    status = benchmark_docs.main(["--check"])
    assert status == 0, capsys.readouterr().err


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / RESULTS).mkdir(parents=True)
    (tmp_path / PAGE).parent.mkdir()
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def put(root: Path, name: str, data: dict[str, Any]) -> None:
    (root / RESULTS / name).write_text(json.dumps(data))


def with_peers_at(*contexts: int, name: str = RANDOM_MODEL) -> dict[str, Any]:
    made = decoded(name=name)
    for each in made["contexts"]:
        if each["context"] not in contexts:
            each["peers"] = {}
    return made


def evaluated(kind: str, **more: Any) -> dict[str, Any]:
    facts = {
        "model": "owner/pythia-160m",
        "device": {"name": "NVIDIA Fabricated"},
        "versions": {"torch": "2"},
        "source_digest": "1" * 64,
        "command": f"clusterfusion {kind}",
        "date": "2026-11-24",
    }
    return {"evaluation": kind, "facts": facts} | more


def divergence(best: int, margin: float, our_error: float, their_error: float) -> dict[str, Any]:
    errors = {"margin": margin, "our_error": our_error, "their_error": their_error}
    return {"ours": {"token": 1}, "theirs": {"token": 2}, "best_token": best, **errors}


LOSSES = {
    path: {"nats_per_token": 1.5, "perplexity": 4.48169, "bits_per_byte": 0.7}
    for path in ("decode", "prefill", "transformers")
}
ORIGIN = {"device": {"name": "GPU"}, "versions": {}, "source_digest": "2" * 64, "command": "c", "date": "2026"}
SCORED = {"losses": LOSSES, "scored_tokens": 99, "source": "a text"}


def test_without_results_it_says_so(root: Path) -> None:
    assert benchmark_docs.main([], root) == 0
    said = (root / PAGE).read_text()
    assert "there is no result of `bench full` or `bench decode` here" in said
    assert "`bench roofline` by itself is not measured yet.\n" in said
    assert "`bench prefill` is not measured yet.\n" in said
    assert "`verify`, `quality` and `perplexity`: not measured yet" in said
    assert "not recorded yet" in said and ".json" not in said
    readme = (root / "README.md").read_text()
    assert "Speed is not measured yet" in readme
    assert readme.startswith("# Name\n") and readme.endswith("## More\n")
    assert benchmark_docs.main(["--check"], root) == 0


@needs_matplotlib
def test_sections_come_as_files_come(root: Path) -> None:
    put(root, "decode_pythia-2.8b.json", decoded())
    scored = {"perplexity": SCORED | {"mode": "model"}, "no_perplexity": None}
    put(root, "full_pythia-2.8b.json", decoded("full", **scored))
    put(root, "perplexity.json", evaluated("perplexity", **SCORED))
    summary = {
        "passed": True,
        "identical_prompts": 15,
        "prompts": 16,
        "divergences": {"tie": 2, "error": 0},
        "bit_differences": 0,
        "same_tokens": 485,
        "compared_tokens": 487,
    }

    parted = [divergence(1, 0.01, 0.02, 0.03), divergence(2, -0.04, 0.05, 0.06), divergence(1, 0.01, 0.02, 0.03)]
    prompts = [
        {"text": text, "divergences": [found]} for text, found in zip(("words", None, None), parted, strict=True)
    ]
    verified = {"summary": summary, "prompts": prompts, "tokens": 32, "runs": 2, "modes": [{"name": "model"}]}
    put(root, "verify.json", evaluated("verify", **verified))
    estimate = {"mean": 0.25, "low": 0.125, "high": 0.5}
    measures = {"kl_nats": {"ours": estimate, "transformers": estimate, "difference": None, "rounded": estimate}}
    put(root, "quality.json", evaluated("quality", measures=measures, positions=256, source="paragraphs"))
    read = {"bytes": 4_000_000_000, "variants": {"loads": {"median_ms": 0.8, "bytes_per_s": 5e12}}}
    put(root, "roofline.json", {"benchmark": "roofline", "reads": [read], **ORIGIN})
    loops = {
        "model": {"median_ms": 8.7, "p10_ms": 8.5, "p90_ms": 9.0, "ratio_to_transformers": 0.29},
        "transformers": {"median_ms": 30.0, "p10_ms": 29.0, "p90_ms": 31.0, "ratio_to_transformers": 1.0},
        "reference": {"median_ms": None, "ratio_to_transformers": None},
    }
    prefill = {"model": {"name": "pythia-2.8b (random weights)", "dtype": "float16"}, "runs": 10, "scope": "a wall"}
    put(
        root,
        "prefill.json",
        {"benchmark": "prefill", "prompts": [{"prompt": 16, "loops": loops}], **prefill, **ORIGIN},
    )
    put(root, "other.json", {"traceEvents": []})
    assert benchmark_docs.main([], root) == 0
    said = (root / PAGE).read_text()
    for expected in (
        "### pythia-2.8b, float16, random weights: `bench full`",
        "### pythia-2.8b, float16, random weights: `bench decode`",
        "| graph | 2.000 (1.88) | 2.000 (1.82) | 2.000 (1.77) |",
        "| transformers compile | – | – | 4.000 (3.54) |",
        "| graph → model | 1.43x | 1.38x | 1.33x |",
        "| transformers compile → model | – | – | 2.67x |",
        "| model | 30.0 (1.00) | 30.0 (1.00) | 30.0 (1.00) |",
        "The SMs' clock in MHz and the GPU's power in these runs, prompts included, medians:",
        "| transformers compile | – | – | 1590, 698 W |",
        "| graph | 1590, 698 W | 1590, 698 W | 1590, 698 W |",
        "| model | – | – | – |",
        "Not in it: mode fused: there is no fuse; transformers compile at context 16: Unsupported: [no]",
        "| ours, token by token | 1.500000 | 4.48169 | 0.70000 |",
        "median of 5 runs of 128 tokens (x floor)",
        "| transformers eager | 6.00 | 6.00 | 6.00 |",
        "| transformers eager | 128 | 128 | 128 |",
        "Passed: 15 of 16 prompts (texts: 1, the rest random tokens) give transformers' 32 tokens; differences: 2 tie, 0 error. 485 of 487 compared tokens are the same",
        "float64 has our token in 2 and theirs in 1, by a margin of at most 4.0e-02; our logits are off by at most 5.0e-02 there, theirs by 6.0e-02.",
        "| graph | 1.988 … 2.024 | 1.988 … 2.024 | 1.988 … 2.024 |",
        "| against float64 | ours | ours, rounded | transformers | difference |",
        "| kl_nats | 0.25 [0.125, 0.5] | 0.25 [0.125, 0.5] | 0.25 [0.125, 0.5] | – |",
        "| 4.00 | loads | 0.8000 | 5.000 |",
        "### pythia-2.8b, float16, random weights: `bench prefill`",
        "| model | 8.70 [8.50, 9.00] (0.29) |",
        "| transformers | 30.00 [29.00, 31.00] (1.00) |",
        "| reference | – |",
        "`benchmark_decode.py` | `clusterfusion bench decode --random-weights pythia-2.8b`",
        "[decode_pythia-2.8b.json](../benchmarks/results/h200/decode_pythia-2.8b.json) (random weights)",
        "Not drawn from here: [other.json]",
        f"sources `{'0' * 64}`",
    ):
        assert expected in said, expected
    assert all(
        "not recorded yet" not in line for line in said.splitlines() if line.startswith("| `benchmark_decode.py")
    )
    readme = (root / "README.md").read_text()
    assert (
        f"]({OVERVIEW})" in readme and "whole generate loops, random weights, batch 1, with a context of 1024" in readme
    )
    assert "full_pythia-2.8b.json" in readme and "decode_pythia-2.8b.json" not in readme
    assert "| pythia-2.8b, float16 | 1024 | 5.00 | 1.130 | 1.501 (1.33) | 4.000 | 2.67x | [00000000](" in readme
    assert "NVIDIA Fabricated. Ours: mode `model`, where no other is named." in readme
    drawn = {path.name for path in (root / FIGURES).iterdir()}
    kinds = ("tpot", "speedup", "read_share")
    assert drawn == {"overview.svg"} | {
        f"{kind}_pythia-2.8b_{plot}.svg" for kind in ("full", "decode") for plot in kinds
    }
    assert benchmark_docs.main(["--check"], root) == 0
    assert benchmark_docs.write(root) == [], "the same files give the same page"


def test_what_was_measured_twice_stands_side_by_side(root: Path) -> None:
    put(root, "full.json", decoded("full", perplexity=None, no_perplexity="random"))
    again = decoded()
    again["contexts"] = [point for point in again["contexts"] if point["context"] != 512]
    put(root, "on_another_device.json", decoded(device={"name": "Another"}))
    for point in again["contexts"]:
        point["modes"]["model"]["median_ms"] *= 1.1
    put(root, "decode.json", again)
    put(root, "of_another_length.json", decoded(new_tokens=8))
    put(root, "of_another_model.json", decoded(name="pythia-1b (random weights)"))
    put(root, "of_a_checkpoint.json", decoded(name="EleutherAI/pythia-2.8b"))
    put(
        root,
        "of_anothers_checkpoint.json",
        decoded("full", name="other/pythia-2.8b", perplexity=None, no_perplexity="random"),
    )
    wide = decoded()
    wide["model"] = {**wide["model"], "dtype": "bfloat16"}
    put(root, "of_another_dtype.json", wide)
    for kind, without in (("full", 0), ("decode", 1)):  # without a floor; at 16 or at 512 without our mode
        data = decoded(kind, perplexity=None, no_perplexity="random")
        data["model"] = {**data["model"], "dtype": "float32"}
        for point in data["contexts"]:
            point["floor_ms"] = None
            point["peers"] = data["contexts"][2]["peers"]
        del data["contexts"][without]["modes"]["model"]
        put(root, f"{kind}_without.json", data)
    said = page(*read_results(root))
    rows = [line for line in said.partition("## Measured twice")[2].splitlines() if " and [decode" in line]
    first = rows[0].partition(" | ")[0]
    assert (
        first.startswith("| pythia-2.8b, float16, random weights: [full 00000000](")
        and "full.json) (2026-11-24) and [decode 000" in first
    )
    ends = [row.partition(" | ")[2] for row in rows]
    assert ends == [
        "16 | 1.318 | 1.449 | +10.0% | – | – | – |",
        "1024 | 1.328 | 1.461 | +10.0% | 2.665 | 2.423 | -9.1% |",
        "1024 | – | – | – | 2.665 | 2.665 | +0.0% |",
    ]


@needs_matplotlib
def test_what_a_result_lacks_is_said(root: Path) -> None:
    times = decoded()
    times["contexts"][0]["peers"]["transformers eager"]["samples"] = 3
    put(root, "decode_pythia-2.8b.json", times)
    counts = {"prompts": 11, "identical_prompts": 11, "compared_tokens": 88, "same_tokens": 88}
    summary = {"passed": True, **counts, "divergences": {}, "bit_differences": 0}
    verified = {
        "summary": summary,
        "prompts": [{"text": None, "divergences": [divergence(2, -0.01, 0.02, 0.03)]}],
        "tokens": 8,
        "runs": 2,
        "modes": [{"name": "model"}],
        "interrupted": True,
    }
    put(root, "verify.json", evaluated("verify", **verified))
    put(root, "perplexity.json", evaluated("perplexity", **SCORED, interrupted=True))
    put(root, "quality.json", evaluated("quality", measures={}, positions=9, source="words", interrupted=True))
    alone = {"median_ms": 8.0, "p10_ms": 8.0, "p90_ms": 8.0, "ratio_to_transformers": None}
    loops = {"model": alone, "transformers": {"error": "out of memory"}}
    prefill = {"model": {"name": "x", "dtype": "float16"}, "runs": 5, "scope": "a wall", "interrupted": True}
    prompts = [{"prompt": 16, "loops": loops}]
    put(root, "prefill.json", {"benchmark": "prefill", "prompts": prompts, **prefill, **ORIGIN})
    assert benchmark_docs.main([], root) == 0
    said = (root / PAGE).read_text()
    assert "median of 5 runs (transformers eager, 3) of 128 tokens" in said
    assert "in each of model.\n\nNot in it: the run was interrupted." in said
    assert "float64 has our token in 0 and theirs in 1, by a margin of at most 1.0e-02" in said
    assert "99 tokens scored: a text.\n\nNot in it: the run was interrupted." in said
    assert "9 positions: words.\n\nNot in it: the run was interrupted." in said
    assert "Not in it: transformers at prompt 16: out of memory; the run was interrupted." in said


def test_contexts_that_a_run_did_not_come_to_are_named(root: Path) -> None:
    """Also where it was killed, and could not say so."""
    killed = decoded("full", perplexity=None, no_perplexity="not measured yet")
    del killed["contexts"][1:]
    put(root, "full.json", killed)
    loops = {"model": {"median_ms": 8.0, "p10_ms": 8.0, "p90_ms": 8.0, "ratio_to_transformers": None, "error": None}}
    prefill = {"model": {"name": "x", "dtype": "float16"}, "runs": 5, "scope": "a wall", "asked_prompts": [16, 128]}
    prefill |= {"prompts": [{"prompt": 16, "loops": loops}], "interrupted": False}
    put(root, "prefill.json", {"benchmark": "prefill", **prefill, **ORIGIN})
    said = page(*read_results(root))
    assert "; what was to be measured at 512, 1024.\n" in said
    assert "Not in it: what was to be measured at 128.\n" in said


@pytest.mark.parametrize("limit", [650.0, None])
def test_the_power_limit_is_said_where_it_is_known(root: Path, limit: float | None) -> None:
    put(root, "decode.json", decoded(device={"name": "NVIDIA Fabricated", "power_limit_watts": limit}))
    end = "; its limit is 650 W:" if limit else ":"
    assert f"GPU's power in these runs, prompts included, medians{end}\n" in page(*read_results(root))


def test_numbers_that_json_lacks(root: Path) -> None:
    losses = {path: dict.fromkeys(loss, "inf") for path, loss in LOSSES.items()}
    scored = SCORED | {"losses": losses, "not_finite": ["decode", "transformers"]}
    put(root, "perplexity.json", evaluated("perplexity", **scored))
    put(root, "full.json", decoded("full", perplexity=scored, no_perplexity=None))
    estimate = {"mean": "nan", "low": 0.125, "high": "inf"}
    measures = {"kl_nats": {"ours": estimate, "transformers": estimate, "difference": None}}
    spoiled = {"measures": measures, "positions": 9, "source": "words", "not_finite": ["ours", "transformers"]}
    put(root, "quality.json", evaluated("quality", **spoiled))
    summary = {"passed": False, "identical_prompts": 0, "prompts": 1, "divergences": {"error": 2}, "bit_differences": 0}
    summary |= {"same_tokens": 1, "compared_tokens": 2}
    parted: list[Any] = [
        divergence(1, 0.1, 0.2, 0.3),
        divergence(1, 0.1, 0.2, 0.3) | {"their_error": "inf", "our_error": "nan"},
    ]
    verified = {"summary": summary, "prompts": [{"text": None, "divergences": parted}], "tokens": 8, "runs": 2}
    put(root, "verify.json", evaluated("verify", **verified, modes=[{"name": "model"}]))
    said = page(*read_results(root))
    assert "| ours, token by token | inf | inf | inf |" in said
    assert said.count(" **Not finite:** ours, transformers.\n") == 1
    assert said.count(" **Not finite:** decode, transformers.\n") == 2, "of perplexity alone, and in bench full"
    assert "| kl_nats | nan [0.125, inf] | nan [0.125, inf] | – |" in said
    assert "off by at most nan there, theirs by inf." in said


@pytest.mark.parametrize("field", ["source_digest", "device", "model", "contexts", "runs", "left_out"])
def test_a_file_that_lacks_something_is_named(root: Path, capsys: pytest.CaptureFixture[str], field: str) -> None:
    data = decoded()
    for spoiled in ({**data, field: None}, {name: value for name, value in data.items() if name != field}):
        put(root, "decode.json", spoiled)
        assert benchmark_docs.main([], root) == 1
        assert f"benchmark_docs: {RESULTS}/decode.json is no result of decode: " in capsys.readouterr().err


def test_other_files_are_named_too(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(root, "verify.json", evaluated("verify"))
    assert benchmark_docs.main(["--check"], root) == 1
    assert f"{RESULTS}/verify.json is no result of verify: KeyError('summary')" in capsys.readouterr().err
    (root / RESULTS / "folder.json").mkdir()
    assert benchmark_docs.main([], root) == 1
    assert f"{RESULTS}/folder.json is not JSON: " in capsys.readouterr().err


@needs_matplotlib
def test_tables_of_what_no_loop_has_are_left_out(root: Path) -> None:
    times = decoded()
    for each in times["contexts"]:
        for loop in (*each["modes"].values(), *each["peers"].values()):
            loop["clocks"] = None
        each["peers"]["transformers eager"]["same_tokens"] = 0
    put(root, "decode_pythia-2.8b.json", times)
    assert benchmark_docs.main([], root) == 0
    said = (root / PAGE).read_text()
    assert "SMs' clock in MHz" not in said and "10th and 90th percentile of the runs" in said
    table = said.split("Tokens of peers before")[1].split("\n\n")[1].splitlines()[2:]
    assert table == ["| transformers eager | 0 | 0 | 0 |", "| transformers compile | – | – | 128 |"]
    assert "Every result of decoding above has the ceiling of its own run." in said
    without = [each | {"floor_ms": None} for each in times["contexts"]]
    put(root, "decode_pythia-2.8b.json", times | {"read_ceiling": None, "contexts": without})
    benchmark_docs.write(root)
    assert "has the ceiling of its own run" not in (root / PAGE).read_text()


@needs_matplotlib
@pytest.mark.parametrize(("with_peers", "drawn"), [((16, 512), 512), ((), 1024)], ids=["peers", "none"])
def test_the_readme_shows_peers_where_there_are_any(root: Path, with_peers: tuple[int, ...], drawn: int) -> None:
    put(root, "decode_pythia-2.8b.json", with_peers_at(*with_peers))
    assert benchmark_docs.main([], root) == 0
    assert f"with a context of {drawn} tokens" in (root / "README.md").read_text()


@needs_matplotlib
def test_the_readme_shows_most_models_beside_peers(root: Path) -> None:
    """One model without peers leaves the others theirs."""
    put(root, "decode_pythia-2.8b.json", decoded())
    put(root, "decode_llama-3.1-8b.json", with_peers_at(name="llama-3.1-8b (random weights)"))
    put(root, "decode_pythia-6.9b.json", with_peers_at(16, name="pythia-6.9b (random weights)"))
    assert benchmark_docs.main([], root) == 0
    assert "with a context of 16 tokens" in (root / "README.md").read_text()


@needs_matplotlib
def test_what_is_stale_is_named_and_mended(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(root, "decode_pythia-2.8b.json", decoded())
    assert benchmark_docs.main([], root) == 0
    changed = decoded()
    changed["contexts"][0]["modes"]["graph"]["median_ms"] = 1.9
    put(root, "decode_pythia-2.8b.json", changed)
    (root / FIGURES / "unwanted.svg").write_text("")
    capsys.readouterr()
    assert benchmark_docs.main(["--check"], root) == 1
    said = capsys.readouterr().err
    for path in (PAGE, FIGURES / "decode_pythia-2.8b_tpot.svg", OVERVIEW, FIGURES / "unwanted.svg"):
        assert f"benchmark_docs: {path} is stale; run: python3 scripts/benchmark_docs.py" in said
    assert "README.md" not in said, "it holds no number of that context"
    benchmark_docs.write(root)
    assert benchmark_docs.main(["--check"], root) == 0
    assert not (root / FIGURES / "unwanted.svg").exists()
    (root / PAGE).write_text((root / PAGE).read_text().replace("1.900", "1.500"))
    assert benchmark_docs.main(["--check"], root) == 1


def test_a_readme_without_its_marks_is_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "README.md").write_text("# Name\n")
    assert benchmark_docs.main(["--check"], root) == 1
    assert "README.md must hold these two lines" in capsys.readouterr().err


def test_missing_matplotlib_writes_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise ClusterFusionError("plots need matplotlib")

    put(root, "decode_pythia-2.8b.json", decoded())
    monkeypatch.setattr(benchmark_docs.plots, "require_matplotlib", missing)
    assert benchmark_docs.main([], root) == 1
    assert capsys.readouterr().err == "benchmark_docs: plots need matplotlib\n"
    assert not (root / PAGE).exists() and not (root / FIGURES).exists()


def test_ratios_that_were_measured_twice_are_the_same_within_a_twentieth() -> None:
    """Of the committed files, for every model: ours over the floor, and torch.compile over ours. After a change that
    shows, both are measured again."""
    results, _ = read_results()
    compared = [*measured_twice(results)]
    models = {file.model for file in of_kind(results, "full")}
    assert len(models) >= 9
    for ratios_of in (operator.attrgetter("over_floor"), operator.attrgetter("over_compiled")):
        assert {twice.files[0].model for twice in compared if ratios_of(twice)} == models
    for twice in compared:
        for ratios in filter(None, (twice.over_floor, twice.over_compiled)):
            assert abs(change(ratios)) <= 0.05, f"{twice.files[1].path} at {twice.points[0].context}: {ratios}"


def test_every_committed_result_is_one_that_the_page_knows() -> None:
    results, others = read_results(ROOT)
    assert results and not others
    for file in results:
        assert len(file.origin["source_digest"]) == 64
        assert file.origin["command"].startswith("clusterfusion ")
