"""Numbers from callers: Python's, NumPy's and one-element tensors alike; anything else is named and refused."""

from __future__ import annotations

import math
import operator

from clusterfusion.errors import ArgumentError


def as_int(name: str, value: object, least: int, most: int) -> int:
    """`value` as an int from `least` to `most`. Raises ArgumentError naming the argument, what came and what is needed."""
    number = _index(value)
    if number is None or not least <= number <= most:
        raise ArgumentError(f"{name} is {_shown(value)}; it must be an int from {least} to {most}")
    return number


def as_float(name: str, value: object, needed: str) -> float:
    """`value` as a finite float. Raises ArgumentError, which says that it must be `needed`."""
    if not isinstance(value, (str, bytes, bool)):
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError, RuntimeError, NotImplementedError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise ArgumentError(f"{name} is {_shown(value)}; it must be {needed}")


def _index(value: object) -> int | None:
    if isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, NotImplementedError):  # the last two: tensors without a value
        return None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
