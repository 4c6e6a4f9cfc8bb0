"""The whole step compiles for every shape of test_decoder_block_compiles.py, and for tests and traces; without spills."""

from __future__ import annotations

import pytest
from jit.test_decoder_block_compiles import CASES

from clusterfusion.architecture import DecoderConfig
from clusterfusion.jit.compiler import KernelSource, compile_program
from clusterfusion.jit.decode_step import step_source
from clusterfusion.jit.decoder_block import ElementType
from clusterfusion.named_shapes import named_shape
from clusterfusion.plan import H200, BlockPlan, PlanLimits, plan_block

SHAPES = {f"{case[3]} {case[0]}": case[1:5] for case in CASES}  # the step's residual is float32 whatever a layer's is


def check_compiled(source: KernelSource, plan: BlockPlan, architecture: str) -> None:
    """One kernel, nothing of it in local memory, whose CTA fits a multiprocessor's registers and its dynamic memory."""
    ((instance, used),) = compile_program(source, architecture).resources.items()
    assert used.spill_store_bytes == used.spill_load_bytes == 0, (instance, used)
    assert used.stack_bytes == 0, (instance, used)
    assert -(-used.registers // 8) * 8 * plan.threads <= 65536, f"{instance} would not launch"
    assert used.static_shared_bytes == 0, "all of it is dynamic"
    assert plan.shared_bytes <= plan.limits.shared_bytes_per_block


@pytest.mark.parametrize(("config", "limits", "architecture", "weight_type"), SHAPES.values(), ids=SHAPES)
def test_compiles_without_spills(
    config: DecoderConfig, limits: PlanLimits, architecture: str, weight_type: ElementType
) -> None:
    plan = plan_block(config, limits)
    check_compiled(step_source(plan, weight_type), plan, architecture)


@pytest.mark.parametrize("name", ["pythia-2.8b", "pythia-160m", "redpajama-incite-3b"])
def test_a_traced_step_compiles_without_spills(name: str) -> None:
    """In each order of a layer's matrices, which decides where the events are."""
    plan = plan_block(named_shape(name), H200)
    check_compiled(step_source(plan, "float16", trace=True), plan, "sm_90a")


def test_a_step_with_a_fault_compiles_without_spills() -> None:
    plan = plan_block(named_shape("pythia-2.8b"), H200)
    check_compiled(step_source(plan, "float16", fault_cta=1), plan, "sm_90a")
