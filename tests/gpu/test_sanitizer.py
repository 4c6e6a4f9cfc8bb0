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
] + [CollectivesProbe("float32", 100, 2, "async", "{team}")]
for probe in probes:
    data = torch.randn(3, 2, probe.cluster_size, 100, device="cuda")
    width = 100 if probe.operator else 100 * probe.cluster_size
    out = torch.full((3, 2, probe.cluster_size, width), torch.nan, device="cuda")
    expired = torch.zeros(1, dtype=torch.int32, device="cuda")
    kernel = load_kernel(probe_source(probes), probe.instance, 0)
    kernel.launch(probe.launch_shape(2), data, out, expired, ctypes.c_int32(3), ctypes.c_uint32(0))
    assert out.isfinite().all() and expired.item() == 0, probe
"""

# Small layers that between them take every path of the program.
PARALLEL = (
    {},
    {"hidden_size": 160, "num_attention_heads": 2, "rotary_pct": 0.3},  # heads of 80: idle lanes in attention
    {
        "hidden_size": 256,
        "num_attention_heads": 1,
        "rotary_pct": 0.0,
        "attention_bias": False,
    },  # heads of 256, one alone
    {"hidden_size": 544, "num_attention_heads": 68},  # a CTA a head: nothing to merge
    {"intermediate_size": 4096, "hidden_act": "gelu_new"},  # rows of down longer than a stage
)
SEQUENTIAL = (
    {"use_parallel_residual": False, "rotary_pct": 1.0},
    {"use_parallel_residual": False, "hidden_size": 192, "num_attention_heads": 2},
    {"use_parallel_residual": False, "intermediate_size": 4096},  # h in two groups
)

# With K/V heads that query heads share, of idle lanes, in more bundles than one; biases; rows of o longer than a stage.
LLAMA = (
    {},
    {
        **{"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 80},
        **{"attention_bias": True, "mlp_bias": True},
    },
    {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 64, "hidden_size": 64},
    {"intermediate_size": 8192},  # h in four groups
)
HEAD_GROUPS = ({"hidden_size": 512, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128},)

LAYER = """
import sys
sys.path.insert(0, "tests")
import torch, clusterfusion
from clusterfusion import reference
from tiny_models import tiny_gpt_neox, weights_of
LARGE_MEAN = 1000  # beside a deviation of 1: LayerNorm takes its second step
for number, options in enumerate({options}):
    dtype = torch.bfloat16 if number == 1 else torch.float16
    weights = weights_of(tiny_gpt_neox(**options).to("cuda", dtype))
    c, layer = weights.config, weights.layers[0]
    cos, sin = reference.rotary_tables(c.rotary, torch.arange(300, device="cuda"), torch.float32)
    k, v = (torch.randn(300, c.hidden_size, device="cuda").to(dtype) for _ in range(2))
    for form in ("split", "fused"):
        for position in (0, 1, 299):
            x = torch.randn(c.hidden_size, device="cuda") + LARGE_MEAN * (position == 1)
            assert (x.mean() > x.std()) == (position == 1)
            x = x.to(dtype if position else torch.float32)
            heads = [t.view(300, c.num_heads, c.head_dim).transpose(0, 1) for t in (k, v)]
            caches = (k, v) if position else [t.contiguous() for t in heads]  # both layouts
            out, _, _ = clusterfusion.decoder_layer(
                x, layer, *caches, position, cos, sin, rotary_dim=c.rotary.dim, eps=c.norm_eps, activation=c.activation,
                parallel_residual=c.parallel_residual, form=form,
            )
            assert out.isfinite().all()
"""

STEP = """
import sys
sys.path.insert(0, "tests")
import torch
from clusterfusion import reference
from clusterfusion.engine.step_decoder import StepDecoder
from tiny_models import tiny_model, weights_of
from clusterfusion.engine.block_decoder import BlockDecoder
for options in {options}:
    weights = weights_of(tiny_model("{family}", **options).to("cuda", torch.float16))
    weights.embedding[::2] += 1000  # beside a deviation of 1: there LayerNorm takes its second step; an RMSNorm has none
    assert all((row.mean() > row.std()) == (token == 4) for token in (3, 4) for row in [weights.embedding[token].float()])
    for mode in ("split", "fused"):
        cache = reference.KVCache.allocate(weights.config, 300, torch.float16, "cuda")
        decoder = BlockDecoder(weights, cache, mode)
        for token, position in ((3, 0), (4, 1), (3, 298)):
            assert decoder.step(token, position).isfinite().all()
    cache = reference.KVCache.allocate(weights.config, 300, torch.float16, "cuda")
    decoder = StepDecoder(weights, cache)
    for token, position in ((3, 0), (4, 1), (3, 298)):
        assert decoder.step(token, position).isfinite().all()
    assert len(list(decoder.stream(4, 40, 6))) == 6
    for temperature in (0.0, 0.7):
        assert len(list(decoder.stream(3, 40, 6, temperature, seed=5))) == 6
"""

# What wide models do: up first, cached tokens within down. A layer has 50 stages.
WIDE = """
import sys
sys.path.insert(0, "tests")
import dataclasses
import torch
from clusterfusion import reference
from clusterfusion.engine.step_decoder import StepDecoder
from clusterfusion.ops.layer_launch import plan_for
from tiny_models import tiny_model, weights_of
options = {"hidden_size": 544, "num_attention_heads": 68, "intermediate_size": 25600}
weights = weights_of(tiny_model("gpt_neox", **options).to("cuda", torch.float16))
weights.embedding[4] += 1000  # beside a deviation of 1: there LayerNorm takes its second step
plan = dataclasses.replace(plan_for(weights.config, 0), up_first=True)
decoder = StepDecoder(weights, reference.KVCache.allocate(weights.config, 300, torch.float16, "cuda"), plan=plan)
for token, position in ((3, 0), (4, 1), (3, 298)):
    assert decoder.step(token, position).isfinite().all()
assert len(list(decoder.stream(4, 40, 6))) == 6
"""

PREFILL = """
import sys
sys.path.insert(0, "tests")
import torch
from clusterfusion import reference
from clusterfusion.engine.prefill import Prefill
from tiny_models import tiny_model, weights_of
for family, options in (
    ("gpt_neox", {}),
    ("gpt_neox", {"hidden_size": 160, "num_attention_heads": 2, "use_parallel_residual": False}),
    ("llama", {"hidden_size": 36, "head_dim": 20, "attention_bias": True}),
):
    weights = weights_of(tiny_model(family, **options).to("cuda", torch.float16))
    cache = reference.KVCache.allocate(weights.config, 90, torch.float16, "cuda")
    prefill = Prefill(weights, cache, 32)
    for tokens, position in ((1, 0), (50, 1), (39, 51)):
        ids = torch.arange(tokens, device="cuda")
        assert prefill.run(ids, position).isfinite().all()
"""

# The same without PyTorch's kernels between ours.
PREFILL_KERNELS = """
import dataclasses
import torch
from clusterfusion import reference
from clusterfusion.named_shapes import named_shape
from clusterfusion.ops.residual_norms import ResidualNorms
from clusterfusion.ops.rotary_to_cache import RotaryToCache
gpu = torch.device("cuda", 0)
for norm in ("layer_norm", "rms_norm"):
    for hidden in (32, 36, 160, 2560):
        config = dataclasses.replace(named_shape("pythia-14m"), norm=norm, hidden_size=hidden)
        norms = ResidualNorms(config, torch.float16, gpu)
        for rows, deltas, count, fresh in ((1, 1, 1, True), (50, 2, 2, False)):
            x = torch.randn(rows, hidden, device=gpu)
            added = [torch.randn(rows, hidden, device=gpu).half() for _ in range(deltas)]
            weight = torch.ones(hidden, device=gpu).half()
            outs = [torch.full((rows, hidden), torch.nan, device=gpu).half() for _ in range(count)]
            norms(x, added, [(weight, weight if norm == "layer_norm" else None, out) for out in outs], fresh=fresh)
            assert all(out.isfinite().all() for out in outs)
for heads, kv_heads, size, rotary in ((4, 4, 8, 2), (2, 2, 80, 24), (4, 2, 20, 20)):
    base = named_shape("pythia-14m")
    turned = dataclasses.replace(base.rotary, nominal_dim=rotary)
    config = dataclasses.replace(base, num_heads=heads, num_kv_heads=kv_heads, head_dim=size, rotary=turned)
    q, k, v = (torch.randn(50, count, size, device=gpu).half() for count in (heads, kv_heads, kv_heads))
    caches = torch.full((2, 2, kv_heads, 60, size), torch.nan, device=gpu).half()
    cos, sin = reference.rotary_tables(turned, torch.arange(50, device=gpu), torch.float32)
    RotaryToCache(config, torch.float16, gpu).bind(q, k, v, *(cache[:, :, 7:57] for cache in caches), cos, sin)(1)
    assert caches[:, 1, :, 7:57].isfinite().all() and caches[:, 0].isnan().all()
"""

# Half layers of the only width that they have, after few tokens.
SEED_LLAMA_TENSORS = """
import torch, clusterfusion
from clusterfusion.ops.attention_half import attention_half
from clusterfusion.seed_api.llama_checks import by_heads, checked_weights, half_config
gpu = torch.device("cuda", 0)
def random(*shape):
    return torch.randn(*shape, device=gpu).half()
def integers(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=gpu)
qkv, o, norm = random(12288, 4096) / 64, random(4096, 4096) / 64, random(4096)
angles = torch.rand(20, 64, device=gpu)
cos, sin = angles[:1].cos(), angles[:1].sin()
"""
# Both rotary pairings, and a paged batch whose sequences share a slot.
SEED_LLAMA = f"""{SEED_LLAMA_TENSORS}
weights = checked_weights(gpu, qkv, o, norm, "output_major")
for tokens in (0, 17):
    x, residual, k, v = random(1, 4096), random(1, 4096), random(tokens, 4096), random(tokens, 4096)
    found = clusterfusion.llama_decoder_layer_sglang(x, residual, qkv, o, k, v, norm, 1e-5, cos, sin)
    found += attention_half(half_config(1e-6, "neighbours"), weights, x, by_heads(k), by_heads(v), cos, sin)
    assert all(tensor.isfinite().all() for tensor in found)
caches = {{name: [random(40, 4096) for _ in range(2)] for name in "kv"}}
k_ptrs, v_ptrs = (integers(*(c.data_ptr() for c in caches[name]), dtype=torch.uint64) for name in "kv")
sequences = [[7], list(range(20, 38)), [25, 39, 3]]
slots, new = [slot for sequence in sequences for slot in sequence], [sequence[-1] for sequence in sequences]
for name in "kv":
    caches[name][1][new] = torch.nan
out, residual_out = (torch.full((3, 4096), torch.nan, device=gpu).half() for _ in range(2))
clusterfusion.llama_decoder_layer_batch_decode_sglang(
    out, residual_out, random(3, 4096), random(3, 4096), qkv, o, integers(0, 1, 19, 22), integers(*slots), k_ptrs, v_ptrs, 1, norm,
    1e-5, integers(0, 17, 2, dtype=torch.int64), torch.cat((angles.cos(), angles.sin()), 1),
)
assert out.isfinite().all() and residual_out.isfinite().all()
assert all(caches[name][1].isfinite().all() for name in "kv")
assert clusterfusion.rmsnorm(random(3, 4096), norm).isfinite().all()
"""
# Around whose kernel cuBLAS multiplies.
SEED_LLAMA_INPUT_MAJOR = f"""{SEED_LLAMA_TENSORS}
for tokens in (0, 17):
    x, k, v = random(1, 4096), random(tokens, 4096), random(tokens, 4096)
    found = clusterfusion.llama_decoder_layer(x, qkv, o, k, v, norm, cos.repeat(1, 2), sin.repeat(1, 2))
    assert all(tensor.isfinite().all() for tensor in found)
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
    "collectives of a partial team": COLLECTIVES.format(team="joined"),
    "read ceiling": """
import torch
from clusterfusion.bench.read_ceiling import ReadCeiling
ReadCeiling(1 << 22, torch.device("cuda", 0)).check()
""",
    "decoder layer, parallel": LAYER.format(options=PARALLEL),
    "decoder layer, sequential": LAYER.format(options=SEQUENTIAL),
    "prefill": PREFILL,
    "prefill's kernels": PREFILL_KERNELS,
    "decode step": STEP.format(options=(PARALLEL[1], PARALLEL[4], SEQUENTIAL[0], SEQUENTIAL[2]), family="gpt_neox"),
    "decode step, wide": WIDE,
    "decode step, LLaMA": STEP.format(options=LLAMA, family="llama"),
    "the seed's LLaMA functions": SEED_LLAMA,
    "the seed's LLaMA function, input-major": SEED_LLAMA_INPUT_MAJOR,
    "decode step, head groups": STEP.format(options=HEAD_GROUPS, family="llama"),
}
# Some kernels of PyTorch and cuBLAS end racecheck 2025.3 in an internal error. It sees ours in other workloads.
LIBRARIES_BETWEEN = ("prefill", "the seed's LLaMA function, input-major")


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize(
    ("workload", "tool"),
    [
        (workload, tool)
        for workload in WORKLOADS
        for tool in ("memcheck", "racecheck", "synccheck")
        if tool != "racecheck" or workload not in LIBRARIES_BETWEEN
    ],
)
def test_nothing_is_reported(workload: str, tool: str) -> None:
    done = sanitize(WORKLOADS[workload], tool)
    findings = [line for line in done.stdout.splitlines() if "=====" in line and "Host Frame" not in line]
    assert done.returncode == 0, "\n".join(findings[:30]) + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "RACECHECK SUMMARY: 0 hazards" in done.stdout, done.stdout[
        -2000:
    ]


OUT_OF_BOUNDS = """
import ctypes, torch, clusterfusion
from clusterfusion.jit.cluster_norm import choose_cluster_norm
from clusterfusion.jit.launch import load_kernel
norm = choose_cluster_norm("rms_norm", 4096, "float16", "float16", "float16", 1, "direct", aligned=False)
x = torch.zeros(4096, device="cuda").half()
w = x
load_kernel(norm.source, norm.instance, 0).launch(
    norm.launch_shape(1), x, w, None, None, ctypes.c_int64(4096), ctypes.c_int32(4096), ctypes.c_float(1 / 4096),
    ctypes.c_float(1e-6),
)
torch.cuda.synchronize()
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize(
    ("workload", "tool"),
    [
        (OUT_OF_BOUNDS, "memcheck"),  # writes to a null pointer
        (COLLECTIVES.format(team="partial"), "racecheck"),  # CTAs leave alone: allowed, but racecheck reports it
    ],
    ids=["memcheck", "racecheck"],
)
def test_the_tools_are_awake_and_look_at_our_kernels(workload: str, tool: str) -> None:
    done = sanitize(workload, tool)
    assert done.returncode != 0
    assert "clusterfusion::" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


def sanitize(workload: str, tool: str) -> subprocess.CompletedProcess[str]:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86", "--report-api-errors", "no"]
    # Our kernels alone: PyTorch's are not under test, and instrumenting them takes minutes.
    command += ["--kernel-name", "kernel_substring=clusterfusion"]
    # racecheck of launches that overlap others ends in an internal error of its own.
    command += ["--force-blocking-launches", sys.executable, "-c", workload]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
