"""What callers pass: numbers, Python's, NumPy's and one-element tensors alike, and tensors. Anything else is named and
refused, in one sentence: what came, and what is needed."""

from __future__ import annotations

import contextlib
import math
import operator

import torch
from torch import Tensor

from clusterfusion.errors import ArgumentError


def require(name: str, seen: object, ok: bool, needed: str) -> None:
    """Raise ArgumentError unless `ok`."""
    if not ok:
        raise ArgumentError(f"{name} is {seen}; it must be {needed}")


def require_dense(name: str, value: object, needed: str = "a tensor") -> None:
    """Raise ArgumentError unless `value` is a tensor whose elements lie in memory by strides: no sparse or other layout."""
    if not isinstance(value, Tensor):
        raise ArgumentError(f"{name} is a {type(value).__name__}; it must be {needed}")
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise ArgumentError(f"{name} is of layout {layout}; it must be {needed} of layout torch.strided")


def require_not_negated(name: str, tensor: Tensor) -> None:
    """Raise ArgumentError if `tensor` shows what lies in memory negated (`Tensor.is_neg`). torch.compile cannot follow this."""
    if tensor.is_neg():
        raise ArgumentError(
            f"{name} is a negated view; it must be a tensor whose elements lie in memory, as of {name}.resolve_neg()"
        )


def as_int(name: str, value: object, least: int, most: int, needed: str | None = None) -> int:
    """`value` as an int from `least` to `most`. Raises ArgumentError naming the argument, what came and what is `needed`."""
    number = index_of(value)
    if number is None or not least <= number <= most:
        raise ArgumentError(f"{name} is {shown(value)}; it must be {needed or f'an int from {least} to {most}'}")
    return number


def as_float(name: str, value: object, needed: str) -> float:
    """`value` as a finite float. Raises ArgumentError, which says that it must be `needed`."""
    number = math.nan
    if type(value) is float:  # apart, so that torch.compile can follow
        number = value
    elif not isinstance(value, (str, bytes)) and not _is_bool(value):
        with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError, NotImplementedError):
            number = float(value)  # type: ignore[arg-type]
    if -math.inf < number < math.inf:
        return number
    raise ArgumentError(f"{name} is {shown(value)}; it must be {needed}")


def index_of(value: object) -> int | None:
    """An integer as an int, whatever library it comes from; None for anything else, bools among it."""
    if type(value) is int:  # apart, so that torch.compile can follow
        return value
    if _is_bool(value):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, NotImplementedError):  # the last two: tensors without a value
        return None


def shown(value: object) -> str:
    """As messages show it: not at length."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes out
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def _is_bool(value: object) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
