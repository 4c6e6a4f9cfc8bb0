"""A CUDA program and the template instances wanted of it, compiled to a cubin by NVRTC. Needs no GPU."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

from clusterfusion.errors import CompileError
from clusterfusion.jit.resources import KernelResources, parse_ptxas_report
from clusterfusion.jit.sources import CUDA_ROOT, source_closure
from clusterfusion.jit.toolchain import Toolchain, find_toolchain

# Hopper, data-centre Blackwell, consumer Blackwell: the architectures that the tests compile every kernel for.
ARCHITECTURES = ("sm_90a", "sm_100a", "sm_120a")

LANGUAGE = "c++17"
# -v makes the assembler report resources; line information costs nothing at run time and names lines in profilers.
PTXAS_OPTIONS = ("-v",)

_CONTEXT_LINES = 2  # source lines shown on either side of the first error


@dataclass(frozen=True)
class KernelSource:
    """Which kernels to compile: `program`, a path under `cuda/`, and the C++ name expressions of `instances` of its
    templates, e.g. "clusterfusion::cluster_norm<float, float, ...>". A plain kernel's instance is its name."""

    program: str
    instances: tuple[str, ...]

    @property
    def text(self) -> str:
        """The generated translation unit. NVRTC instantiates the templates from the name expressions."""
        names = "".join(f"// {instance}\n" for instance in self.instances)
        return f'#include "{self.program}"\n{names}'


@dataclass(frozen=True)
class CompiledProgram:
    """Machine code for one architecture. `symbols` and `resources` are keyed by the instances of the source."""

    architecture: str
    cubin: bytes
    symbols: dict[str, str]
    resources: dict[str, KernelResources]


def compile_options(architecture: str) -> tuple[str, ...]:
    """Everything that is passed to the compiler but the folders of headers, as text for the cache key."""
    return (f"arch={architecture}", f"std={LANGUAGE}", "lineinfo", *(f"ptxas={option}" for option in PTXAS_OPTIONS))


def compile_program(
    source: KernelSource, architecture: str, root: Path = CUDA_ROOT, toolchain: Toolchain | None = None
) -> CompiledProgram:
    """Compiles `source` for `architecture` (e.g. "sm_90a") from the CUDA files under `root`, without any cache.

    Raises CompileError with the compiler's log and the source around the first error; DeviceError without a compiler.
    """
    toolchain = toolchain or find_toolchain()
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        name=f"{Path(source.program).stem}_instances.cu",
        arch=architecture,
        std=LANGUAGE,
        lineinfo=True,
        ptxas_options=list(PTXAS_OPTIONS),
        include_path=[str(folder) for folder in (root, *toolchain.include_paths)],
    )
    log = io.StringIO()
    try:
        program = Program(source.text, "c++", options)
        code = program.compile("cubin", name_expressions=source.instances, logs=log)
    except Exception as error:  # cuda-core raises its own private types, with the compiler's log as the message
        raise CompileError(_describe(source, architecture, root, f"{error}\n{log.getvalue()}")) from error
    symbols = {_text(name): _text(symbol) for name, symbol in code.symbol_mapping.items()}
    missing = [instance for instance in source.instances if instance not in symbols]
    report = parse_ptxas_report(log.getvalue())
    if missing or any(symbols[instance] not in report for instance in source.instances):
        detail = f"no kernel or no resource report for {missing or sorted(set(symbols.values()) - set(report))}\n"
        raise CompileError(_describe(source, architecture, root, detail + log.getvalue()))
    return CompiledProgram(
        architecture=architecture,
        cubin=bytes(code.code),
        symbols={instance: symbols[instance] for instance in source.instances},
        resources={instance: report[symbols[instance]] for instance in source.instances},
    )


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _describe(source: KernelSource, architecture: str, root: Path, log: str) -> str:
    """The error's message: what was compiled, the source around the first error, and the log."""
    parts = [f"{source.program} does not compile for {architecture}"]
    match = re.search(r"^(.+?)\((\d+)\): (?:catastrophic )?error\b", log, re.MULTILINE)
    if match:
        parts.append(_excerpt(source, root, match.group(1), int(match.group(2))))
    parts.append("compiler's log:\n" + log.replace("\0", "").strip())
    return "\n".join(parts)


def _excerpt(source: KernelSource, root: Path, name: str, line: int) -> str:
    closure = {str(root / path): text for path, text in source_closure(source.program, root).items()}
    lines = closure.get(name, source.text).splitlines()
    first = max(line - 1 - _CONTEXT_LINES, 0)
    shown = [
        f"{'>' if number == line else ' '} {number:4d} | {text}"
        for number, text in enumerate(lines[first : line + _CONTEXT_LINES], start=first + 1)
    ]
    return "\n".join([f"{name}:{line}", *shown])
