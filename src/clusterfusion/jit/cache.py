"""Compiled programs, kept in memory and on disk.

The key is the content: the generated source with everything it includes, the options, the toolchain's versions and the
architecture. So an entry never goes stale, and nothing has to be cleared after an update. An entry is a folder with
`program.cubin` and `entry.json` (checksum, symbols, resources), written under another name and renamed, so that a reader
sees all of it or nothing. An entry that does not check out is deleted and compiled again.

Processes share the folder. A lock per key makes one of them compile while the others wait for its entry; it is freed
with its holder, and a holder that takes longer than `LOCK_TIMEOUT_SECONDS` is not waited for. Where the folder cannot
be written, programs are compiled in memory, with one warning.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

from clusterfusion.jit.compiler import CompiledProgram, KernelSource, compile_options, compile_program
from clusterfusion.jit.file_lock import file_lock
from clusterfusion.jit.resources import KernelResources
from clusterfusion.jit.sources import CUDA_ROOT, source_closure
from clusterfusion.jit.toolchain import Toolchain, find_toolchain

CACHE_VARIABLE = "CLUSTERFUSION_CACHE_DIR"
FORMAT = 1  # of an entry; part of the key
LOCK_TIMEOUT_SECONDS = 120.0  # several times the slowest compilation: 1.5 s on two cores, 2026-11

_CUBIN = "program.cubin"
_ENTRY = "entry.json"


@dataclasses.dataclass
class CacheStatistics:
    """How the requests of one ProgramCache were met."""

    memory_hits: int = 0
    disk_hits: int = 0
    compilations: int = 0
    corrupt_entries: int = 0


class ProgramCache:
    """Compiled programs under `directory`; None keeps them in memory only. Safe to share between threads."""

    def __init__(self, directory: Path | None, lock_timeout_seconds: float = LOCK_TIMEOUT_SECONDS) -> None:
        self.directory = directory
        self.statistics = CacheStatistics()
        self._lock_timeout_seconds = lock_timeout_seconds
        self._memory: dict[str, CompiledProgram] = {}
        self._mutex = threading.Lock()  # NVRTC compiles one program at a time within a process anyway
        self._warned = False

    def get(self, source: KernelSource, architecture: str, root: Path = CUDA_ROOT) -> CompiledProgram:
        """The compiled program, from memory, from disk, or compiled now. Raises as `compile_program` does."""
        with self._mutex:
            toolchain = find_toolchain()
            key = cache_key(source, architecture, toolchain, root)
            program = self._memory.get(key)
            if program is not None:
                self.statistics.memory_hits += 1
                return program
            program = self._from_disk(key) or self._compile_and_store(key, source, architecture, toolchain, root)
            self._memory[key] = program
            return program

    def _from_disk(self, key: str) -> CompiledProgram | None:
        if self.directory is None:
            return None
        entry = self.directory / key
        try:
            program = _read_entry(entry, key)
        except FileNotFoundError:
            if not entry.is_dir():
                return None
            program = None  # a folder that has lost a file
        except NotADirectoryError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            program = None
        if program is None:
            self.statistics.corrupt_entries += 1
            shutil.rmtree(entry, ignore_errors=True)
            return None
        self.statistics.disk_hits += 1
        return program

    def _compile_and_store(
        self, key: str, source: KernelSource, architecture: str, toolchain: Toolchain, root: Path
    ) -> CompiledProgram:
        program: CompiledProgram | None = None
        if self.directory is not None:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                with file_lock(self.directory / f"{key}.lock", self._lock_timeout_seconds):
                    program = self._from_disk(key)  # another process may have written it while we waited
                    if program is None:
                        program = self._compile(source, architecture, toolchain, root)
                        if cache_key(source, architecture, toolchain, root) == key:  # no file changed meanwhile
                            _write_entry(self.directory, key, program)
            except OSError as error:
                self._warn(error)
        return program or self._compile(source, architecture, toolchain, root)

    def _compile(self, source: KernelSource, architecture: str, toolchain: Toolchain, root: Path) -> CompiledProgram:
        self.statistics.compilations += 1
        return compile_program(source, architecture, root, toolchain)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the kernel cache {self.directory} cannot be written ({error}); kernels are compiled again in every "
                f"process. Set {CACHE_VARIABLE} to a folder that can be",
                RuntimeWarning,
                stacklevel=5,
            )


def cache_key(source: KernelSource, architecture: str, toolchain: Toolchain, root: Path = CUDA_ROOT) -> str:
    """A digest (64 hexadecimal digits) of everything that decides what `source` compiles to."""
    parts = {
        "format": FORMAT,
        "source": source.text,
        "instances": source.instances,
        "files": source_closure(source.program, root),
        "options": compile_options(architecture),
        "toolchain": toolchain.identity,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def default_directory() -> Path | None:
    """$CLUSTERFUSION_CACHE_DIR, or `clusterfusion` in the platform's folder for caches; None if there is no home."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    try:
        if sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return base / "clusterfusion"


def default_cache() -> ProgramCache:
    """The process's cache in the default folder; another one when the environment names another folder."""
    return _cache_in(default_directory())


@functools.cache
def _cache_in(directory: Path | None) -> ProgramCache:
    return ProgramCache(directory)


def _write_entry(directory: Path, key: str, program: CompiledProgram) -> None:
    described = {
        "key": key,
        "architecture": program.architecture,
        "symbols": program.symbols,
        "resources": {instance: dataclasses.asdict(used) for instance, used in program.resources.items()},
    }
    described["checksum"] = _checksum(described, program.cubin)
    folder = Path(tempfile.mkdtemp(prefix=f"{key[:16]}.", suffix=".new", dir=directory))
    try:
        (folder / _CUBIN).write_bytes(program.cubin)
        (folder / _ENTRY).write_text(json.dumps(described, indent=1), encoding="utf-8")
        os.rename(folder, directory / key)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        if not (directory / key).is_dir():  # else another process wrote the same entry: as good as ours
            raise


def _checksum(described: dict[str, Any], cubin: bytes) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode() + cubin).hexdigest()


def _read_entry(entry: Path, key: str) -> CompiledProgram:
    """Raises OSError, ValueError, KeyError, TypeError or AttributeError when the entry is missing, truncated or altered."""
    described = json.loads((entry / _ENTRY).read_text(encoding="utf-8"))
    cubin = (entry / _CUBIN).read_bytes()
    if described.pop("checksum") != _checksum(described, cubin) or described["key"] != key:
        raise ValueError("the entry's key or checksum does not match")
    return CompiledProgram(
        architecture=described["architecture"],
        cubin=cubin,
        symbols=described["symbols"],
        resources={name: KernelResources(**used) for name, used in described["resources"].items()},
    )
