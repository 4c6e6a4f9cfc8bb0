"""The results of `perplexity` as a table, lines and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clusterfusion.bench import evaluation
from clusterfusion.bench.perplexity import PerplexityReport

if TYPE_CHECKING:
    from rich.table import Table

NAMES = {
    "decode": "ours, decoding token by token",
    "prefill": "ours, prefill",
    "transformers": "transformers",
}


def to_json(report: PerplexityReport) -> dict[str, Any]:
    """The report as JSON values."""
    return evaluation.to_json("perplexity", report) | {"not_finite": list(report.not_finite)}


def table(report: PerplexityReport) -> Table:
    """A row for every path, then one for every difference."""
    from rich.table import Table

    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    made.add_column("path", no_wrap=True)
    for name in ("nats/token", "perplexity", "bits/byte", "largest |nats| of a token"):
        made.add_column(name, justify="right", no_wrap=True)
    for path, loss in report.losses.items():
        made.add_row(
            NAMES[path], f"{loss.nats_per_token:.6f}", f"{loss.perplexity:.5f}", f"{loss.bits_per_byte:.5f}", ""
        )
    for pair, difference in report.differences.items():
        made.add_row(
            pair, f"{difference.mean_nats:+.2e}", f"{difference.perplexity:+.2e}", "", f"{difference.largest_nats:.2e}"
        )
    return made


def lines(report: PerplexityReport) -> list[str]:
    """What the table stands on."""
    cut = f" of {report.asked_windows} (interrupted)," if report.interrupted else ""
    said = [
        f"scored: {report.scored_tokens} tokens, {report.scored_bytes} bytes; windows: {report.windows}{cut} of up to "
        f"{report.window} tokens, stride {report.stride}; {report.source}"
    ]
    return said + [evaluation.not_finite(NAMES[path]) for path in report.not_finite]
