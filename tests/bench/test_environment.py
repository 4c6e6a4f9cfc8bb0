"""The digest of the package's sources and the versions that go into a result file."""

from __future__ import annotations

from pathlib import Path

import clusterfusion
from clusterfusion.bench.environment import package_digest, versions


def test_the_digest_follows_every_file_but_caches(tmp_path: Path) -> None:
    (tmp_path / "cuda").mkdir()
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "cuda" / "b.cu").write_text("2")
    first = package_digest(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_text("3")
    (tmp_path / ".hidden").write_text("4")
    assert package_digest(tmp_path) == first
    (tmp_path / "cuda" / "b.cu").write_text("5")
    changed = package_digest(tmp_path)
    assert changed != first
    (tmp_path / "cuda" / "b.cu").rename(tmp_path / "cuda" / "c.cu")
    assert package_digest(tmp_path) not in (first, changed)


def test_of_this_package() -> None:
    assert len(package_digest()) == 64
    assert package_digest() == package_digest()


def test_versions_name_what_decides_a_time() -> None:
    found = versions()
    assert found["clusterfusion"] == clusterfusion.__version__
    assert {"torch", "transformers", "cuda-core", "nvidia-cuda-nvrtc", "cuda_runtime"} <= found.keys()
