"""Rotary embedding into the K/V cache compiles for three architectures, without a GPU, without spills, at full occupancy."""

from __future__ import annotations

import ctypes
import dataclasses

import pytest

from clusterfusion.architecture import DecoderConfig
from clusterfusion.jit.compiler import ARCHITECTURES, KernelSource, compile_program
from clusterfusion.jit.rotary_to_cache import (
    CTAS_A_MULTIPROCESSOR,
    PROGRAM,
    THREADS,
    RotaryToCacheArguments,
    instance,
)
from clusterfusion.named_shapes import named_shape

REGISTERS = 65536  # of a multiprocessor
RESIDENT = {"sm_120a": 6}  # CTAs of 256 threads on a multiprocessor of 1,536; elsewhere 2,048


def odd_shape(heads: int, head_dim: int, rotary_dim: int) -> DecoderConfig:
    base = named_shape("pythia-14m")
    rotary = dataclasses.replace(base.rotary, nominal_dim=rotary_dim)
    return dataclasses.replace(base, num_heads=heads, num_kv_heads=heads, head_dim=head_dim, rotary=rotary)


CONFIGS = (
    *map(named_shape, ("pythia-160m", "pythia-2.8b", "pythia-6.9b", "gpt-neox-20b", "llama-2-7b", "llama-3-70b")),
    *(odd_shape(3, 20, 5), odd_shape(2, 64, 0), odd_shape(1, 5, 4), odd_shape(4, 256, 256)),
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills(architecture: str) -> None:
    instances = tuple(instance(c, ("float16", "bfloat16")[n % 2]) for n, c in enumerate(CONFIGS))  # type: ignore[arg-type]
    resources = compile_program(KernelSource(PROGRAM, instances), architecture).resources
    assert len(resources) == len(CONFIGS)
    for name, used in resources.items():
        assert used.spill_store_bytes == used.spill_load_bytes == used.stack_bytes == 0, (name, used)
        resident = RESIDENT.get(architecture, CTAS_A_MULTIPROCESSOR)
        assert -(-used.registers // 8) * 8 * THREADS * resident <= REGISTERS, (name, used)


def test_arguments_have_the_layout_of_the_kernels_struct() -> None:
    names = [name for name, _ in RotaryToCacheArguments._fields_]
    assert [getattr(RotaryToCacheArguments, name).offset for name in names] == [8 * at for at in range(len(names))]
    assert names[-1] == "tokens"
    assert ctypes.sizeof(RotaryToCacheArguments) == 8 * len(names)
