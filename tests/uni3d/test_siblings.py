"""Files and folders named `ckpt` or `parallel` beside a user's script are not in uni3d's way."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ("ckpt", "parallel")

# setuptools' editable install: a finder behind Python's own, so even a folder without code comes first.
EDITABLE = f"""
import importlib.machinery, importlib.util, sys
class Editable:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in ("ckpt", "parallel", "uni3d"):
            return importlib.util.spec_from_file_location(name, f"{REPOSITORY}/{{name}}/__init__.py")
sys.meta_path.insert(sys.meta_path.index(importlib.machinery.PathFinder) + 1, Editable)
"""
FOUND = """
import importlib.util
def found():
    return [importlib.util.find_spec(name).origin for name in ("ckpt", "parallel")]
"""
OURS = str([str(REPOSITORY / name / "__init__.py") for name in NAMES])


@pytest.fixture(params=[pytest.param("wheel", marks=pytest.mark.slow), "editable"])
def environment(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """Environment that finds uni3d as an install of that kind does: on the path, or by a finder."""
    site = REPOSITORY
    if request.param == "editable":
        site = tmp_path / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(EDITABLE)
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    return kept | {"PYTHONPATH": str(site)}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Folder of a user's script."""
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


def python(*arguments: str | Path, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True)


def put(folder: Path, *strangers: str) -> None:
    """Make modules that fail if they are imported, and data folders."""
    for name in strangers:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith(".py"):
            path.write_text("raise SystemExit('the wrong file was imported')\n")
        else:
            path.mkdir()


STRANGERS = {
    "data folders": ("ckpt", "parallel"),
    "modules": ("ckpt.py", "parallel.py"),
    "packages": ("ckpt/__init__.py", "parallel/__init__.py"),
}


@pytest.mark.parametrize("strangers", STRANGERS.values(), ids=list(STRANGERS))
def test_strangers_beside_a_script(project: Path, environment: dict[str, str], strangers: Any) -> None:
    put(project, *strangers)
    code = f"import uni3d, uni3d.cli, ckpt\n{FOUND}\nckpt.save\nprint(found())\n"
    (project / "train.py").write_text(code)
    elsewhere = project.parent
    for arguments, cwd in [((project / "train.py",), elsewhere), (("-c", code), project)]:
        done = python(*arguments, cwd=cwd, env=environment)
        assert (done.returncode, done.stdout) == (0, f"{OURS}\n"), done.stderr


@pytest.mark.slow
def test_the_engine_and_processes_that_are_spawned(project: Path, environment: dict[str, str]) -> None:
    put(project, "ckpt", "parallel.py")
    (project / "train.py").write_text(
        f"import multiprocessing, sys\nimport uni3d\n{FOUND}\n"
        "if __name__ == '__main__':\n"
        "    assert 'torch' not in sys.modules\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(found))\n"
        "    uni3d.Engine, uni3d.PipelineModule\n"
        "    print([sys.modules[name].__file__ for name in ('ckpt', 'parallel')])\n"
    )
    done = python("train.py", cwd=project, env=environment)
    assert (done.returncode, done.stdout) == (0, f"{OURS}\n{OURS}\n"), done.stderr


def test_as_a_module_and_as_a_command(project: Path, environment: dict[str, str]) -> None:
    put(project, "ckpt", "parallel.py")
    (project / "bin").mkdir()
    (project / "bin" / "uni3d").write_text("from uni3d.cli import main\nmain()\n")  # as pip writes it
    for arguments in (["-m", "uni3d.zero_to_fp32", "--help"], ["bin/uni3d", "plan", "--params", "1B"]):
        done = python(*arguments, cwd=project, env=environment)
        assert done.returncode == 0, done.stderr


def refusal(name: str, path: Path) -> str:
    return (
        f"uni3d needs the name {name!r} for its own package, {REPOSITORY / name}, but {path} was imported "
        f"under that name before uni3d; rename yours, or move it into a package. If you meant "
        f"uni3d's {name!r}, import uni3d first\n"
    )


def import_both(project: Path, name: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Import a module and then uni3d, and print uni3d's error."""
    (project / "train.py").write_text(
        f"import sys\nimport {name}\n"
        "try:\n    import uni3d\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        f"    assert sys.modules[{name!r}] is {name} and 'uni3d' not in sys.modules\n"
    )
    return python("train.py", cwd=project, env=environment)


@pytest.mark.parametrize("stranger", ["ckpt.py", "parallel.py", "parallel/__init__.py"])
def test_a_module_in_use_is_named_and_kept(project: Path, environment: dict[str, str], stranger: str) -> None:
    path = project / stranger
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    name = Path(stranger).parts[0].removesuffix(".py")
    done = import_both(project, name, environment)
    assert (done.returncode, done.stdout) == (0, refusal(name, path)), done.stderr


@pytest.mark.parametrize("environment", ["editable"], indirect=True)
def test_a_data_folder_that_was_imported_is_named(project: Path, environment: dict[str, str]) -> None:
    put(project, "ckpt")
    done = import_both(project, "ckpt", environment)
    assert (done.returncode, done.stdout) == (0, refusal("ckpt", project / "ckpt")), done.stderr


def test_a_module_that_imports_uni3d_itself(project: Path, environment: dict[str, str]) -> None:
    (project / "parallel.py").write_text("import uni3d\n")
    done = python("-c", "import parallel", cwd=project, env=environment)
    assert done.returncode == 1
    assert f"but {project / 'parallel.py'} was imported under that name before uni3d" in done.stderr


def test_reloads(project: Path, environment: dict[str, str]) -> None:
    put(project, "ckpt.py", "parallel")
    code = (
        f"import importlib, sys\nimport ckpt_user, uni3d, ckpt\n{FOUND}\n"
        "finders = list(sys.meta_path)\n"
        "for module in (uni3d, ckpt, uni3d): importlib.reload(module)\n"
        "assert sys.meta_path == finders\nprint(found())\n"
    )
    (project / "ckpt_user.py").write_text("")  # other names are left alone
    done = python("-c", code, cwd=project, env=environment)
    assert (done.returncode, done.stdout) == (0, f"{OURS}\n"), done.stderr


def test_packages_found_through_links_are_ours(project: Path) -> None:
    for name in (*NAMES, "uni3d"):
        (project / name).symlink_to(REPOSITORY / name)
    environment = os.environ | {"PYTHONPATH": str(project)}
    done = python("-c", "import ckpt, uni3d; assert ckpt.save", cwd=project, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_missing_package_is_named(project: Path) -> None:
    shutil.copytree(REPOSITORY / "uni3d", project / "uni3d", ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"PYTHONPATH": str(project)}
    done = python("-c", "import uni3d", cwd=project, env=environment)
    assert done.returncode == 1
    assert f"uni3d's package 'ckpt' is missing: expected {project / 'ckpt' / '__init__.py'}" in done.stderr
