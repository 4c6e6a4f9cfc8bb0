"""The CUDA sources of this package, and what a program includes."""

from __future__ import annotations

import re
from pathlib import Path

from clusterfusion.errors import CompileError

CUDA_ROOT = Path(__file__).resolve().parent.parent / "cuda"

# Ours are included in quotes; <...> is the toolchain's, whose version is part of the cache key instead of its text.
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)


def source_closure(entry: str, root: Path = CUDA_ROOT) -> dict[str, str]:
    """The text of `entry` and of all it includes in quotes, directly or not, by path relative to `root`, sorted.

    An include is looked up beside the file that names it, then under `root`, as the compiler does. Includes inside
    comments or `#if` count too: the closure may be larger than what is compiled, never smaller.
    Raises CompileError when a file is missing, naming the file that includes it and the line.
    """
    found: dict[str, str] = {}
    pending = [(entry, "the caller")]
    while pending:
        name, included_by = pending.pop()
        if name in found:
            continue
        try:
            text = (root / name).read_text(encoding="utf-8")
        except OSError as error:
            raise CompileError(f"cannot read {root / name}, included by {included_by}: {error.strerror}") from error
        found[name] = text
        for match in _INCLUDE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            pending.append((_resolve(match.group(1), Path(name).parent, root), f"{root / name}:{line}"))
    return dict(sorted(found.items()))


def _resolve(include: str, folder: Path, root: Path) -> str:
    beside = root / folder / include
    target = beside if beside.is_file() else root / include
    try:
        return target.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        return target.as_posix()  # outside the root: an absolute path, which `root / name` leaves as it is
