"""The progress bar keeps out of the way where nobody could see it."""

from __future__ import annotations

import sys

import pytest

import clusterfusion
from clusterfusion.engine.progress import progress_bar


def test_a_process_without_a_stderr_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar("loading", 10) as on_bytes:
        on_bytes(10)
    assert clusterfusion.load("demo", device="cpu").generate("It", 2).token_ids
