"""The lock between processes, where the file system is not what one hopes for."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import IO

import pytest

from clusterfusion.jit import file_lock as locking


def failing(code: int) -> object:
    def try_lock(_: IO[bytes]) -> None:
        raise OSError(code, "from the test")

    return try_lock


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(locking, "_try_lock", failing(code))
    start = time.monotonic()
    with locking.file_lock(tmp_path / "key.lock", 20) as held:
        assert not held
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EACCES])
def test_another_holder_is_waited_for_until_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(locking, "_try_lock", failing(code))
    start = time.monotonic()
    with locking.file_lock(tmp_path / "key.lock", 0.3) as held:
        assert not held
    assert time.monotonic() - start >= 0.3


def test_a_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "key.lock"

    def fail_inside() -> None:
        with locking.file_lock(path, 1) as held:
            assert held
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail_inside()
    with locking.file_lock(path, 0) as held:
        assert held
