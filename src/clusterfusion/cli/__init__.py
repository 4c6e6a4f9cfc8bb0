"""The command line: `clusterfusion generate | info | models`."""

from clusterfusion.cli.app import main

__all__ = ["main"]
