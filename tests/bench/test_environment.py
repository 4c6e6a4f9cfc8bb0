"""The digest of the package's sources, the versions, and what the driver says of a GPU, which go into a result file."""

from __future__ import annotations

import time
import types
from pathlib import Path

import pytest
import torch

import clusterfusion
from clusterfusion.bench import environment
from clusterfusion.bench.environment import device_facts, package_digest, versions

TOOL = """#!/bin/sh
PATH=/usr/bin:/bin
case "$*" in
"--query-gpu=driver_version --format=csv,noheader,nounits") echo 580.159.04; echo 580.159.04 ;;
"--id=GPU-b2 --query-gpu=power.limit --format=csv,noheader,nounits") LIMIT ;;
*) exit 2 ;;
esac
"""


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


@pytest.mark.parametrize(
    ("limit", "uuid", "driver", "watts"),
    [
        ("echo 650.00", "b2", "580.159.04", 650.0),
        ('echo "[N/A]"', "b2", "580.159.04", None),
        ("printf '\\377'", "b2", "580.159.04", None),
        ("echo nan", "b2", "580.159.04", None),
        ("echo 650.00; exit 6", "b2", "580.159.04", None),
        ("exec sleep 60", "b2", "580.159.04", None),
        ("echo 650.00", None, "580.159.04", None),
        ("exit 9", "c3", "580.159.04", None),
        (None, "b2", "unknown", None),
    ],
)
def test_driver_and_power_limit_are_as_the_driver_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: str | None,
    uuid: str | None,
    driver: str,
    watts: float | None,
) -> None:
    """The limit is that of the GPU with that UUID: the driver's numbers of GPUs are not CUDA's. All have one driver."""
    if limit is not None:
        (tmp_path / "nvidia-smi").write_text(TOOL.replace("LIMIT", limit))
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment, "_DRIVER_S", 1.0)
    properties = types.SimpleNamespace() if uuid is None else types.SimpleNamespace(uuid=uuid)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {1: properties}.get)
    limits = types.SimpleNamespace(name="GPU", compute_capability=(9, 0), multiprocessors=132, l2_bytes=50 << 20)
    monkeypatch.setattr(environment, "device_limits", lambda index: limits)
    began = time.monotonic()
    facts = device_facts(1)
    assert time.monotonic() - began < 30, "nobody waits for a driver that hangs"
    assert (facts["driver"], facts["power_limit_watts"]) == (driver, watts)
    assert facts["compute_capability"] == "9.0"


def test_a_tool_that_cannot_be_started_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_bytes(b"\x7fELF, in part")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment._ask_driver("driver_version") == ""
