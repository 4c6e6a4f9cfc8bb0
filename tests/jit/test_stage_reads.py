"""No kernel hands a stage of the ring back while it is still reading it: in the machine code, no load from shared memory is under way
where a warp arrives at an mbarrier. Bulk copies overtake such loads, which shows on a GPU in one launch of a few (lab/decode_step.md).

Of an instruction of sm_90 this knows the opcode (bits 0 to 11), the predicate (12 to 15) and the control bits from bit 105 on: a
scoreboard that it sets, 7 for none (5 to 7 there), and those that it waits for (11 to 16).
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusterfusion.jit.compiler import KernelSource, compile_program
from clusterfusion.jit.decode_step import step_source
from clusterfusion.jit.decoder_block import PROGRAM, ElementType, instance
from clusterfusion.jit.sources import CUDA_ROOT
from clusterfusion.named_shapes import named_shape
from clusterfusion.plan import H200, plan_block
from clusterfusion.plan.block import Segment

LOAD_SHARED, ARRIVE = 0x984, 0x9A7
LEAVES = (0x947, 0x94D, 0x950)  # BRA, EXIT, RET
ALWAYS, NO_SCOREBOARD, SCOREBOARDS = 7, 7, 6


def code(cubin: bytes) -> Iterator[bytes]:
    """The sections of machine code of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    start = headers[names][4]
    for name, _, _, _, offset, length in headers:
        if cubin[start + name :].startswith(b".text."):
            yield cubin[offset : offset + length]


def arrives_while_loading(cubin: bytes) -> list[int]:
    """Where in its section an arrival has loads from shared memory ahead of it that nobody has waited for."""
    found, arrivals = [], 0
    for section in code(cubin):
        under_way: set[int] = set()
        for at, (low, high) in enumerate(struct.iter_unpack("<QQ", section)):
            opcode, predicate, control = low & 0xFFF, low >> 12 & 0xF, high >> 41
            under_way -= {board for board in range(SCOREBOARDS) if control >> 11 >> board & 1}
            if opcode == ARRIVE:
                arrivals += 1
                found += [16 * at] * bool(under_way)
            elif opcode in LEAVES and predicate == ALWAYS:
                under_way = set()
            elif opcode == LOAD_SHARED and (control >> 5 & 7) != NO_SCOREBOARD:
                under_way.add(control >> 5 & 7)
    assert arrivals > 0, "not the encoding that this test knows"
    return found


def source(name: str, weight_type: ElementType, segment: Segment) -> KernelSource:
    return KernelSource(PROGRAM, (instance(plan_block(named_shape(name), H200), weight_type, weight_type, segment),))


KERNELS: dict[str, tuple[str, ElementType, Segment]] = {
    "6.9b, attention": ("pythia-6.9b", "float16", "attend"),
    "6.9b, fused, bf16": ("pythia-6.9b", "bfloat16", "whole"),
    "LLaMA 2 7b, attention, bf16": ("llama-2-7b", "bfloat16", "attend"),
    "LLaMA 8b, fused": ("llama-3.1-8b", "float16", "whole"),
    "20b, fused: weights are read where they are": ("gpt-neox-20b", "float16", "whole"),
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_stages_are_read_before_they_are_handed_back(kernel: tuple[str, ElementType, Segment]) -> None:
    assert arrives_while_loading(compile_program(source(*kernel), "sm_90a").cubin) == []


@pytest.mark.parametrize("name", ["pythia-2.8b", "llama-3.2-1b"])
def test_of_a_whole_step_too(name: str) -> None:
    step = step_source(plan_block(named_shape(name), H200), "float16")
    assert arrives_while_loading(compile_program(step, "sm_90a").cubin) == []


@pytest.mark.parametrize("kernel", ["6.9b, attention", "6.9b, fused, bf16"])
def test_without_the_wait_they_are_not(kernel: str, tmp_path: Path) -> None:
    root = tmp_path / "cuda"
    shutil.copytree(CUDA_ROOT, root)
    ring = root / "ops/ring.cuh"
    text = ring.read_text(encoding="utf-8")
    wait = next(line for line in text.splitlines() if "setp.eq.u32 p, %0" in line)
    ring.write_text(text.replace(wait, ""), encoding="utf-8")
    assert arrives_while_loading(compile_program(source(*KERNELS[kernel]), "sm_90a", root).cubin)
