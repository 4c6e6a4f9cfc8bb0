"""The results of `bench full` as data, JSON, lines and Markdown: `bench decode`'s, and perplexity."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from clusterfusion.bench import perplexity_report
from clusterfusion.bench.decode import report as decode_report
from clusterfusion.bench.decode import tables
from clusterfusion.bench.decode.report import DecodeReport
from clusterfusion.bench.perplexity import PerplexityReport

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class FullReport:
    """One run: either a perplexity, or why there is none."""

    decode: DecodeReport
    perplexity: PerplexityReport | None
    no_perplexity: str | None

    @property
    def interrupted(self) -> bool:
        return self.decode.interrupted or (self.perplexity is not None and self.perplexity.interrupted)

    @property
    def passed(self) -> bool:
        """Whether our modes have the same tokens, and our perplexity is finite where there is one."""
        return not self.decode.differences and (self.perplexity is None or self.perplexity.passed)


def to_json(report: FullReport) -> dict[str, Any]:
    """The report as JSON values: those of `bench decode`, with "perplexity" and "no_perplexity" beside them."""
    scored = None
    if report.perplexity is not None:
        scored = perplexity_report.to_json(report.perplexity)
        facts = scored.pop("facts")  # of the same run; only what was scored with is new
        scored |= {"mode": facts["mode"], "transformers_weights": facts["transformers_weights"]}
    return decode_report.to_json(report.decode) | {
        "benchmark": "full",
        "interrupted": report.interrupted,
        "perplexity": scored,
        "no_perplexity": report.no_perplexity,
    }


def report_tables(report: FullReport) -> list[Table]:
    """Times, and costs of the text where it was scored."""
    scored = [perplexity_report.table(report.perplexity)] if report.perplexity is not None else []
    return [tables.table(report.decode), *scored]


def perplexity_lines(report: FullReport) -> list[str]:
    """What was scored and what came of it, or why nothing was."""
    if report.perplexity is None:
        return [f"perplexity left out: {report.no_perplexity}"]
    costs = "; ".join(
        f"{perplexity_report.NAMES[path]} {loss.perplexity:.5f}" for path, loss in report.perplexity.losses.items()
    )
    return [f"perplexity: {costs}", *perplexity_report.lines(report.perplexity)]


def lines(report: FullReport) -> list[str]:
    return [*tables.lines(report.decode), *perplexity_lines(report)]


def markdown(report: FullReport) -> str:
    return tables.markdown(report.decode, perplexity_lines(report))
