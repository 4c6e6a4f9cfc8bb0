"""The norms of a prompt's residual stream compile for three architectures, without a GPU, without spills."""

from __future__ import annotations

import ctypes

import pytest

from clusterfusion.jit.compiler import ARCHITECTURES, KernelSource, compile_program
from clusterfusion.jit.residual_norms import (
    MAX_HIDDEN,
    PROGRAM,
    NormOfRows,
    ResidualNormsArguments,
    choose_residual_norms,
)

REGISTERS = 65536  # of a multiprocessor
# Of models that there are, the odd ones of tests, and the most scalars a thread.
HIDDEN = (7, 40, 768, 2560, 5120, 6144, 8190, 8192, MAX_HIDDEN - 1, MAX_HIDDEN)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills(architecture: str) -> None:
    chosen = {
        one.instance: one
        for number, hidden in enumerate(HIDDEN)
        for one in (
            choose_residual_norms("layer_norm", hidden, ("float16", "bfloat16")[number % 2]),  # type: ignore[arg-type]
            choose_residual_norms("rms_norm", hidden, ("bfloat16", "float16")[number % 2]),  # type: ignore[arg-type]
        )
    }
    resources = compile_program(KernelSource(PROGRAM, tuple(chosen)), architecture).resources
    assert len(resources) == 2 * len(HIDDEN)
    for instance, used in resources.items():
        assert used.spill_store_bytes == used.spill_load_bytes == used.stack_bytes == 0, (instance, used)
        assert -(-used.registers // 8) * 8 * chosen[instance].threads <= REGISTERS, (instance, used)
        assert used.static_shared_bytes <= 1024, (instance, used)


@pytest.mark.parametrize("hidden", range(1, MAX_HIDDEN + 1, 173))
def test_the_threads_of_a_cta_hold_a_row(hidden: int) -> None:
    chosen = choose_residual_norms("layer_norm", hidden, "float16")
    assert chosen.threads % 32 == 0 and 32 <= chosen.threads <= 1024
    assert hidden <= chosen.threads * chosen.items < hidden + 32 * chosen.items
    assert hidden % chosen.vector_width == 0
    assert chosen.launch_shape(132).clusters * chosen.threads <= 132 * 2048


def test_arguments_have_the_layout_of_the_kernels_structs() -> None:
    offsets = {name: getattr(ResidualNormsArguments, name).offset for name, _ in ResidualNormsArguments._fields_}
    assert offsets == {"x": 0, "delta": 8, "norm": 24, "rows": 72, "fresh": 76, "eps": 80}
    assert ctypes.sizeof(NormOfRows) == 24
    assert ctypes.sizeof(ResidualNormsArguments) == 88
