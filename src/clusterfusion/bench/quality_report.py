"""The results of `quality` as a table, lines and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clusterfusion.bench import evaluation
from clusterfusion.bench.agreement import Estimate
from clusterfusion.bench.quality import QualityReport

if TYPE_CHECKING:
    from rich.table import Table

NAMES = {
    "greedy_match": "greedy token match",
    "top_1": "top-1 agreement",
    "top_5": "top-5 agreement",
    "top_10": "top-10 agreement",
    "logits_mae": "logits MAE",
    "kl_nats": "KL divergence, nats",
    "hidden_mae": "hidden state MAE",
}
NOTE = (
    "Each side against the float64 reference, teacher-forced, token by token. In brackets: 95% bootstrap intervals over "
    "positions. Hidden state: what the final norm reads. KL: of the reference's distribution from the side's, in float64."
)
ROUNDED = "ours, rounded"
ROUNDED_NOTE = (
    "transformers gives logits in its dtype, and that rounding is in its figures; our kernels give float32. 'ours, rounded' is "
    "with ours rounded to the same dtype."
)


def to_json(report: QualityReport) -> dict[str, Any]:
    """The report as JSON values."""
    return evaluation.to_json("quality", report) | {"not_finite": list(report.not_finite)}


def table(report: QualityReport) -> Table:
    """A row for every measure: ours, transformers', and the difference."""
    from rich.table import Table

    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    made.add_column("measure", no_wrap=True)
    with_rounded = report.logits_max.rounded is not None
    for name in ("ours", *[ROUNDED] * with_rounded, "transformers", "ours - transformers"):
        made.add_column(name, justify="right", no_wrap=True)
    for name, measure in report.measures.items():
        of_logits = [_shown(measure.rounded) if name != "hidden_mae" else ""] * with_rounded
        made.add_row(
            NAMES[name], _shown(measure.ours), *of_logits, _shown(measure.transformers), _shown(measure.difference)
        )
        if name == "logits_mae":
            largest = report.logits_max
            of_logits = [] if largest.rounded is None else [f"{largest.rounded:.3e}"]
            made.add_row("logits, largest error", f"{largest.ours:.3e}", *of_logits, f"{largest.transformers:.3e}", "")
    return made


def _shown(estimate: Estimate | None) -> str:
    if estimate is None:
        return "not to be had"
    return f"{estimate.mean:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def lines(report: QualityReport) -> list[str]:
    """What the table stands on, and what it leaves out."""
    cut = f" of {report.asked_tokens}, interrupted" if report.interrupted else ""
    said = [f"{report.positions} positions{cut}: {report.source}"]
    if report.hidden_note is not None:
        said.append(f"our hidden state is left out: {report.hidden_note}")
    if report.logits_max.rounded is not None:
        said.append(ROUNDED_NOTE)
    return said + [evaluation.not_finite(ROUNDED if side == "rounded" else side) for side in report.not_finite]
