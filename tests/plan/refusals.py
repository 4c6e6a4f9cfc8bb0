"""What a refused plan may say."""

from __future__ import annotations

import re

from clusterfusion.architecture import DecoderConfig
from clusterfusion.plan import PlanLimits

AMPLE_BYTES = 200_000
ORDINARY_SIZE = 2048  # with ample shared memory, no vector up to this long is too long


def check_refusal(reason: str, config: DecoderConfig, limits: PlanLimits) -> None:
    """That a model is refused for too many heads or too little shared memory, and that the figures bear it out."""
    if figures := re.match(
        r"(\d+) (?:heads|bundles of (\d+) heads) need as many CTAs, of which there are (\d+): ", reason
    ):
        bundles, queries, ctas = (int(figure or 1) for figure in figures.groups())
        assert ctas == min(limits.multiprocessors, config.hidden_size) // 2 * 2, reason
        assert bundles > ctas and bundles * queries == config.num_heads, reason
        return
    figures = re.match(
        r"hidden_size (\d+), (\d+) heads of (\d+) and intermediate_size (\d+) need (\d+) bytes of shared memory a block; .* has (\d+)$",
        reason,
    )
    assert figures, reason
    *sizes, needed, there = map(int, figures.groups())
    assert sizes == [config.hidden_size, config.num_heads, config.head_dim, config.intermediate_size], reason
    assert needed > there == limits.shared_bytes_per_block, reason
    if there > AMPLE_BYTES:
        assert max(config.hidden_size, config.q_size, config.intermediate_size) > ORDINARY_SIZE, reason
