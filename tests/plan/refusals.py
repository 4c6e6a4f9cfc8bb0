"""What a refused plan may say."""

from __future__ import annotations

import re


def check_refusal(reason: str) -> None:
    """That a model is refused for too many heads or too little shared memory, and that the figures bear it out."""
    if "need as many CTAs" in reason:
        return
    figures = re.search(r"needs (\d+) bytes of shared memory a block; .* has (\d+)", reason)
    assert figures and int(figures[1]) > int(figures[2]), reason
