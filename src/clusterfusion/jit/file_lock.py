"""A lock between processes that cannot outlive its holder: the system frees it when the process ends, however it ends."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_POLL_SECONDS = 0.02

if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: IO[bytes]) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

    def _unlock(file: IO[bytes]) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _try_lock(file: IO[bytes]) -> None:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(file: IO[bytes]) -> None:
        fcntl.flock(file.fileno(), fcntl.LOCK_UN)


@contextlib.contextmanager
def file_lock(path: Path, timeout_seconds: float) -> Iterator[bool]:
    """Holds the lock on `path`, made if need be, and yields True; yields False if another holds it beyond the timeout,
    or the file system has no locks. Raises OSError when the file cannot be opened.

    The file stays: removing it would let two processes hold locks on two files of the same name.
    """
    with open(path, "ab") as file:
        held = _acquire(file, timeout_seconds)
        try:
            yield held
        finally:
            if held:
                _unlock(file)


def _acquire(file: IO[bytes], timeout_seconds: float) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            _try_lock(file)
            return True
        except OSError as error:
            # Anything else than "another process holds it" says that this file system has no locks: nothing to wait for.
            if not isinstance(error, (BlockingIOError, PermissionError)) or time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
