"""The cache of compiled programs: two processes at once, corruption, folders that cannot be written, changed sources."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from clusterfusion.jit import cache as caching
from clusterfusion.jit.cache import ProgramCache, cache_key
from clusterfusion.jit.compiler import CompiledProgram, KernelSource
from clusterfusion.jit.file_lock import file_lock
from clusterfusion.jit.toolchain import find_toolchain

ARCHITECTURE = "sm_90a"
SOURCE = KernelSource("scale.cu", ("scale",))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small tree of sources: a program, a header it includes, and one it does not."""
    folder = tmp_path / "cuda"
    (folder / "ops").mkdir(parents=True)
    (folder / "scale.cu").write_text(
        '#include "ops/factor.cuh"\n__global__ void scale(float* x) { x[threadIdx.x] *= kFactor; }\n'
    )
    (folder / "ops" / "factor.cuh").write_text("#pragma once\nconstexpr float kFactor = 2.0f;\n")
    (folder / "ops" / "unrelated.cuh").write_text("constexpr int kUnrelated = 1;\n")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def counts(cache: ProgramCache) -> tuple[int, int, int, int]:
    s = cache.statistics
    return s.memory_hits, s.disk_hits, s.compilations, s.corrupt_entries


def entry_of(folder: Path) -> Path:
    (entry,) = (path for path in folder.iterdir() if path.is_dir())
    return entry


def test_memory_then_disk(root: Path, folder: Path) -> None:
    first = ProgramCache(folder)
    program = first.get(SOURCE, ARCHITECTURE, root)
    assert first.get(SOURCE, ARCHITECTURE, root) is program
    assert counts(first) == (1, 0, 1, 0)
    second = ProgramCache(folder)
    assert second.get(SOURCE, ARCHITECTURE, root) == program
    assert counts(second) == (0, 1, 0, 0)
    assert program.cubin.startswith(b"\x7fELF")
    assert not list(folder.glob("*.new")), "unfinished entries were left behind"


_COMPILE = """
import dataclasses, hashlib, json, sys
from pathlib import Path
from clusterfusion.jit.cache import ProgramCache
from clusterfusion.jit.compiler import KernelSource
from clusterfusion.jit.toolchain import find_toolchain
find_toolchain()
cache = ProgramCache(Path(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
program = cache.get(KernelSource("scale.cu", ("scale",)), "sm_90a", Path(sys.argv[1]))
print(json.dumps([dataclasses.astuple(cache.statistics), hashlib.sha256(program.cubin).hexdigest()]))
"""


def test_two_processes_at_once_compile_once(root: Path, folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(caching.__file__).parents[2])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _COMPILE, str(root), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    for process in processes:  # both have imported everything: they start within microseconds
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert sorted(statistics for statistics, _ in results) == [[0, 0, 1, 0], [0, 1, 0, 0]]
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("file", ["program.cubin", "entry.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "removed"])
def test_a_corrupt_entry_is_deleted_and_compiled_again(root: Path, folder: Path, file: str, damage: str) -> None:
    program = ProgramCache(folder).get(SOURCE, ARCHITECTURE, root)
    path = entry_of(folder) / file
    data = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        changed = bytearray(data)
        changed[len(data) // 2] ^= 0x20
        path.write_bytes({"truncated": data[: len(data) // 2], "flipped": bytes(changed), "empty": b""}[damage])
    cache = ProgramCache(folder)
    assert cache.get(SOURCE, ARCHITECTURE, root) == program
    assert counts(cache) == (0, 0, 1, 1)
    again = ProgramCache(folder)
    assert again.get(SOURCE, ARCHITECTURE, root) == program
    assert counts(again) == (0, 1, 0, 0), "the entry was not written anew"


def warned_once(cache: ProgramCache, root: Path) -> CompiledProgram:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = cache.get(SOURCE, ARCHITECTURE, root)
        cache.get(KernelSource("scale.cu", ("scale",)), "sm_100a", root)
    assert len(caught) == 1
    assert issubclass(caught[0].category, RuntimeWarning)
    assert caching.CACHE_VARIABLE in str(caught[0].message)
    return program


def test_a_folder_that_cannot_be_made(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = ProgramCache(tmp_path / "file" / "cache")
    assert warned_once(cache, root).cubin
    assert cache.statistics.compilations == 2


def test_a_read_only_folder(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so a read-only file system is imitated; what is already there can still be read."""
    ProgramCache(folder).get(SOURCE, ARCHITECTURE, root)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(caching.tempfile, "mkdtemp", refuse)
    monkeypatch.setattr(caching, "file_lock", refuse)
    reader = ProgramCache(folder)
    reader.get(SOURCE, ARCHITECTURE, root)
    assert counts(reader) == (0, 1, 0, 0)
    changed = root / "ops" / "factor.cuh"
    changed.write_text("#pragma once\nconstexpr float kFactor = 3.0f;\n")
    writer = ProgramCache(folder)
    assert warned_once(writer, root).cubin
    assert writer.statistics.compilations == 2


def test_a_changed_header_is_another_program(root: Path, folder: Path) -> None:
    cache = ProgramCache(folder)
    before = cache.get(SOURCE, ARCHITECTURE, root)
    (root / "ops" / "unrelated.cuh").write_text("constexpr int kUnrelated = 2;\n")
    assert cache.get(SOURCE, ARCHITECTURE, root) is before
    (root / "ops" / "factor.cuh").write_text("#pragma once\nconstexpr float kFactor = 3.0f;\n")
    after = cache.get(SOURCE, ARCHITECTURE, root)
    assert after.cubin != before.cubin
    assert counts(cache) == (1, 0, 2, 0)


def test_everything_that_decides_the_code_is_in_the_key(root: Path) -> None:
    import dataclasses

    tools = find_toolchain()
    keys = {
        cache_key(SOURCE, ARCHITECTURE, tools, root),
        cache_key(SOURCE, "sm_100a", tools, root),
        cache_key(KernelSource("scale.cu", ("other",)), ARCHITECTURE, tools, root),
        cache_key(SOURCE, ARCHITECTURE, dataclasses.replace(tools, nvrtc_version="1.0"), root),
        cache_key(SOURCE, ARCHITECTURE, dataclasses.replace(tools, cccl_version="1"), root),
    }
    assert len(keys) == 5
    elsewhere = dataclasses.replace(tools, include_paths=(Path("/elsewhere"),))
    assert cache_key(SOURCE, ARCHITECTURE, elsewhere, root) in keys


_HOLD = """
import sys, time
from pathlib import Path
from clusterfusion.jit.file_lock import file_lock
with file_lock(Path(sys.argv[1]), 1) as held:
    print(held, flush=True)
    time.sleep(300)
"""


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "key.lock"
    environment = os.environ | {"PYTHONPATH": str(Path(caching.__file__).parents[2])}
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "True"
    with file_lock(path, 0.2) as held:
        assert not held
    holder.kill()
    holder.wait()
    start = time.monotonic()
    with file_lock(path, 30) as held:
        assert held
    assert time.monotonic() - start < 5


def test_a_holder_that_never_ends_is_not_waited_for(root: Path, folder: Path) -> None:
    folder.mkdir()
    key = cache_key(SOURCE, ARCHITECTURE, find_toolchain(), root)
    with file_lock(folder / f"{key}.lock", 1) as held:
        assert held
        cache = ProgramCache(folder, lock_timeout_seconds=0.3)
        assert cache.get(SOURCE, ARCHITECTURE, root).cubin
    assert cache.statistics.compilations == 1


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(caching.CACHE_VARIABLE, str(tmp_path / "mine"))
    assert caching.default_directory() == tmp_path / "mine"
    monkeypatch.delenv(caching.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(caching.sys, "platform", "linux")
    assert caching.default_directory() == tmp_path / "xdg" / "clusterfusion"


def test_an_entry_left_unfinished_by_a_crash_is_ignored(root: Path, folder: Path) -> None:
    ProgramCache(folder).get(SOURCE, ARCHITECTURE, root)
    shutil.copytree(entry_of(folder), folder / "abc.new")
    cache = ProgramCache(folder)
    cache.get(SOURCE, ARCHITECTURE, root)
    assert counts(cache) == (0, 1, 0, 0)
