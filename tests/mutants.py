"""Mutation testing: small faults are put into a module, one at a time, and its tests must notice each.

    python tests/mutants.py [plan] [commit] [reader] [ckpt/plan.py ...] [--sample N] [--seed S]

Prints the mutants that no test notices, and the figures. Fails if one of them isn't explained, by its name in
`mutants_explained.txt`, or if less than `LEAST_KILLED` of a group are noticed. Each is run in a fork of this
process, which has loaded the libraries already. Decorators, annotations, texts, `strict=` stay as they are.
"""

import argparse
import ast
import contextlib
import copy
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from typing import Any

import hypothesis
import numpy  # noqa: F401  loaded once, for all mutants
import pytest
import torch.distributed  # noqa: F401
import zarr  # noqa: F401

ROOT = Path(__file__).parents[1]
EXPLAINED = Path(__file__).with_name("mutants_explained.txt")
LEAST_KILLED = 0.9
MEMORY = 8 << 30
"""Bytes from which on a mutant that takes ever more is ended."""
WAIT = 300
"""Seconds from which on a mutant that computes nothing is ended."""

TESTS = {
    "plan": {
        "ckpt/box.py": ["test_box.py"],
        "ckpt/plan.py": ["test_plan.py", "test_links.py"],
        "ckpt/chunking.py": ["test_chunking.py", "test_plan.py", "test_writer_files.py"],
        "ckpt/bands.py": ["test_bands.py", "test_compare.py", "test_export.py"],
    },
    "commit": {
        "ckpt/begin.py": ["test_begin_commit.py"],
        "ckpt/commit.py": ["test_begin_commit.py", "test_order.py", "test_ranks.py"],
        "ckpt/order.py": ["test_order.py"],
    },
    "reader": {
        "ckpt/read.py": ["test_read.py", "test_open.py", "test_wrong_forms.py", "test_background.py"],
        "ckpt/parts.py": ["test_read.py", "test_open.py", "test_wrong_forms.py"],
    },
}
"""Group -> module -> its test files."""

SWAPS: dict[type[ast.AST], list[type[ast.AST]]] = {
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt], ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.In: [ast.NotIn],
    ast.NotIn: [ast.In], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.And: [ast.Or], ast.Or: [ast.And],
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.FloorDiv], ast.FloorDiv: [ast.Mult],
    ast.Div: [ast.Mult], ast.Mod: [ast.FloorDiv], ast.BitOr: [ast.BitAnd], ast.BitAnd: [ast.BitOr],
    ast.LShift: [ast.RShift], ast.RShift: [ast.LShift],
}  # fmt: skip
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list", "reversed": "list"}


def changed(node: ast.AST, role: str) -> Iterator[ast.AST]:
    """Yield each mutant of one node; `role` is the name of its field in its parent."""

    def other(**fields: Any) -> ast.AST:
        made = copy.copy(node)
        for name, value in fields.items():
            setattr(made, name, value)
        return made

    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                yield from (other(ops=[*ops[:i], new(), *ops[i + 1 :]]) for new in SWAPS[type(op)])
        case ast.BoolOp(op=op) | ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in SWAPS:
            yield from (other(op=new()) for new in SWAPS[type(op)])
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield other(value=not value)
        case ast.Constant(value=int(value)):
            yield from (other(value=value + step) for step in ((1, -1) if value > 0 else (1,)))
        case ast.Call(func=ast.Name(id=name), args=[_, *_]) if name in CALLS:
            yield other(func=ast.Name(CALLS[name]))
        case ast.Return(value=value) if value is not None and ast.unparse(value) != "None":
            yield other(value=ast.Constant(None))
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.AugAssign() | ast.Delete():
            yield ast.Pass()
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()
    if role == "test" and not isinstance(node, ast.Compare | ast.UnaryOp):
        yield ast.UnaryOp(ast.Not(), node)
    if role == "ifs":
        yield ast.Constant(True)


def places(node: ast.AST, function: str = "") -> Iterator[tuple[str, ast.AST, str, int | None]]:
    """Yield the place of each node that may be changed: function, parent, field, and index in a list."""
    for field, value in ast.iter_fields(node):
        if field in ("decorator_list", "annotation", "returns", "exc", "cause", "msg"):
            continue
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and getattr(child, "arg", "") != "strict":
                yield function, node, field, i
                inner = isinstance(child, ast.FunctionDef | ast.ClassDef)
                yield from places(child, f"{function}.{child.name}".strip(".") if inner else function)


def mutants(path: str) -> Iterator[tuple[str, ast.AST]]:
    """Yield each mutant's name and the changed module, valid until the next.

    The name is function, old and new text, by which `mutants_explained.txt` knows it wherever lines move.
    """
    tree, times = ast.parse((ROOT / path).read_text()), Counter[str]()
    for function, parent, field, i in [*places(tree)]:
        held = getattr(parent, field) if i is None else getattr(parent, field)[i]
        for new in changed(held, field):
            told = parent if isinstance(held, ast.Constant) else held  # a number alone says little
            before = text(told)
            _put(parent, field, i, new)
            name = f"{path} {function}: {before} -> {text(new if told is held else told)}"
            times[name] += 1
            yield name if times[name] == 1 else f"{name} (#{times[name]})", tree
            _put(parent, field, i, held)


def _put(parent: ast.AST, field: str, i: int | None, node: ast.AST) -> None:
    if i is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[i] = node


def text(node: ast.AST) -> str:
    """Return the code of a node in a line, its middle left out if it is long."""
    code = " ".join(ast.unparse(ast.fix_missing_locations(node)).split())
    return code if len(code) <= 120 else f"{code[:60]} ... {code[-50:]}"


class Changed(MetaPathFinder, Loader):
    """Imports one module from a source of its own."""

    def __init__(self, path: str, source: str) -> None:
        self._name, self._path, self._source = path.removesuffix(".py").replace("/", "."), path, source

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return spec_from_loader(name, self) if name == self._name else None

    def exec_module(self, module: Any) -> None:
        exec(compile(self._source, self._path, "exec"), module.__dict__)


def run(path: str, source: str, tests: list[str], seconds: float) -> tuple[bool, float]:
    """Run the tests in a fork of this process, on the module's changed source.

    Returns whether they pass, and the seconds that they computed, of which they may take only so many: other
    work on the machine costs none.
    """
    folder = tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        for fd in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
        sys.meta_path.insert(0, Changed(path, source))
        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # nothing is made smaller
        hypothesis.settings.register_profile("mutants", derandomize=True, database=None, phases=phases)
        hypothesis.settings.load_profile("mutants")
        options = f"-xq --assert=plain -p no:cacheprovider --basetemp={folder}/tmp --rootdir={ROOT}".split()
        codes = (pytest.main([*options, str(ROOT / "tests" / "ckpt" / name)]) for name in tests)
        os._exit(int(any(codes)))  # one after the other, up to the first that fails
    until, status, used = time.monotonic() + WAIT, 1, 0.0
    while time.monotonic() < until:
        time.sleep(0.02)
        ended, found, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            status, used = found, usage.ru_utime + usage.ru_stime
            break
    else:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what it started, too
    shutil.rmtree(folder, ignore_errors=True)
    return status == 0, used


def explained() -> set[str]:
    """Return the names of the mutants that need not be noticed: the lines that aren't indented."""
    lines = EXPLAINED.read_text().splitlines()
    return {line for line in lines if line.strip() and line[0] not in " #"}


def main() -> int:
    told = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser(description=__doc__, formatter_class=told)
    options.add_argument("only", nargs="*", help="groups and modules; default: all")
    options.add_argument("--sample", type=int, help="mutants of each group; default: all")
    options.add_argument("--seed", type=int, default=0, help="of the sample")
    given, known, bad, table = options.parse_args(), explained(), False, []
    everything = {name for modules in TESTS.values() for path in modules for name, _ in mutants(path)}
    assert known <= everything, f"explained, but there is no such mutant: {known - everything}"
    for group, modules in TESTS.items():
        paths = [path for path in modules if not given.only or {group, path} & {*given.only}]
        names = [name for path in paths for name, _ in mutants(path)]
        number = min(given.sample or len(names), len(names))
        wanted = {*random.Random(given.seed).sample(names, number)}
        lived: list[str] = []
        for path in paths:
            tests = modules[path]
            passed, used = run(path, (ROOT / path).read_text(), tests, WAIT)
            assert passed, f"{tests} fail without any change"
            for name, tree in mutants(path):
                if name in wanted and run(path, ast.unparse(tree), tests, 10 + 3 * used)[0]:
                    lived.append(name)
                    print("survives, as explained:" if name in known else "survives:", name, flush=True)
        if names:
            killed, unknown = number - len(lived), len({*lived} - known)
            bad |= unknown > 0 or killed < LEAST_KILLED * number
            share = f"{killed} ({killed / number:.1%})"
            table.append(
                f"| {group} | {len(names)} | {number} | {share} | {len(lived) - unknown} | {unknown} |"
            )
    head = "| group | mutants | tried | killed | explained | not explained |"
    print(head, "| --- " * 6 + "|", *table, sep="\n")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
