"""Lists the decoder kernels of named shapes: their plans, registers, spills, and a digest of their machine code. Needs no GPU.

    python3 scripts/kernel_instances.py [SHAPE ...] > before.txt      # a few of both families, if none is named

Run before and after a change and compared, it says whose kernels and plans the change touches. Compiles for sm_90a, in float16.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))  # this checkout's package, wherever another one is installed

from clusterfusion.errors import ClusterFusionError  # noqa: E402
from clusterfusion.jit.compiler import compile_program  # noqa: E402
from clusterfusion.jit.decode_step import step_source  # noqa: E402
from clusterfusion.jit.decoder_block import block_source  # noqa: E402
from clusterfusion.named_shapes import named_shape  # noqa: E402
from clusterfusion.plan import H200, plan_block  # noqa: E402

SHAPES = ("pythia-160m", "pythia-2.8b", "pythia-6.9b", "redpajama-incite-3b", "llama-3.2-1b", "llama-3.1-8b")
ARCHITECTURE, DTYPE = "sm_90a", "float16"


def machine_code(cubin: bytes) -> Iterator[bytes]:
    """What the kernels' sections of an ELF file of 64 bits hold. All else in it may differ between two compilations."""
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<2I4Q", cubin, table + index * size) for index in range(count)]
    for name, _, _, _, offset, length in sections:
        if cubin.startswith(b".text.", sections[names][4] + name):
            yield cubin[offset : offset + length]


def instances(shape: str) -> Iterator[str]:
    """A line for the plan of a named shape, and one for each program of it. Raises as `plan_block` and `named_shape` do."""
    plan = plan_block(named_shape(shape), H200)
    yield (
        f"{shape}: {plan.order}, {plan.ctas} CTAs, {plan.vector_warps} + {plan.warps} warps, {plan.stages} stages of "
        f"{plan.stage_tiles} x {plan.tile_bytes} bytes, {plan.window_stages} in flight, {plan.early_stages} early, bundles of "
        f"{plan.queries}, {plan.head_groups} head groups, {plan.hidden_groups} hidden groups, {plan.shared_bytes} bytes"
    )
    sources = {"step": step_source(plan, DTYPE), "block": block_source(plan, DTYPE, "float32")}
    for name, source in sources.items():
        program = compile_program(source, ARCHITECTURE)
        registers = max(used.registers for used in program.resources.values())
        spilled = sum(used.spill_store_bytes + used.stack_bytes for used in program.resources.values())
        digest = hashlib.sha256(b"".join(sorted(machine_code(program.cubin)))).hexdigest()[:16]
        yield f"  {name}: at most {registers} registers, {spilled} bytes of local memory, code {digest}"


def main(shapes: list[str]) -> int:
    try:
        for shape in shapes or SHAPES:
            for line in instances(shape):
                print(line, flush=True)
    except ClusterFusionError as error:
        print(f"kernel_instances: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
