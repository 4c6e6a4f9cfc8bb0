"""What a change of the kernels is compared by: the same sources give the same lines, other ones do not."""

from __future__ import annotations

import dataclasses

import kernel_instances
import pytest

from clusterfusion.plan import H200


def test_plans_and_code_are_told_apart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel_instances.main(["pythia-14m"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("pythia-14m: qkv_first, 128 CTAs, ")
    assert said.count(" registers, 0 bytes of local memory, code ") == 2
    assert "".join(f"{line}\n" for line in kernel_instances.instances("pythia-14m")) == said
    monkeypatch.setattr(kernel_instances, "H200", dataclasses.replace(H200, multiprocessors=64))
    changed = list(kernel_instances.instances("pythia-14m"))
    assert all(line not in said for line in changed)


def test_an_unknown_shape_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel_instances.main(["pythia-1t"]) == 1
    assert capsys.readouterr().err.startswith("kernel_instances: ")
