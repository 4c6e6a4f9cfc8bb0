"""The command line: `clusterfusion generate | info | models | verify | quality | perplexity | bench`."""

from __future__ import annotations

import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """`clusterfusion.cli.app.main`, and one line for Ctrl-C while it is being imported."""
    try:
        from clusterfusion.cli.app import main as run
    except KeyboardInterrupt:
        print("clusterfusion: interrupted", file=sys.stderr)
        sys.exit(130)
    run()
