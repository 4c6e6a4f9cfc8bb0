"""Small runs of every kernel under compute-sanitizer: memcheck, racecheck, synccheck."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]

COLLECTIVES = """
import ctypes
import torch
from clusterfusion.jit.collectives_probe import CollectivesProbe, probe_source
from clusterfusion.jit.launch import load_kernel
probes = [
    CollectivesProbe("float32", 100, size, exchange, "{team}", operator)
    for size, exchange in ((1, "direct"), (2, "tree"), (8, "direct"), (8, "tree"))
    for operator in ("sum", None)
]
for probe in probes:
    data = torch.randn(3, 2, probe.cluster_size, 100, device="cuda")
    width = 100 if probe.operator else 100 * probe.cluster_size
    out = torch.full((3, 2, probe.cluster_size, width), torch.nan, device="cuda")
    expired = torch.zeros(1, dtype=torch.int32, device="cuda")
    kernel = load_kernel(probe_source(probes), probe.instance, 0)
    kernel.launch(probe.launch_shape(2), data, out, expired, ctypes.c_int32(3), ctypes.c_uint32(0))
    assert out.isfinite().all() and expired.item() == 0, probe
"""

WORKLOADS = {
    "norms": """
import torch, clusterfusion
for hidden in (7, 224):
    for size, exchange in ((1, "direct"), (2, "direct"), (4, "tree"), (8, "direct")):
        x = torch.randn(3, hidden, device="cuda").half()
        w = torch.ones(hidden, device="cuda").half()
        assert clusterfusion.layer_norm(x, w, w, 1e-5, cluster_size=size, exchange=exchange).isfinite().all()
        assert clusterfusion.rms_norm(x, w, 1e-6, cluster_size=size, exchange=exchange).isfinite().all()
""",
    "collectives of a whole team": COLLECTIVES.format(team="whole"),
    "collectives of a partial team": COLLECTIVES.format(team="partial"),
    "decoder layer": """
import sys
sys.path.insert(0, "tests")
import torch, clusterfusion
from tiny_models import tiny_gpt_neox
for options in ({}, {"use_parallel_residual": False, "rotary_pct": 1.0}, {"hidden_size": 160, "num_attention_heads": 2}):
    for mode in ("split", "fused"):
        session = clusterfusion.load(tiny_gpt_neox(**options).to("cuda", torch.float16), mode=mode).session()
        for token in (5, 6):
            assert session.step(token).isfinite().all()
        session.prefill(list(range(50)))
        assert session.step(7).isfinite().all()
""",
}


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize(
    ("workload", "tool"),
    [
        ("norms", "memcheck"),
        ("norms", "racecheck"),
        ("norms", "synccheck"),
        ("collectives of a whole team", "memcheck"),
        ("collectives of a whole team", "racecheck"),
        ("collectives of a whole team", "synccheck"),
        ("collectives of a partial team", "memcheck"),
        ("collectives of a partial team", "synccheck"),
        ("decoder layer", "memcheck"),
        ("decoder layer", "synccheck"),
        # Not racecheck of a PartialTeam, which the decoder layer is made of: see lab/decoder_block.md, "What racecheck says".
    ],
)
def test_nothing_is_reported(workload: str, tool: str) -> None:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86", "--report-api-errors", "no"]
    # Our kernels alone: PyTorch's are not under test, and instrumenting them takes minutes.
    command += ["--kernel-name", "kernel_substring=clusterfusion", sys.executable, "-c", WORKLOADS[workload]]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    findings = [line for line in done.stdout.splitlines() if "=====" in line and "Host Frame" not in line]
    assert done.returncode == 0, "\n".join(findings[:30]) + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "RACECHECK SUMMARY: 0 hazards" in done.stdout, done.stdout[
        -2000:
    ]
