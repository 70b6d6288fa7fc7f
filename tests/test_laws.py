"""The laws of the house, read off the source, function bodies and `TYPE_CHECKING` blocks included.

1. `parallel` and `ckpt` import neither each other nor `uni3d`. `ckpt` imports no torch. `uni3d/state.py` is
   the joint of tensors and boxes. `parallel`'s rules (`RULES`) load no torch and are open to all.
2. No two files import each other, directly or by way of others.
3. Each folder of `uni3d` imports those that `ALLOWED` names. Nobody imports `cli`; nothing below `engine/`
   names `Engine`.
4. The folders that need no torch load none; neither do `import ckpt`, `import uni3d` and most commands.
5. A public class name is defined once; a manifest's keys are looked up in one file; each command is a file of
   `cli/`; a package's docstring lists exactly its modules.
6. The tests of `ckpt` and of `parallel` import no `uni3d`.
7. A docstring begins with a verb or a noun, in tests too; files and functions are short.
8. No process-group globals; nothing pickles to or from a file.
"""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import source_tree
from source_tree import (
    MODULES,
    PACKAGES,
    ROOT,
    SOURCES,
    at_import,
    called,
    docstrings,
    functions,
    imported_modules,
    imports,
    inside,
    module,
    of,
    packages,
    parse,
    relative,
)

every_file = pytest.mark.parametrize("path", SOURCES, ids=relative)


def test_the_walk_sees_every_form_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import that the walk overlooks is a law that isn't held."""
    monkeypatch.setattr(source_tree, "ROOT", tmp_path)
    (tmp_path / "pkg").mkdir()
    path = tmp_path / "pkg" / "m.py"
    path.write_text(
        "import a.b as c\nfrom d import e, f\nfrom . import g\nfrom .h import i\n"
        "if TYPE_CHECKING:\n    import j\ndef k():\n    import l\n    class M:\n        from n import o\n"
        "importlib.import_module('p.q')\n"
    )
    assert set(imports(path)) == {"a.b", "d.e", "d.f", "pkg.g", "pkg.h.i", "j", "l", "n.o", "p.q"}
    assert len(SOURCES) > 100, "or nothing is checked"


# --- 1: the three packages -----------------------------------------------------------------------------

RULES = ("degrees", "settings", "combinations", "placement", "tp_styles")
"""Modules of `parallel` that are arithmetic."""


@every_file
def test_packages(path: Path) -> None:
    mine, found = path.relative_to(ROOT).parts[0], packages(path)
    assert mine == "uni3d" or not found & (set(PACKAGES) - {mine})
    assert mine != "ckpt" or "torch" not in found
    assert not found & {"tests", "examples", "benchmarks"}


def knows_tensors(path: Path) -> bool:
    """Return whether a file imports `parallel` beyond its rules."""
    rules = tuple(f"parallel.{name}." for name in RULES)
    return any(n.split(".")[0] == "parallel" and not n.startswith(rules) for n in imports(path))


def test_one_joint() -> None:
    both = [relative(p) for p in of("uni3d") if "ckpt" in packages(p) and knows_tensors(p)]
    assert {name.split("/")[1] for name in both} <= {"state.py", "checkpoint", "dcp", "engine"}
    layout = {relative(p) for p in of("uni3d") if any("parallel.dtensor_layout" in n for n in imports(p))}
    assert layout == {"uni3d/state.py"}
    kinds = {"Box", "Shard", "ShardSpec", "ArrayKey"}
    makers = {
        relative(path)
        for path in of("uni3d")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and called(node) in kinds
    }
    # Besides: boxes of no tensor, of tensors in foreign files, and of those that DCP's planner has cut.
    assert makers == {f"uni3d/{n}.py" for n in ("state", "estimate/save", "importers/write", "dcp/arrays")}
    importers = {relative(p) for p in of("uni3d") if {f"ckpt.{kind}" for kind in kinds} & set(imports(p))}
    assert importers == makers


# --- 2, 3: who imports whom ----------------------------------------------------------------------------


def test_no_circles() -> None:
    arrows = {name: imported_modules(path) for name, path in MODULES.items()}
    assert sum(map(len, arrows.values())) > 300, "or nothing is checked"
    while leaves := {name for name, targets in arrows.items() if not targets}:
        arrows = {name: targets - leaves for name, targets in arrows.items() if name not in leaves}
    assert not arrows, "each of these imports another of them"


ALLOWED = {
    **{name: set() for name in ("version", "siblings", "zero_to_fp32", "pipe", "units", "argument_names")},
    **{name: {"parallel"} for name in ("config", "stored_model")},
    "json_section": {"ckpt"},
    "manifest": {"ckpt", "parallel", "version", "json_section"},
    "resume_rules": {"argument_names", "json_section", "manifest"},
    "state": {"ckpt", "parallel", "stored_model"},
    **{name: {"config"} for name in ("name_map", "optim")},
    "train_state": {"config", "optim", "parallel", "stored_model"},
    "observe": {"config", "parallel", "train_state"},
    "checkpoint": {
        *("ckpt", "parallel", "config", "manifest", "resume_rules", "state", "train_state", "zero_to_fp32"),
        *("argument_names", "export", "importers", "json_section", "optim", "stored_model"),
    },
    "dcp": {"ckpt", "parallel", "checkpoint", "importers", "manifest", "resume_rules", "state"},
    "export_torch": {"ckpt", "checkpoint", "export", "manifest", "resume_rules"},
    "recovery": {"ckpt", "checkpoint", "export_torch", "importers", "manifest", "state", "zero_to_fp32"},
    "integrations": {"ckpt", "checkpoint"},
    "engine": {
        *("ckpt", "parallel", "config", "manifest", "optim", "observe", "checkpoint", "state", "train_state"),
        "pipe",
    },
    "deepspeed": {"parallel", "config", "engine", "optim", "pipe", "version"},
    "estimate": {"ckpt", "parallel", "config", "manifest", "units"},
    "bench": {"parallel", "config", "engine", "estimate", "observe"},  # trains as a script, beside estimates
    "doctor": {"ckpt", "parallel", "config", "estimate", "importers", "manifest", "resume_rules", "units"},
    "plot": {"ckpt", "parallel", "estimate", "importers", "manifest", "units"},
    "export": {"ckpt", "manifest", "name_map", "zero_to_fp32", "units"},
    "importers": {"ckpt", "config", "manifest", "name_map", "optim", "resume_rules", "zero_to_fp32", "units"},
    "cli": {
        *("ckpt", "parallel", "config", "manifest", "estimate", "doctor", "plot", "export", "importers"),
        *("bench", "export_torch", "name_map", "units", "version", "zero_to_fp32"),
    },
}
"""Imports that each folder and file of `uni3d` may have; `uni3d/__init__.py` may have all but `cli`."""


def room(name: str) -> str:
    """Return a module's package, or its folder or file in `uni3d`."""
    parts = name.split(".")
    return parts[1] if parts[0] == "uni3d" and len(parts) > 1 else parts[0]


@pytest.mark.parametrize("path", of("uni3d"), ids=relative)
def test_allowed_arrows(path: Path) -> None:
    mine = room(module(path))
    found = {room(name) for name in imported_modules(path)} - {mine}
    if mine == "uni3d":
        assert "cli" not in found
    else:
        assert found <= ALLOWED[mine], f"{sorted(found - ALLOWED[mine])} isn't for {mine} to import"


def test_every_room_has_its_arrows() -> None:
    assert {room(module(path)) for path in of("uni3d")} - {"uni3d"} == ALLOWED.keys()


def test_nothing_below_the_engine_names_it() -> None:
    def names(path: Path) -> set[str]:
        tree = parse(path)
        words = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        return words | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}

    users = {relative(path) for path in SOURCES if "Engine" in names(path)}
    assert users <= {"uni3d/engine/build.py"}, "which makes it"


# --- 4: no torch ---------------------------------------------------------------------------------------

NO_TORCH = {
    **{f"parallel/{name}.py": [MODULES[f"parallel.{name}"]] for name in RULES},
    "ckpt": of("ckpt"),
    **{
        name: [path for path in of("uni3d") if room(module(path)) == name]
        for name in ("config", "estimate", "doctor", "plot", "export", "importers", "cli")
    },
    "bench": [MODULES["uni3d.bench"], MODULES["uni3d.bench.request"]],  # a mistake is told at once
    "files": [
        MODULES[f"uni3d.{name}"] for name in ("manifest", "resume_rules", "name_map", "units", "zero_to_fp32")
    ],
}


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)


def test_folders_without_torch() -> None:
    """Import them one after the other in a fresh process, so that the first that loads torch is named."""
    names = [module(path) for paths in NO_TORCH.values() for path in paths]
    done = run(
        f"import importlib, sys\nfor name in {names}:\n"
        "    importlib.import_module(name)\n    assert 'torch' not in sys.modules, name"
    )
    assert done.returncode == 0, done.stderr


COMMANDS = {
    "import uni3d": "import uni3d",
    "read a config": "import uni3d.config; uni3d.config.load_config({'optimizer': {'type': 'AdamW'}})",
    "uni3d --help": "import uni3d.cli\nfor words in [], ['bench']:\n"
    "    try: uni3d.cli.app([*words, '--help'])\n    except SystemExit: pass",
    "uni3d config": "import uni3d.cli, pathlib, tempfile\npath = pathlib.Path(tempfile.mkdtemp(), 'c.json')\n"
    'path.write_text(\'{"train_batch_size": 8, "optimizer": {"type": "RMSprop"}}\')\n'
    "try: uni3d.cli.app(['config', str(path)])\nexcept SystemExit as done: assert not done.code",
    "uni3d doctor": "import ckpt, numpy, tempfile, uni3d.cli\n"
    "shard = ckpt.Shard(ckpt.ShardSpec(ckpt.ArrayKey('w', 'fp32'), 'float32', (4,), ckpt.Box((0,), (4,))),"
    " numpy.ones(4, 'float32'))\n"
    "run, plan = tempfile.mkdtemp(), ckpt.make_plan({0: [shard.spec]})\n"
    "ckpt.save(run, 't', [shard], plan=plan, comm=ckpt.Solo(), document={'step': 1})\n"
    "try: uni3d.cli.app(['doctor', run, '--world-size', '2'])\n"
    "except SystemExit as done: assert done.code == 1",
    "uni3d plot": "import uni3d.cli, pathlib, tempfile\nrun = pathlib.Path(tempfile.mkdtemp())\n"
    'run.joinpath("metrics.jsonl").write_text(\'{"step": 1, "loss": 2.5}\\n\')\n'
    "try: uni3d.cli.app(['plot', str(run), str(run / 'plot.png')])\n"
    "except SystemExit as done: assert not done.code",
    "uni3d plan": "import uni3d.cli\ntry: uni3d.cli.app('plan --params 1B --dp 8 --memory 40GiB'.split())\n"
    "except SystemExit as done: assert not done.code",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_torch_is_loaded(command: str) -> None:
    report = "\nimport json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = run(COMMANDS[command] + report)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not loaded & ({"torch", "zarr", "numpy", "fsspec"} if command == "uni3d --help" else {"torch"})
    assert {"ckpt", "uni3d"} & loaded


# --- 5: one of each ------------------------------------------------------------------------------------


def test_a_public_class_name_is_defined_once() -> None:
    homes: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(relative(path))
    assert len(homes) > 100, "or nothing is checked"
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


def test_one_file_for_each_command() -> None:
    from uni3d.cli import app

    helpers = {"__init__", "terminal", "plan_report"}
    files = {path.stem for path in (ROOT / "uni3d" / "cli").glob("*.py")} - helpers
    commands = {command.name: command.callback for command in app.registered_commands}
    assert commands.keys() == {stem.rstrip("_") for stem in files}, "a file is named as the command is typed"
    for name, function in commands.items():
        assert function.__module__.rstrip("_") == f"uni3d.cli.{name}"


PACKAGE_FILES = [path for path in SOURCES if path.name == "__init__.py"]


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=relative)
def test_a_package_lists_its_modules(path: Path) -> None:
    lines = re.findall(
        r"^ {4,}(\w+(?:, \w+)*)  +\S", ast.get_docstring(parse(path), clean=False) or "", re.MULTILINE
    )
    listed = [name for line in lines for name in line.split(", ")]
    assert sorted(listed) == inside(path)


MANIFEST_KEYS = {
    *("writer", "zero_stage", "shard_group", "imported"),
    *("requires_grad", "left_out", "declared", "aliases", "scalars"),
    *("engine", "global_steps", "global_samples", "skipped_steps", "client_state"),
}
"""Keys that mean nothing else; others (`step`) are forbidden only where the mapping is called `manifest`."""
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


# --- 6, 7: tests, prose, lengths -----------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["ckpt", "parallel"])
def test_tests_import_no_uni3d(folder: str) -> None:
    files = sorted((ROOT / "tests" / folder).glob("*.py"))
    assert len(files) > 5
    assert [path.name for path in files if "uni3d" in packages(path)] == []


@pytest.mark.parametrize("folder", [*PACKAGES, "benchmarks", "examples", "tests"])
def test_docstrings_begin_with_a_verb_or_a_noun(folder: str) -> None:
    fragments = re.compile(r"(What|Of|By|Those|That|Whose|Whether|How|With|In|As|And|From)\b")
    assert not [
        f"{relative(path)}, line {line}"
        for path in (ROOT / folder).rglob("*.py")
        for line, text in docstrings(path)
        if fragments.match(text)
    ]


LONGEST_FILE, LONGEST_FUNCTION, LONGEST_COMMAND = 400, 60, 30


@every_file
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE
    for function in functions(path):
        last = function.end_lineno or 0
        if path.parent.name == "cli" and function.name == path.stem:  # its options and help don't count
            assert last - function.body[0].end_lineno <= LONGEST_COMMAND, function.name
        else:
            assert last - function.lineno < LONGEST_FUNCTION, function.name


def test_files_of_tests_are_short() -> None:
    assert max(len(p.read_text().splitlines()) for p in (ROOT / "tests").rglob("*.py")) <= LONGEST_FILE


# --- 8: globals, pickles -------------------------------------------------------------------------------


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


PICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLING = {("torch", "save"), ("torch", "load"), ("np", "save"), ("np", "load")}
IN_MEMORY = {
    "parallel/host_comm.py": {("pickle", "dumps"), ("pickle", "loads")},
    "uni3d/importers/pickles.py": {("pickle", "Unpickler")},
}
"""Calls never to or from a file; the unpickler of checkpoints refuses what isn't known to be inert."""
SAVERS = ("checkpoint/live_weights", "export_torch/torch_file", "zero_to_fp32", "dcp/reader")
ASKED_FOR = {f"uni3d/{name}.py": {("torch", "save")} for name in SAVERS}
"""Where a user asks for torch's own file, or DCP's planners take values in no other form (in memory)."""


@every_file
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
