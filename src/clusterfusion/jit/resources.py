"""What a compiled kernel takes of an SM, read from the assembler's report: no GPU and no CUDA tools needed."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class KernelResources:
    """One kernel's needs. Registers are per thread; bytes of spills and stack per thread, of shared memory per block.

    `static_shared_bytes` leaves out dynamic shared memory, which a launch chooses.
    """

    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    static_shared_bytes: int
    named_barriers: int


_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(.*)")
_SHARED = re.compile(r"(\d+) bytes smem")
_BARRIERS = re.compile(r"used (\d+) barriers")


def parse_ptxas_report(log: str) -> dict[str, KernelResources]:
    """Resources by mangled kernel name, from the log of `ptxas -v`. Empty if the log holds no report.

    The report of device functions that were not inlined is skipped: a kernel's own line counts their registers.
    """
    found: dict[str, KernelResources] = {}
    for section in re.split(r"(?=Compiling entry function ')", log)[1:]:
        entry = _ENTRY.search(section)
        own = section[section.find("Function properties for " + entry.group(1)) :] if entry else ""
        stack, used = _STACK.search(own), _USED.search(own)
        if not (entry and stack and used):
            continue
        shared, barriers = _SHARED.search(used.group(2)), _BARRIERS.search(used.group(2))
        found[entry.group(1)] = KernelResources(
            registers=int(used.group(1)),
            stack_bytes=int(stack.group(1)),
            spill_store_bytes=int(stack.group(2)),
            spill_load_bytes=int(stack.group(3)),
            static_shared_bytes=int(shared.group(1)) if shared else 0,
            named_barriers=int(barriers.group(1)) if barriers else 0,
        )
    return found
