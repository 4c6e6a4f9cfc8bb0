"""The house rules of the package, read off its sources: who may import whom, who may read the CUDA sources, how long
a file may be. The checker is itself tested on small trees that break each rule.

Imports run downwards only, whether at the top of a file, inside a function or for type checkers alone.
"""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parent.parent / "src"
PACKAGE = "clusterfusion"
LONGEST_FILE = 450

# A unit is a file or folder directly in the package; "" is the package's own __init__.py. Each may import itself and
# whatever stands on a later line.
TIERS = (
    ("__main__",),
    ("cli",),
    ("bench",),
    ("",),
    ("engine",),
    ("seed_api",),
    ("ops",),
    ("jit",),
    ("plan",),
    ("reference", "checkpoint", "random_weights"),
    ("weights", "config_json", "named_shapes"),
    ("architecture", "arguments"),
    ("errors",),
)
# Units held to less than their tier would allow.
ONLY = {
    "reference": {"architecture", "weights", "errors"},  # ground truth depends on what a decoder is, on nothing else
    "plan": {"architecture", "errors"},  # pure Python, checked on any machine
}
FOREIGN = {"plan": {"torch", "cuda", "cupy"}}  # what a unit may not import from outside
# Upward imports that are meant: DecoderConfig.from_dict calls its reader, late, for the caller's convenience.
MEANT = {("clusterfusion.architecture", "clusterfusion.config_json")}


@dataclasses.dataclass(frozen=True)
class Import:
    importer: str  # dotted module
    target: str  # dotted module, in the package or outside
    where: str  # "path:line"


def modules_of(src: Path) -> dict[str, Path]:
    """Every module of the package under `src`, by its dotted name."""
    found = {}
    for path in sorted((src / PACKAGE).rglob("*.py")):
        parts = path.relative_to(src).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def unit_of(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def imports_of(src: Path) -> Iterator[Import]:
    modules = modules_of(src)
    for module, path in modules.items():
        # What `from .` means in this file.
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(src)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(module, alias.name, where)
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*above, *filter(None, [node.module])])
                for alias in node.names:
                    submodule = f"{base}.{alias.name}"
                    yield Import(module, submodule if submodule in modules else base, where)


def is_ours(module: str) -> bool:
    return module == PACKAGE or module.startswith(f"{PACKAGE}.")


def import_faults(src: Path) -> list[str]:
    tier_of = {unit: tier for tier, units in enumerate(TIERS) for unit in units}
    faults = []
    for unit in sorted({unit_of(module) for module in modules_of(src)} - tier_of.keys() - {"cuda"}):
        faults.append(f"{unit}: say in TIERS of tests/test_layout.py what it may import")
    for found in imports_of(src):
        unit, target = unit_of(found.importer), unit_of(found.target)
        if not is_ours(found.target):
            if found.target.partition(".")[0] in FOREIGN.get(unit, ()):
                faults.append(f"{found.where}: {unit} may not import {found.target}")
            continue
        if target == unit or (found.importer, found.target) in MEANT or unit not in tier_of:
            continue
        if target == "cuda":
            faults.append(f"{found.where}: {PACKAGE}.cuda holds CUDA sources, which only jit reads")
        elif unit in ONLY and target not in ONLY[unit]:
            faults.append(f"{found.where}: {unit} may import only {sorted(ONLY[unit])}, not {found.target}")
        elif target in tier_of and tier_of[target] <= tier_of[unit]:
            faults.append(f"{found.where}: {unit} may not import {found.target}; imports run downwards")
    return faults


def cycle_faults(src: Path) -> list[str]:
    """One fault for each import that closes a circle of modules."""
    modules = modules_of(src)
    graph: dict[str, list[str]] = {module: [] for module in modules}
    for found in imports_of(src):
        if found.target in graph and found.target != found.importer and (found.importer, found.target) not in MEANT:
            graph[found.importer].append(found.target)
    faults, done = [], set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            faults.append("circular import: " + " -> ".join((*trail[trail.index(module) :], module)))
        elif module not in done:
            for target in graph[module]:
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    return faults


def cuda_reader_faults(src: Path) -> list[str]:
    """Modules outside jit that name the folder of CUDA sources or a file in it."""
    faults = []
    for module, path in modules_of(src).items():
        if unit_of(module) == "jit":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if (isinstance(node, ast.Constant) and id(node) not in prose and names_cuda_source(node.value)) or (
                joins_cuda_folder(node)
            ):
                faults.append(f"{path.relative_to(src)}:{node.lineno}: only jit reads the CUDA sources")
    return faults


def names_cuda_source(value: object) -> bool:
    return isinstance(value, str) and (
        value.endswith((".cu", ".cuh")) or f"{PACKAGE}.cuda" in value or f"{PACKAGE}/cuda" in value
    )


def joins_cuda_folder(node: ast.AST) -> bool:
    """`path / "cuda"` or `path.joinpath("cuda")`; a plain "cuda" is a device."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        operands: list[ast.expr] = [node.right]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "joinpath":
        operands = node.args
    else:
        return False
    return any(
        isinstance(operand, ast.Constant)
        and isinstance(operand.value, str)
        and operand.value.partition("/")[0] == "cuda"
        for operand in operands
    )


def length_faults(src: Path) -> list[str]:
    faults = []
    for path in sorted((src / PACKAGE).rglob("*")):
        if path.suffix in (".py", ".cu", ".cuh", ".h"):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > LONGEST_FILE:
                faults.append(f"{path.relative_to(src)}: {lines} lines, more than {LONGEST_FILE}; it holds two ideas")
    return faults


CHECKS = (import_faults, cycle_faults, cuda_reader_faults, length_faults)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_package(check: Callable[[Path], list[str]]) -> None:
    faults = check(SRC)
    assert not faults, "\n" + "\n".join(faults)


def test_import_is_light() -> None:
    """`import clusterfusion` waits for neither transformers nor CUDA."""
    program = "import sys, clusterfusion; print(*[m for m in ('transformers', 'cuda.core') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=SRC, capture_output=True, text=True, check=False, timeout=120
    )
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stdout + result.stderr


def faults_of(src: Path, files: dict[str, str]) -> list[str]:
    for name, text in files.items():
        path = src / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [fault for check in CHECKS for fault in check(src)]


def test_good_tree_has_no_faults(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from clusterfusion.engine import load\n",
        "errors.py": "",
        "architecture.py": "from .errors import E\ndef f():\n    from clusterfusion.config_json import read\n",
        "config_json.py": "from clusterfusion.architecture import C\n",
        "weights.py": "import torch\nfrom . import architecture, errors\n",
        "reference.py": "import torch\nfrom clusterfusion import architecture, weights\n",
        "plan/__init__.py": "from .ring import Ring\nfrom ..architecture import C\n",
        "plan/ring.py": "import math\nfrom clusterfusion.errors import E\n",
        "jit/__init__.py": '"""Reads cuda/step.cu."""\nfrom pathlib import Path\np = Path(__file__) / "cuda" / "step.cu"\n',
        "cuda/step.cu": "// CUDA\n",
        "ops.py": "import torch\nfrom . import jit, plan\nx = torch.empty(1, device='cuda')\n",
        "engine/__init__.py": "from .session import S\n",
        "engine/session.py": "from clusterfusion import ops, reference\n",
        "cli/__init__.py": "from clusterfusion import __version__\nfrom clusterfusion.bench import run\n",
        "bench/__init__.py": "from clusterfusion.engine import S\n",
    }
    assert faults_of(tmp_path, files) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"ops.py": "from clusterfusion.engine import S\n", "engine/__init__.py": ""}, "ops may not import"),
        ({"ops.py": "def f():\n    from .engine import S\n", "engine/__init__.py": ""}, "ops.py:2: ops may not"),
        ({"engine/a.py": "from ..cli import main\n", "cli/__init__.py": ""}, "engine may not import clusterfusion.cli"),
        ({"engine/a.py": "from clusterfusion import __version__\n", "__init__.py": ""}, "engine may not import"),
        ({"plan/a.py": "import clusterfusion.jit.cache\n", "jit/cache.py": ""}, "plan may import only"),
        ({"plan/a.py": "from clusterfusion import weights\n", "weights.py": ""}, "not clusterfusion.weights"),
        ({"plan/a.py": "import torch.cuda\n"}, "plan may not import torch.cuda"),
        ({"plan/a.py": "def f():\n    from cuda.core import Device\n"}, "plan may not import cuda.core"),
        ({"reference.py": "from . import checkpoint\n", "checkpoint.py": ""}, "reference may import only"),
        ({"architecture.py": "import clusterfusion.weights\n", "weights.py": ""}, "imports run downwards"),
        ({"errors.py": "from .architecture import C\n", "architecture.py": ""}, "errors may not import"),
        ({"helpers.py": ""}, "helpers: say in TIERS"),
        ({"engine/a.py": "from . import b\n", "engine/b.py": "from .a import x\n"}, "circular import"),
        ({"ops.py": "import clusterfusion.cuda\n", "cuda/__init__.py": ""}, "only jit reads"),
        ({"engine/a.py": "p = root / 'cuda'\n"}, "engine/a.py:1: only jit reads"),
        ({"ops.py": "p = root.joinpath('cuda/step')\n"}, "ops.py:1: only jit reads"),
        ({"ops.py": "p = 'step.cuh'\n"}, "only jit reads"),
        ({"ops.py": "p = files('clusterfusion.cuda')\n"}, "only jit reads"),
        ({"ops.py": "x = 1\n" * 451}, "451 lines"),
        ({"cuda/step.cu": "//\n" * 451}, "451 lines"),
    ],
)
def test_checker_sees_the_fault(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    faults = faults_of(tmp_path, files)
    assert len(faults) == 1, faults
    assert expected in faults[0]
