"""Tests of how the modules hang together: who may import whom, and how long modules and functions are."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

from glass_mlx.__main__ import COMMANDS

# From the ground up. A part, which is a package or a module beside the packages, imports from the levels below its own;
# parts on one level do not know each other.
LEVELS = (
    ("_version", "errors"),
    ("files", "group"),
    ("hub",),
    ("core",),  # pure functions on arrays; see CORE_IMPORTS
    ("model",),
    ("decoding", "ranks"),
    ("loading",),
    ("downloads", "sharded_loading"),
    ("serving",),
    ("evaluation", "demo"),
    ("cli",),
    ("terminal",),
    COMMANDS,
    ("__init__", "__main__"),  # nothing imports these
)
CORE_IMPORTS = {"core", "mlx", "numpy"}

# What only an extra installs, by the parts that need the extra.
OPTIONAL = {
    "starlette": {"serving", "server"},
    "uvicorn": {"serving", "server"},
    "h11": {"serving", "server"},
    "pydantic": {"serving", "server"},
    "matplotlib": {"evaluation"},
    "llguidance": {"serving"},
    "lm_eval": {"evaluation"},
    "torch": {"demo"},
    "tokenizers": {"demo", "evaluation"},
    "gguf": {"evaluation"},
}

MAX_MODULE, MAX_FUNCTION = 400, 60  # lines


class Module(NamedTuple):
    """A module: its name below ``glass_mlx``, its syntax tree and its length in lines."""

    name: str
    tree: ast.Module
    lines: int

    @property
    def part(self) -> str:
        return self.name.partition(".")[0]


@functools.cache
def modules() -> dict[str, Module]:
    package, found = ROOT / "glass_mlx", {}
    for path in sorted(package.rglob("*.py")):
        name = _dotted(path.relative_to(package))
        source = path.read_text(encoding="utf-8")
        found[name] = Module(name, ast.parse(source), len(source.splitlines()))
    return found


def _dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imported(module: Module) -> set[str]:
    """What a module imports, in functions too, but not for type checkers alone.

    The project's own modules come as ``core.ranking``, the package itself as ``__init__``; others by their first name.
    """
    return set(_imported(module, module.tree))


def _imported(module: Module, node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (_resolved(alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = _base(module, node)
        yield from (_resolved(f"{base}.{alias.name}") for alias in node.names)
    else:
        checked_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in node.orelse if checked_only else ast.iter_child_nodes(node):
            yield from _imported(module, child)


def _base(module: Module, node: ast.ImportFrom) -> str:
    """The absolute name that is imported from."""
    if not node.level:
        return node.module
    is_package = any(name.startswith(f"{module.name}.") for name in modules())
    package = ["glass_mlx", *module.name.split(".")] if module.name != "__init__" else ["glass_mlx", ""]
    package = package[: len(package) - node.level + is_package]
    return ".".join([*package, *filter(None, [node.module])])


def _resolved(name: str) -> str:
    top, _, rest = name.partition(".")
    if top != "glass_mlx":
        return top
    while rest and rest not in modules():  # a name in a module
        rest = rest.rpartition(".")[0]
    return rest or "__init__"


@functools.cache
def arrows() -> list[tuple[Module, str]]:
    """Every module with everything that it imports."""
    return [(module, name) for module in modules().values() for name in sorted(imported(module))]


def test_imports_are_read():
    """Relative and absolute, of modules and of names in them, in functions and in branches."""
    source = """
import os.path, glass_mlx.core.prior
from . import memory
from .. import errors as e, __version__
from ..core.ranking import rank
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from ..chat import main
else:
    from ..files import write
class A:
    def f(self):
        try:
            from glass_mlx.core import slicing
        except ImportError:
            import numpy.linalg
"""
    module = Module("model.session", ast.parse(source), 0)
    project = {"core.prior", "core.ranking", "core.slicing", "errors", "files", "model.memory", "__init__"}
    assert imported(module) == project | {"os", "typing", "numpy"}
    for name, text in (("__init__", "from .core import prior"), ("core", "from .prior import likeness")):
        assert imported(Module(name, ast.parse(text), 0)) == {"core.prior"}


def test_every_part_has_its_level():
    """A new module or package must be given a place in the order."""
    parts = {module.part for module in modules().values()}
    placed = [part for level in LEVELS for part in level]
    assert sorted(placed) == sorted(set(placed))
    assert parts == set(placed)


def test_imports_point_down():
    level_of = {part: i for i, level in enumerate(LEVELS) for part in level}
    wrong = []
    for module, name in arrows():
        part = name.partition(".")[0]
        if part in level_of and part != module.part and level_of[part] >= level_of[module.part]:
            wrong.append(f"{module.name} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_core_imports_only_core():
    allowed = CORE_IMPORTS | sys.stdlib_module_names
    wrong = [
        f"{module.name} imports {name}"
        for module, name in arrows()
        if module.part == "core" and name.partition(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_a_command():
    wrong = [f"{module.name} imports {name}" for module, name in arrows() if name in COMMANDS]
    assert not wrong, "\n".join(wrong)


def test_no_circle():
    """Each module can be read after those that it imports."""
    left = {
        name: {other for module, other in arrows() if module.name == name and other in modules()} for name in modules()
    }
    while ready := [name for name, others in left.items() if not others]:
        for name in ready:
            del left[name]
        for others in left.values():
            others.difference_update(ready)
    assert not left, f"in a circle, or above one: {left}"


@pytest.mark.parametrize("package", OPTIONAL)
def test_what_an_extra_installs_is_imported_where_it_is_needed(package):
    wrong = [module.name for module, name in arrows() if name == package and module.part not in OPTIONAL[package]]
    assert not wrong, "\n".join(wrong)


def lengths() -> Iterator[tuple[str, int, int]]:
    """Names of modules and functions, their lines, and the most that they may have."""
    for module in modules().values():
        yield module.name, module.lines, MAX_MODULE
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{module.name}.{node.name}", _code_lines(node), MAX_FUNCTION


def _code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines below a function's signature and docstring."""
    first = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return function.end_lineno - first[0].lineno + 1 if first else 0


def test_modules_and_functions_are_short():
    long = [f"{name}: {lines} lines" for name, lines, most in lengths() if lines > most]
    assert not long, "\n".join(long)
