"""The source tree as the tests of its laws see it: files, their syntax trees, their imports."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("ckpt", "parallel", "uni3d")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module(path: Path) -> str:
    """Return a file's dotted name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in SOURCES}


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), path.as_posix())


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of every module, and of every name, that a file imports anywhere in it."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parent.parts
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            name = ".".join(part for part in (above, node.module) if part)
            yield from (f"{name}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__", "find_spec"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


def imported_modules(path: Path) -> set[str]:
    """Return the modules of the three packages that a file imports, itself left out."""
    found = set()
    for name in imports(path):
        while name and name not in MODULES:  # a function's or a class's: the module that holds it
            name = name.rpartition(".")[0]
        found |= {name} - {"", module(path)}
    return found


def called(node: ast.Call) -> str:
    """Return the last part of the called function's name."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def packages(path: Path) -> set[str]:
    """Return the top-level packages that a file imports."""
    return {name.split(".")[0] for name in imports(path)}


def of(package: str) -> list[Path]:
    """Return the files of a package."""
    return [path for path in SOURCES if path.relative_to(ROOT).parts[0] == package]


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of the docstrings of a file's module, classes, functions and attributes."""
    for node in ast.walk(parse(path)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.lineno, value.value.strip()


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function of a file, methods and inner functions too."""
    yield from (n for n in ast.walk(parse(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run when a module is imported: all but the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from at_import(child)


def inside(package: Path) -> list[str]:
    """Return the modules and packages in the folder of a package's `__init__.py`."""
    files = {path.stem for path in package.parent.glob("*.py")} - {"__init__"}
    return sorted(files | {path.parent.name for path in package.parent.glob("*/__init__.py")})
