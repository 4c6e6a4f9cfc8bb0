"""Every kind of decoder-layer instance compiles for three architectures, without a GPU, without spills."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from clusterfusion.architecture import DecoderConfig, RotaryConfig
from clusterfusion.jit.compiler import compile_program
from clusterfusion.jit.decoder_block import ElementType, block_source
from clusterfusion.named_shapes import named_shape
from clusterfusion.plan import B200, H200, RTX_5090, PlanLimits, plan_block
from clusterfusion.plan.block import MATRICES

HALVES = dataclasses.replace(named_shape("pythia-2.8b"), parallel_residual=False)  # of the seed's two half layers
TANH = dataclasses.replace(named_shape("pythia-160m"), activation="gelu_tanh", parallel_residual=False)
WIDE_HEADS = dataclasses.replace(
    named_shape("llama-3.2-1b"), num_heads=16, num_kv_heads=2, head_dim=256, attention_bias=True, mlp_bias=True
)
ONE_KV_HEAD = dataclasses.replace(
    named_shape("llama-3.2-3b"), num_heads=32, num_kv_heads=1, head_dim=96, rotary=RotaryConfig(nominal_dim=96)
)
FIVE_WIDE_HEADS = dataclasses.replace(
    named_shape("tinyllama-1.1b"), num_heads=10, num_kv_heads=2, head_dim=192, rotary=RotaryConfig(nominal_dim=192)
)
SIX_HEADS = dataclasses.replace(
    named_shape("tinyllama-1.1b"), num_heads=12, num_kv_heads=2, head_dim=128, rotary=RotaryConfig(nominal_dim=128)
)
PLAIN = dataclasses.replace(named_shape("llama-3.2-1b"), gated_mlp=False)
SIDE_BY_SIDE = dataclasses.replace(named_shape("llama-3.2-1b"), parallel_residual=True)
PLAIN_SIDE_BY_SIDE = dataclasses.replace(PLAIN, parallel_residual=True)
FOUR_OF_96 = dataclasses.replace(
    named_shape("llama-2-13b"), num_heads=16, num_kv_heads=4, head_dim=96, rotary=RotaryConfig(nominal_dim=96)
)
VERY_WIDE = dataclasses.replace(
    named_shape("llama-3.1-8b"), hidden_size=12288, num_heads=96, intermediate_size=16384
)  # 20 quads of the residual vector a thread
NEIGHBOURS = dataclasses.replace(named_shape("llama-2-7b"), rotary=RotaryConfig(nominal_dim=128, neighbours=True))
CASES: list[tuple[str, DecoderConfig, PlanLimits, str, ElementType, ElementType]] = [
    ("2.8b", named_shape("pythia-2.8b"), H200, "sm_90a", "float16", "float32"),
    ("6.9b in bf16", named_shape("pythia-6.9b"), H200, "sm_90a", "bfloat16", "float32"),
    ("20b", named_shape("gpt-neox-20b"), H200, "sm_90a", "float16", "float32"),
    ("14m, fp16 residual", named_shape("pythia-14m"), H200, "sm_90a", "float16", "float16"),
    ("heads of 256", named_shape("pythia-1b"), H200, "sm_90a", "float16", "float32"),
    ("sequential", named_shape("redpajama-incite-3b"), H200, "sm_90a", "float16", "float32"),
    ("2.8b in halves, fp16 residual", HALVES, H200, "sm_90a", "float16", "float16"),
    ("2.8b", named_shape("pythia-2.8b"), B200, "sm_100a", "float16", "float32"),
    ("160m", named_shape("pythia-160m"), B200, "sm_100a", "float16", "float32"),
    ("sequential, tanh, bf16", TANH, B200, "sm_100a", "bfloat16", "float32"),
    ("2.8b", named_shape("pythia-2.8b"), RTX_5090, "sm_120a", "float16", "float32"),
    ("410m in bf16", named_shape("pythia-410m"), RTX_5090, "sm_120a", "bfloat16", "float32"),
    ("sequential", named_shape("redpajama-incite-3b"), RTX_5090, "sm_120a", "float16", "float32"),
    ("12b, three warps", named_shape("pythia-12b"), RTX_5090, "sm_120a", "bfloat16", "float32"),
    ("LLaMA 1b", named_shape("llama-3.2-1b"), H200, "sm_90a", "bfloat16", "float32"),
    ("LLaMA 8b", named_shape("llama-3.1-8b"), H200, "sm_90a", "bfloat16", "float32"),
    ("LLaMA 7b, fp16 residual", named_shape("llama-2-7b"), H200, "sm_90a", "float16", "float16"),
    ("LLaMA 7b in neighbours, fp16 residual", NEIGHBOURS, H200, "sm_90a", "float16", "float16"),
    ("LLaMA 70b", named_shape("llama-3.1-70b"), H200, "sm_90a", "bfloat16", "float32"),
    ("LLaMA, heads of 256, biases", WIDE_HEADS, H200, "sm_90a", "float16", "float32"),
    ("LLaMA, one K/V head of 96", ONE_KV_HEAD, H200, "sm_90a", "float16", "float32"),
    ("TinyLlama", named_shape("tinyllama-1.1b"), B200, "sm_100a", "float16", "float32"),
    ("LLaMA 8b", named_shape("llama-3.1-8b"), RTX_5090, "sm_120a", "bfloat16", "float32"),
    ("LLaMA, five heads of 192", FIVE_WIDE_HEADS, H200, "sm_90a", "bfloat16", "float32"),
    ("LLaMA, five heads of 192", FIVE_WIDE_HEADS, RTX_5090, "sm_120a", "float16", "float32"),
    ("LLaMA, six heads of 128", SIX_HEADS, H200, "sm_90a", "float16", "float32"),
    ("LLaMA, six heads of 128", SIX_HEADS, RTX_5090, "sm_120a", "bfloat16", "float32"),
    ("SmolLM", named_shape("smollm-135m"), RTX_5090, "sm_120a", "bfloat16", "float32"),
    ("12b", named_shape("pythia-12b"), B200, "sm_100a", "float16", "float32"),
    ("LLaMA, four heads of 96", FOUR_OF_96, B200, "sm_100a", "float16", "float32"),
    ("LLaMA, very wide", VERY_WIDE, H200, "sm_90a", "bfloat16", "float32"),
    ("RMSNorm without a gate", PLAIN, H200, "sm_90a", "float16", "float32"),
    ("RMSNorm, parallel residual", SIDE_BY_SIDE, H200, "sm_90a", "bfloat16", "float32"),
    ("RMSNorm without a gate, parallel residual", PLAIN_SIDE_BY_SIDE, H200, "sm_90a", "float16", "float32"),
]


def test_every_order_of_the_matrices_is_compiled_for_every_architecture() -> None:
    seen = {(architecture, plan_block(config, limits).order) for _, config, limits, architecture, *_ in CASES}
    assert seen == set(itertools.product(("sm_90a", "sm_100a", "sm_120a"), MATRICES))


@pytest.mark.parametrize(
    ("name", "config", "limits", "architecture", "weight_type", "x_type"), CASES, ids=[f"{c[3]} {c[0]}" for c in CASES]
)
def test_compiles_without_spills(
    name: str,
    config: DecoderConfig,
    limits: PlanLimits,
    architecture: str,
    weight_type: ElementType,
    x_type: ElementType,
) -> None:
    """Compiling also checks that the shared memory the plan allots is enough: the program asserts it."""
    plan = plan_block(config, limits)
    program = compile_program(block_source(plan, weight_type, x_type), architecture)
    assert len(program.resources) == 1 + len(plan.segments)
    for instance, used in program.resources.items():
        assert used.spill_store_bytes == used.spill_load_bytes == 0, instance
        assert used.stack_bytes == 0, instance
        assert -(-used.registers // 8) * 8 * plan.threads <= 65536, f"{instance} would not launch"
        assert used.static_shared_bytes == 0, "all of it is dynamic"
    assert plan.shared_bytes <= limits.shared_bytes_per_block
