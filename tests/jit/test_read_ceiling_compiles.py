"""Both ways of reading compile for three architectures, without a GPU, without spills, and fit a multiprocessor."""

from __future__ import annotations

import ctypes

import pytest

from clusterfusion.jit.compiler import compile_program
from clusterfusion.jit.read_ceiling import (
    STAGE_BYTES,
    VARIANTS,
    WARPS,
    ReadArguments,
    ctas,
    instance,
    launch_shape,
    read_source,
    ring_stages,
)
from clusterfusion.plan import B200, H200, RTX_5090, PlanLimits

REGISTERS = 65536  # of a multiprocessor
CTAS_AN_SM = {"bulk copies": 1, "loads": 2}


@pytest.mark.parametrize(
    ("architecture", "limits"), [("sm_90a", H200), ("sm_100a", B200), ("sm_120a", RTX_5090)], ids=lambda v: str(v)[:8]
)
def test_compiles_without_spills(architecture: str, limits: PlanLimits) -> None:
    stages = ring_stages(limits.shared_bytes_per_block)
    assert stages * STAGE_BYTES >= 64 * 1024
    assert stages % WARPS == 0
    resources = compile_program(read_source(stages), architecture).resources
    assert len(resources) == len(VARIANTS)
    for variant in VARIANTS:
        used = resources[instance(variant, stages)]
        shape = launch_shape(variant, stages, limits.multiprocessors)
        assert used.spill_store_bytes == used.spill_load_bytes == used.stack_bytes == 0, used
        assert shape.dynamic_shared_bytes + used.static_shared_bytes <= limits.shared_bytes_per_block
        assert -(-used.registers // 8) * 8 * shape.threads * CTAS_AN_SM[variant] <= REGISTERS, used
        assert shape.clusters == limits.multiprocessors * CTAS_AN_SM[variant] == ctas(variant, limits.multiprocessors)


def test_arguments_have_the_layout_of_the_kernels_struct() -> None:
    offsets = {name: getattr(ReadArguments, name).offset for name, _ in ReadArguments._fields_}
    assert offsets == {"data": 0, "bytes": 8, "words": 16}
    assert ctypes.sizeof(ReadArguments) == 24
