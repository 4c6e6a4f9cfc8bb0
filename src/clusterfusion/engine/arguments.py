"""`clusterfusion.arguments` under the name by which the engine and the benchmarks know it."""

from clusterfusion.arguments import as_float, as_int

__all__ = ["as_float", "as_int"]
