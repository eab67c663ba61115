"""Imports run one way, answering needs no training, and no function or file grows beyond what can be read at once."""

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

import lamini_jax

# From the bottom to the top: a part imports what lies below it, and nothing beside or above it.
LAYERS = (
    ("errors",),
    ("config",),
    ("runtime",),
    ("data",),
    ("backbone", "index"),
    ("memory",),
    ("evaluation",),
    ("training",),
    ("configure", "memories", "edits"),
    ("fact_memory",),
    ("api",),
    ("question_files", "exports", "serving"),
    ("tune", "ask", "forget", "facts", "export", "train_scope", "serve", "__main__"),
    ("experiments.shared", "experiments.configs"),
    ("experiments",),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
# What the package's own __init__ hands on, by name -> the module that it comes from.
PUBLIC = {f"lamini_jax.{name}": f"lamini_jax.{home}" for name, home in lamini_jax._HOME.items()}
FILES = [path for folder in ("lamini_jax", "experiments") for path in sorted((ROOT / folder).rglob("*.py"))]
FUNCTION_LINES, PARAMETERS, FILE_LINES = 60, 7, 450


def name_of(path: Path) -> str:
    """The dotted name of a module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(name: str) -> str:
    """The part of `LAYERS` that a module belongs to; of the package's own __init__, nothing."""
    first, second, *_ = [*name.split("."), ""]
    if first == "experiments":
        return f"{first}.{second}" if f"{first}.{second}" in LEVEL else first
    return second


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports() -> dict[str, set[str]]:
    """Of each module, the modules of this project that it imports anywhere, inside functions too."""
    modules = {name_of(path) for path in FILES}

    def of(path):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: a relative import"
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield PUBLIC.get(full) or (full if full in modules else node.module)

    found = {name_of(path): set(of(path)) for path in FILES}
    ours = {
        name: {other for other in others if other.split(".")[0] in ("lamini_jax", "experiments", "tests")}
        for name, others in found.items()
    }
    unknown = {(name, other) for name, others in ours.items() for other in others - modules}
    assert not unknown, f"imports of modules that are not there: {unknown}"
    return ours


def test_every_module_has_a_layer():
    """A new part of the package is given its place in `LAYERS`."""
    parts = {part_of(name) for name in imports()} - {""}
    assert parts == LEVEL.keys()


def test_imports_run_one_way():
    back = []
    for name, others in imports().items():
        for other in others:
            if part_of(name) != part_of(other) and LEVEL.get(part_of(other), 99) >= LEVEL.get(part_of(name), -1):
                back.append(f"{name} -> {other}")
    arrows = {(part_of(name), part_of(other)) for name, others in imports().items() for other in others}
    for parts in reversed(LAYERS):
        for part in parts:
            below = sorted(
                {to for start, to in arrows if start == part != to}, key=lambda part: (-LEVEL.get(part, 0), part)
            )
            print(f"{part:>20} -> {' '.join(below)}")
    assert not back, "\n".join(back)


def test_no_circles():
    """Among modules too, wherever in a file they import each other."""
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(imports()[name]):
            visit(other)
        done.add(path.pop())

    for name in imports():
        visit(name)


def test_the_package_itself_imports_nothing():
    assert imports()["lamini_jax"] == set()


def test_answering_imports_no_training():
    program = "import json, sys, lamini_jax.ask, lamini_jax.api; print(json.dumps(list(sys.modules)))"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = json.loads(result.stdout)
    assert "lamini_jax.memory.storage" in loaded
    assert [name for name in loaded if name.startswith(("lamini_jax.training", "lamini_jax.configure"))] == []


def functions():
    """Every function as (where it is, its node)."""
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}", node


def test_functions_are_short():
    long = {where: node.end_lineno - node.lineno + 1 for where, node in functions()}
    assert {where: lines for where, lines in long.items() if lines > FUNCTION_LINES} == {}


def test_functions_have_few_parameters():
    many = {}
    for where, node in functions():
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        many[where] = len([one for one in given if one.arg not in ("self", "cls")])
    assert {where: count for where, count in many.items() if count > PARAMETERS} == {}


def test_files_are_short():
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in [*FILES, *ROOT.glob("launch/*")]}
    lines |= {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in (ROOT / "tests").rglob("*.py")}
    assert {path: count for path, count in lines.items() if count > FILE_LINES} == {}


def test_launchers_are_shell():
    files = {path for path in (ROOT / "launch").iterdir() if path.is_file()}
    others = {path.name for path in files if path.suffix not in (".sh", ".sbatch", ".md")}
    assert others == {"Containerfile", "lamini-jax.service"}


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")], ids=lambda arguments: arguments[0])
def test_ruff(arguments):
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "--quiet", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
