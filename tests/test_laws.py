"""The laws of the house, read off the source: every import of every module, those inside functions too.

1. `parallel` and `ckpt` import neither each other nor `uni3d`.
2. `ckpt` imports no torch; `import ckpt`, `import uni3d` and `uni3d --help` load none.
3. There are no process-group globals: nothing of `torch.distributed` is called when `parallel` is imported.
4. `uni3d/state.py` is the joint: the only module that asks `parallel` which part of a tensor a rank holds
   (`parallel.layout`), and the only one that makes `ckpt`'s boxes and shards, but for
   `uni3d/estimate/save.py`, whose boxes are of no tensor, and `uni3d/importers/write.py`, whose are of
   tensors in foreign files. The engine, its checkpointing and its description may know both packages (errors,
   reports, collectives); every other module at most one. `parallel`'s rules (`RULES`) load no torch and are
   open to all.
5. Nothing pickles, but for `parallel/host_comm.py`, which carries values between ranks in memory, as torch's
   `all_gather_object` does; and files stay short.
6. `uni3d/manifest.py` is the only module that looks up a manifest's keys, those beside the arrays.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("ckpt", "parallel", "uni3d")
SOURCES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
LONGEST = 350
PICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLING = {("torch", "save"), ("torch", "load"), ("np", "save"), ("np", "load")}
IN_MEMORY = {
    "parallel/host_comm.py": {("pickle", "dumps"), ("pickle", "loads")},
    "uni3d/importers/pickles.py": {("pickle", "Unpickler")},
}
"""Which file may pickle, and by what: never to or from a file. The unpickler of foreign checkpoints is
one that refuses whatever isn't known to be inert."""


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), relative(path))


def imports(path: Path) -> Iterator[str]:
    """The full name of every module, and of every name, that a file imports anywhere in it."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(REPOSITORY).parent.parts
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__", "find_spec"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


def called(node: ast.Call) -> str:
    """The last part of the name of what is called."""
    function = node.func
    return getattr(function, "attr", getattr(function, "id", ""))


def packages(path: Path) -> set[str]:
    """The top-level packages that a file imports."""
    return {name.split(".")[0] for name in imports(path)}


def of(package: str) -> list[Path]:
    return [path for path in SOURCES if path.relative_to(REPOSITORY).parts[0] == package]


def test_the_walk_sees_every_form_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the tests below: an import that the walk overlooks is a law that isn't held."""
    monkeypatch.setattr(sys.modules[__name__], "REPOSITORY", tmp_path)
    (tmp_path / "pkg").mkdir()
    path = tmp_path / "pkg" / "m.py"
    path.write_text(
        "import a.b as c\nfrom d import e, f\nfrom . import g\nfrom .h import i\n"
        "if TYPE_CHECKING:\n    import j\ndef k():\n    import l\n    class M:\n        from n import o\n"
        "importlib.import_module('p.q')\n"
    )
    assert set(imports(path)) == {"a.b", "d.e", "d.f", "pkg.g", "pkg.h.i", "j", "l", "n.o", "p.q"}
    assert len(SOURCES) > 20, "or nothing is checked"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_who_imports_whom(path: Path) -> None:
    mine, found = path.relative_to(REPOSITORY).parts[0], packages(path)
    assert mine == "uni3d" or not found & (set(PACKAGES) - {mine}), "law 1"
    if mine == "ckpt":
        assert "torch" not in found, "law 2"
    assert not found & {"tests", "examples", "benchmarks"}


RULES = ("degrees", "settings", "combinations", "placement", "tp_styles")
"""Modules of `parallel` that are arithmetic: they load no torch."""


@pytest.mark.parametrize("module", RULES)
def test_the_rules_of_parallel_load_no_torch(module: str) -> None:
    done = run(f"import sys, parallel.{module}; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def knows_tensors(path: Path) -> bool:
    """Return whether a file imports `parallel` beyond its rules."""
    rules = tuple(f"parallel.{module}." for module in RULES)
    return any(n.split(".")[0] == "parallel" and not n.startswith(rules) for n in imports(path))


def test_one_joint() -> None:
    users = {relative(p) for p in of("uni3d") if "ckpt" in packages(p) and knows_tensors(p)}
    names = (
        "state",
        "engine/engine",
        "engine/guard",
        "checkpoint/save",
        "checkpoint/live_weights",
        "checkpoint/restore",
        "checkpoint/optimizer_groups",
    )
    assert users == {f"uni3d/{name}.py" for name in names}
    layout = {relative(p) for p in of("uni3d") if any(n.startswith("parallel.layout") for n in imports(p))}
    assert layout == {"uni3d/state.py"}
    kinds = {"Box", "Shard", "ShardSpec", "ArrayKey"}
    makers = {
        relative(path)
        for path in of("uni3d")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and called(node) in kinds
    }
    assert makers == {"uni3d/state.py", "uni3d/estimate/save.py", "uni3d/importers/write.py"}
    importers = {relative(p) for p in of("uni3d") if {f"ckpt.{kind}" for kind in kinds} & set(imports(p))}
    assert importers == makers


def test_one_file_for_each_command() -> None:
    from uni3d.cli import app

    helpers = {"__init__", "terminal", "plan_report"}
    files = {path.stem for path in (REPOSITORY / "uni3d" / "cli").glob("*.py")} - helpers
    commands = {command.name: command.callback for command in app.registered_commands}
    assert commands.keys() == {stem.rstrip("_") for stem in files}, "a file is named as the command is typed"
    for name, function in commands.items():
        assert function is not None
        assert function.__module__.rstrip("_") == f"uni3d.cli.{name}"


def test_only_the_command_line_imports_its_own_files() -> None:
    others = [path for path in SOURCES if path.parent != REPOSITORY / "uni3d" / "cli"]
    users = {relative(p) for p in others if any(name.startswith("uni3d.cli") for name in imports(p))}
    assert not users


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: all but the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from at_import(child)


@pytest.mark.parametrize("path", of("parallel"), ids=relative)
def test_no_process_group_globals(path: Path) -> None:
    distributed = set()  # the names by which the file knows things of torch.distributed
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
            distributed |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found = [alias for alias in node.names if alias.name.startswith("torch.distributed")]
            distributed |= {alias.asname or "torch" for alias in found}
    forbidden = distributed | {"HostComm", "Topology"}
    for node in at_import(parse(path)):
        if isinstance(node, ast.Call):
            names = {n.id for n in ast.walk(node.func) if isinstance(n, ast.Name)}
            assert not names & forbidden, f"line {node.lineno} makes a global of {names & forbidden}"
    assert not any(isinstance(node, ast.Global) for node in ast.walk(parse(path))), "set later"


ASKED_FOR = {f"uni3d/{name}.py": {("torch", "save")} for name in ("checkpoint/live_weights", "zero_to_fp32")}
"""Where a user asks for torch's own file."""


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_pickles(path: Path) -> None:
    allowed = IN_MEMORY.get(relative(path), set())
    assert packages(path) & PICKLERS <= {module for module, _ in allowed}
    named = [a for node in ast.walk(parse(path)) if isinstance(node, ast.Import) for a in node.names]
    plain = {alias.name for alias in named if alias.asname is None}
    assert packages(path) & PICKLERS <= plain, "by its module's own name, so that its use is seen below"
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            pair = (node.value.id, node.attr)
            assert pair not in PICKLING - ASKED_FOR.get(relative(path), set()), f"line {node.lineno}"
            assert pair[0] not in PICKLERS or pair in allowed, f"line {node.lineno}"


MANIFEST_KEYS = {
    *("writer", "zero_stage", "shard_group", "imported"),
    *("requires_grad", "left_out", "declared", "aliases", "scalars"),
    *("engine", "global_steps", "global_samples", "skipped_steps", "client_state"),
}
"""Keys that mean nothing else. `step`, `model`, `optimizer` and so on are also keys of configs, reports and
torch's state_dicts, so they are forbidden only where the mapping is called `manifest`."""
LOOKED_UP = {
    # DeepSpeed's keys of the same name.
    "uni3d/importers/deepspeed/__init__.py": {"global_steps", "global_samples", "skipped_steps"},
    "uni3d/importers/deepspeed/zero.py": {"zero_stage"},
    # In the header of a safetensors file.
    "uni3d/importers/state_dicts.py": {"aliases"},
}
"""Files that look up keys of these names, too, and why they may."""


def looked_up(path: Path) -> Iterator[tuple[ast.expr, str]]:
    """Each mapping that a file subscripts, or calls `get` and the like of, with the constant key."""
    for node in ast.walk(parse(path)):
        match node:
            case ast.Subscript(value=mapping, slice=ast.Constant(value=str(key))):
                yield mapping, key
            case ast.Call(
                func=ast.Attribute(value=mapping, attr="get" | "pop" | "setdefault"),
                args=[ast.Constant(value=str(key)), *_],
            ):
                yield mapping, key


@pytest.mark.parametrize("path", of("uni3d"), ids=relative)
def test_one_reader_of_the_manifest(path: Path) -> None:
    if relative(path) in ("uni3d/manifest.py", "uni3d/zero_to_fp32.py"):
        return  # the second runs without this package, in the checkpoint's own folder
    found = list(looked_up(path))
    assert {key for _, key in found} & MANIFEST_KEYS <= LOOKED_UP.get(relative(path), set())
    assert not [key for mapping, key in found if ast.unparse(mapping).split(".")[-1] == "manifest"]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST


def run(code: str, *path: Path | str) -> subprocess.CompletedProcess[str]:
    """Run Python code with these folders first on its path."""
    folders = os.pathsep.join(str(p) for p in (*path, REPOSITORY))
    environment = {**os.environ, "PYTHONPATH": folders}
    return subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)


COMMANDS = {
    "import ckpt": "import ckpt",
    "import uni3d": "import uni3d",
    "read a config": "import uni3d.config; uni3d.config.load_config({'optimizer': {'type': 'AdamW'}})",
    "uni3d --help": "import uni3d.cli\ntry: uni3d.cli.app(['--help'])\nexcept SystemExit: pass",
    "uni3d config": "import uni3d.cli, pathlib, tempfile\n"
    "path = pathlib.Path(tempfile.mkdtemp(), 'c.json')\n"
    'path.write_text(\'{"train_batch_size": 8, "optimizer": {"type": "RMSprop"}}\')\n'
    "try: uni3d.cli.app(['config', str(path)])\nexcept SystemExit as done: assert not done.code",
    "uni3d doctor": "import ckpt, numpy, tempfile, uni3d.cli\n"
    "shard = ckpt.Shard(ckpt.ShardSpec(ckpt.ArrayKey('w', 'fp32'), 'float32', (4,), ckpt.Box((0,), (4,))),"
    " numpy.ones(4, 'float32'))\n"
    "run, plan = tempfile.mkdtemp(), ckpt.make_plan({0: [shard.spec]})\n"
    "ckpt.save(run, 't', [shard], plan=plan, comm=ckpt.Solo(), document={'step': 1})\n"
    "try: uni3d.cli.app(['doctor', run, '--world-size', '2'])\n"
    "except SystemExit as done: assert done.code == 1",
    "uni3d plot": "import uni3d.cli, pathlib, tempfile\n"
    "run = pathlib.Path(tempfile.mkdtemp())\n"
    'run.joinpath("metrics.jsonl").write_text(\'{"step": 1, "loss": 2.5}\\n\')\n'
    "try: uni3d.cli.app(['plot', str(run), str(run / 'plot.png')])\n"
    "except SystemExit as done: assert not done.code",
    "uni3d plan": "import uni3d.cli\ntry: uni3d.cli.app(['plan', '--params', '1B'])\nexcept SystemExit: pass",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_torch_is_loaded(command: str) -> None:
    report = "\nimport json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = run(COMMANDS[command] + report)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "torch" not in loaded
    assert {"ckpt", "uni3d"} & loaded
