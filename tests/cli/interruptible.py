"""A command that a test can interrupt, however the tests were started."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping


def start(*arguments: str, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """`clusterfusion` with those arguments, both outputs piped; SIGINT ends it. nohup and a shell's background make a test run
    ignore that signal, and what it starts would inherit that: every run here stands in that condition, and the child leaves it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "clusterfusion", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    finally:
        signal.signal(signal.SIGINT, before)
