"""verify on tiny checkpoints: what is sound passes, and every fabricated fault gets its class."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_gpt_neox, tiny_model
from torch import Tensor

from clusterfusion.bench import verify as module
from clusterfusion.bench.evaluation import Sides, load_sides
from clusterfusion.bench.verify import VerifyReport, make_prompts, resolve_modes, verify
from clusterfusion.bench.verify_report import lines, summary, table, to_json
from clusterfusion.engine import Session
from clusterfusion.engine.loading import demo_folder
from clusterfusion.errors import ArgumentError, ClusterFusionError

TOKENS = 8


@pytest.fixture(params=["gpt_neox", "llama"])
def sides(request: pytest.FixtureRequest, tmp_path: Path) -> Sides:
    tiny_model(request.param, vocab_size=257).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder() / name, tmp_path)
    return load_sides(str(tmp_path), device="cpu")


def run(sides: Sides, said: list[str] | None = None, **options: int | str) -> VerifyReport:
    settings: dict[str, int | str] = {"prompts": 4, "tokens": TOKENS} | options
    return verify(sides, ([] if said is None else said).append, **settings)  # type: ignore[arg-type]


def change_steps(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, int, Tensor], Tensor]) -> None:
    """Sessions return `change(session's number, step of it, logits)`."""
    made = 0

    class Changed(Session):
        def __init__(self, *arguments: object) -> None:
            nonlocal made
            super().__init__(*arguments)  # type: ignore[arg-type]
            self.number = made
            self.steps = 0
            made += 1

        def step(self, token: int) -> Tensor:
            self.steps += 1
            return change(self.number, self.steps, super().step(token))

    monkeypatch.setattr(module, "Session", Changed)


def test_a_sound_engine_passes(sides: Sides) -> None:
    said: list[str] = []
    report = run(sides, said, modes="auto,reference", runs=3, command="clusterfusion verify x")
    assert report.passed
    assert not report.interrupted
    assert [choice.name for choice in report.modes] == ["reference"]  # auto is the same one
    assert [prompt.same_tokens for prompt in report.prompts] == [TOKENS] * 4
    assert [prompt.label for prompt in report.prompts] == ["text 0", "random 0", "text 1", "random 1"]
    assert len(said) == 4
    counts = summary(report)
    assert (counts["passed"], counts["identical_prompts"], counts["compared_tokens"]) == (True, 4, 4 * TOKENS)
    assert 0 <= counts["largest_difference"] < 1e-3
    written = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert written["facts"]["command"] == "clusterfusion verify x"
    assert written["facts"]["device"]["threads"] > 0
    assert len(written["facts"]["source_digest"]) == 64
    assert written["facts"]["versions"]["transformers"]
    assert written["rule"] == report.rule
    assert lines(report)[-1] == "PASSED"


def test_a_biased_engine_is_an_error(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias large enough to change the token must not excuse itself as a measured error."""

    def bias(number: int, step: int, logits: Tensor) -> Tensor:
        logits[7] += 30 if step % (TOKENS - 1) == 3 else 0
        return logits

    change_steps(monkeypatch, bias)
    report = run(sides)
    assert not report.passed
    assert not report.bit_differences  # wrong, but the same every time
    assert {(found.step, found.ours.token, found.verdict) for found in report.divergences} == {(3, 7, "error")}
    for found in report.divergences:
        assert found.margin < 0
        assert found.our_error == pytest.approx(30, rel=1e-3)
        assert found.their_error < 1e-3
        assert found.ours.ours - found.ours.reference == pytest.approx(30, rel=1e-3)
    assert lines(report)[-1] == "FAILED"
    assert table(report).row_count == 4


def test_biased_peers_leave_us_right(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = sides.peer.greedy

    def biased(ids: tuple[int, ...], tokens: int) -> tuple[list[int], Tensor]:
        chosen, logits = greedy(ids, tokens)
        logits[5, 9] += 40
        chosen[5] = 9
        return chosen, logits

    monkeypatch.setattr(sides.peer, "greedy", biased)
    report = run(sides)
    assert report.passed
    assert {(found.step, found.verdict) for found in report.divergences} == {(5, "ours is right")}
    assert all(found.margin > 0 and found.best_token == found.ours.token for found in report.divergences)
    assert lines(report)[-1] == "PASSED"


def test_rounding_between_equal_tokens_is_a_tie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens with the same row of the LM head: one bit decides."""
    model = tiny_gpt_neox()
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[1::2] = head[0::2][: len(head[1::2])]
    model.save_pretrained(tmp_path)
    sides = load_sides(str(tmp_path), device="cpu")

    def up(number: int, step: int, logits: Tensor) -> Tensor:
        logits[1::2] = torch.nextafter(logits[1::2], torch.tensor(torch.inf))
        return logits

    change_steps(monkeypatch, up)
    report = run(sides)
    assert report.passed
    assert report.divergences
    for found in report.divergences:
        assert (found.margin, found.verdict) == (0.0, "tie")
        assert found.ours.token == found.theirs.token + 1


def test_another_bit_in_another_run_is_found(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[tuple[float, float]] = []

    def flip(number: int, step: int, logits: Tensor) -> Tensor:
        if number == 2 and step == 4:
            before = float(logits[11])
            logits[11] = torch.nextafter(logits[11], torch.tensor(torch.inf))
            changed.append((before, float(logits[11])))
        return logits

    change_steps(monkeypatch, flip)
    report = run(sides, runs=3)
    assert not report.passed
    assert not report.divergences  # the tokens are the same
    (found,) = report.bit_differences
    assert (found.run, found.mode, found.step, found.coordinate, found.differing) == (2, "reference", 4, 11, 1)
    assert (found.first_value, found.value) == changed[0]
    assert found.first_bytes != found.bytes
    assert len(found.bytes) == 8
    assert any("reference run 2, step 4, logit 11" in line and found.bytes in line for line in lines(report))


def test_logits_that_are_not_finite_pass_nothing(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest of them is the same token on both sides."""

    def overflow(number: int, step: int, logits: Tensor) -> Tensor:
        return logits * math.nan if step % (TOKENS - 1) == 3 else logits

    change_steps(monkeypatch, overflow)
    with pytest.raises(
        ClusterFusionError, match="mode reference, prompt .*: the model's logits are not finite at new token 3"
    ):
        run(sides)


def test_what_json_lacks_is_text_in_the_summary_too(sides: Sides) -> None:
    report = run(sides, prompts=1)
    apart = dataclasses.replace(report.prompts[0], largest_difference=math.inf)
    written = json.dumps(to_json(dataclasses.replace(report, prompts=(apart,))), allow_nan=False)
    assert json.loads(written)["summary"]["largest_difference"] == "inf"


def test_one_run_is_nothing_to_compare(sides: Sides) -> None:
    assert any("so nothing to compare" in line for line in lines(run(sides, runs=1, prompts=1)))


def test_interrupted_it_keeps_what_is_done(sides: Sides) -> None:
    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            raise KeyboardInterrupt

    report = verify(sides, stop, prompts=4, tokens=TOKENS)
    assert report.interrupted
    assert len(report.prompts) == 2
    assert lines(report)[-1] == "PASSED so far"
    assert "interrupted; 4 were asked for" in lines(report)[0]

    def stop_at_once(ids: object, tokens: int) -> None:
        raise KeyboardInterrupt

    sides.peer.greedy = stop_at_once  # type: ignore[assignment, method-assign]
    with pytest.raises(KeyboardInterrupt):
        verify(sides, said.append, prompts=4, tokens=TOKENS)


def test_prompts_fit_and_need_no_tokenizer(sides: Sides) -> None:
    prompts = make_prompts(sides.engine, 40, 50)
    assert len(prompts) == 40
    assert max(len(prompt.ids) for prompt in prompts) == 50
    assert {len(prompt.ids) for prompt in prompts if prompt.text is None} == {1, 2, 7, 16, 33, 50}
    sides.engine.tokenizer = None
    assert all(prompt.text is None for prompt in make_prompts(sides.engine, 5, 50))


def test_texts_that_are_left_out_are_said(sides: Sides) -> None:
    assert run(sides, prompts=1, runs=1).no_texts is None
    sides.engine.tokenizer = None
    report = run(sides, prompts=1, runs=1)
    assert report.no_texts == f"{sides.engine.name} has no tokenizer"
    assert lines(report)[0] == f"prompts: random tokens alone, since {report.no_texts}"
    assert to_json(report)["no_texts"] == report.no_texts


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"modes": "fastest"}, "modes is 'fastest'; it must be 'auto' or names from 'reference'"),
        ({"modes": "reference,"}, "modes is 'reference,'; it must be"),
        ({"modes": "graph"}, "mode is 'graph', which cannot run here"),
        ({"prompts": 0}, "prompts is 0; it must be an int from 1"),
        ({"tokens": 128}, "tokens is 128; it must be an int from 1 to 127"),
        ({"runs": 0}, "runs is 0; it must be an int from 1"),
    ],
)
def test_bad_options(sides: Sides, options: dict[str, int | str], expected: str) -> None:
    with pytest.raises(ArgumentError, match=expected):
        run(sides, **options)


def test_modes_resolve_in_the_order_asked_for(sides: Sides) -> None:
    (choice,) = resolve_modes(" reference , auto", sides.engine)
    assert (choice.name, choice.reason) == ("reference", "as asked")
