"""The results of `verify` as lines, a table and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clusterfusion.bench import evaluation
from clusterfusion.bench.divergence import BitDifference
from clusterfusion.bench.verify import VerifyReport

if TYPE_CHECKING:
    from rich.table import Table


def summary(report: VerifyReport) -> dict[str, Any]:
    """The counts that a reader wants first. `compared_tokens` are new tokens up to and with the first difference."""
    verdicts = [found.verdict for found in report.divergences]
    first = [prompt.same_tokens for prompt in report.prompts]
    return {
        "passed": report.passed,
        "prompts": len(report.prompts),
        "identical_prompts": sum(same == report.tokens for same in first),
        "compared_tokens": sum(min(same + 1, report.tokens) for same in first),
        "same_tokens": sum(first),
        "largest_difference": max(prompt.largest_difference for prompt in report.prompts),
        "divergences": {verdict: verdicts.count(verdict) for verdict in ("tie", "ours is right", "error")},
        "bit_differences": len(report.bit_differences),
    }


def to_json(report: VerifyReport) -> dict[str, Any]:
    """The report as JSON values, its summary first."""
    made = evaluation.to_json("verify", report)
    return {"evaluation": made.pop("evaluation"), "summary": evaluation.plain(summary(report))} | made


def table(report: VerifyReport) -> Table:
    """A row for every prompt that parted from transformers."""
    from rich.table import Table

    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    made.add_column("prompt", no_wrap=True)
    made.add_column("mode", no_wrap=True)
    for name in ("tokens", "step", "ours", "theirs", "float64 best", "margin", "our error", "their error"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("verdict", no_wrap=True)
    for prompt in report.prompts:
        for found in prompt.divergences:
            made.add_row(
                prompt.label,
                found.mode,
                str(found.prompt_tokens),
                str(found.step),
                str(found.ours.token),
                str(found.theirs.token),
                str(found.best_token),
                f"{found.margin:.3e}",
                f"{found.our_error:.2e}",
                f"{found.their_error:.2e}",
                found.verdict,
            )
    return made


def lines(report: VerifyReport) -> list[str]:
    """The verdict in words, below the table."""
    facts = summary(report)
    modes = ", ".join(choice.name for choice in report.modes)
    compared = len(report.modes) * report.runs
    cut = f" (interrupted; {report.asked_prompts} were asked for)" if report.interrupted else ""
    said = [
        f"tokens: {facts['identical_prompts']} of {facts['prompts']} prompts{cut} identical to transformers over "
        f"{report.tokens} tokens; {facts['same_tokens']} of {facts['compared_tokens']} compared tokens the same",
        f"logits: at most {facts['largest_difference']:.2e} from transformers' where the prefix is the same",
        "divergences: " + ", ".join(f"{count} {verdict}" for verdict, count in facts["divergences"].items()),
    ]
    if report.no_texts:
        said.insert(0, f"prompts: random tokens alone, since {report.no_texts}")
    if compared == 1:
        said.append(f"bits: one run of one mode ({modes}), so nothing to compare; ask for --runs 2 or more modes")
    elif not report.bit_differences:
        said.append(f"bits: logits of {report.runs} runs in each of {modes} are equal to the bit")
    else:
        said.append(
            f"bits: {len(report.bit_differences)} decodings differ from the first run of {report.modes[0].name}"
        )
        for prompt in report.prompts:
            said += [f"  {prompt.label}: {_bits(found)}" for found in prompt.bit_differences]
    verdict = "PASSED" if report.passed else "FAILED"
    return [*said, f"{verdict}{' so far' if report.interrupted else ''}"]


def _bits(found: BitDifference) -> str:
    return (
        f"{found.mode} run {found.run}, step {found.step}, logit {found.coordinate}: {found.value!r} (bytes {found.bytes}) "
        f"instead of {found.first_value!r} (bytes {found.first_bytes}); {found.differing} logits of this step differ"
    )
