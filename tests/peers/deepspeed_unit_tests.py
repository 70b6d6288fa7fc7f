"""Run DeepSpeed's own unit tests on uni3d, on CPU with gloo.

    python tests/peers/deepspeed_unit_tests.py CHECKOUT [--only PART ...] [--out FOLDER]

CHECKOUT is a working copy of DeepSpeed's repository, of which `tests/` alone is used: it is copied, so that
no `deepspeed` but uni3d's names can be imported. Nothing is filled in: a name that uni3d lacks is a failure.
A test that takes longer than `--timeout` seconds is killed and counts as a hang, and the others run on.

This file is also the pytest plugin of the run: it writes a line of JSON as a test begins and as it ends, and
loads torch and uni3d once for all the processes that DeepSpeed's tests fork.
"""

import argparse
import collections
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from deepspeed_unit_reasons import COUNTED, FURTHER, reason_of  # noqa: E402

EVENTS = "UNI3D_DEEPSPEED_TESTS_EVENTS"
DONE = "UNI3D_DEEPSPEED_TESTS_DONE"
STAND_IN = "import sys\n\ndel sys.modules[__name__]\nfrom uni3d.deepspeed import install\n\ninstall()\n"
WORKERS = """
import _pytest.python_api


def fail(reason, pytrace=True):
    raise AssertionError(reason)


_pytest.python_api.fail = fail
"""
"""For the processes of DeepSpeed's pools: one that pytest's own exception ends is waited for for ever."""
Row = dict[str, str]


# --- the plugin, inside a run ------------------------------------------------------------------------


def _write(**event: str) -> None:
    with open(os.environ[EVENTS], "a") as file:
        file.write(json.dumps(event) + "\n")


def pytest_configure(config) -> None:
    if EVENTS in os.environ:
        import deepspeed  # noqa: F401
        import torch.multiprocessing

        ours = [f"uni3d.deepspeed.{path.stem}" for path in HERE.parents[1].glob("uni3d/deepspeed/*.py")]
        torch.multiprocessing.set_forkserver_preload(
            ["deepspeed", *ours, "unit_test_worker", "unit.simple_model"]
        )


@pytest.hookimpl(trylast=True)  # behind the marks that DeepSpeed's settings deselect
def pytest_collection_modifyitems(config, items) -> None:
    done = set(Path(os.environ[DONE]).read_text().splitlines())
    items[:] = [item for item in items if item.nodeid not in done]
    for item in items:
        _write(event="found", test=item.nodeid)


def pytest_collectreport(report) -> None:
    if report.failed:
        _write(event="broken", test=report.nodeid, error=_last_line(str(report.longrepr)))
    elif report.skipped and report.nodeid.endswith(".py"):
        _write(event="left", test=report.nodeid, error=_skip_reason(report))


def pytest_runtest_logstart(nodeid, location) -> None:
    _write(event="begin", test=nodeid)


def pytest_runtest_logreport(report) -> None:
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        error = crash.message if crash else str(report.longrepr)
        _write(event="failed", test=report.nodeid, error=_short(error), long=str(report.longrepr)[-6000:])
    elif report.skipped:
        kind = "xfailed" if hasattr(report, "wasxfail") else "skipped"
        _write(event=kind, test=report.nodeid, error=_skip_reason(report))
    elif report.when == "call":
        _write(event="passed", test=report.nodeid, error="")


def _skip_reason(report) -> str:
    return _short(str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr))


def _short(text: str) -> str:
    return " ".join(text.split())[:400]


def _last_line(text: str) -> str:
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return _short(errors[-1] if errors else text)


# --- the runner --------------------------------------------------------------------------------------


def run_files(tests: Path, names: list[str], env: dict[str, str], timeout: float) -> list[Row]:
    """Return a row for each test of these files; the run begins again behind a test that had to be killed."""
    rows: dict[str, Row] = {}
    found: dict[str, None] = {}
    Path(env[EVENTS]).write_text("")
    while names:
        Path(env[DONE]).write_text("\n".join(rows))
        hanging = _run_once(tests, names, env, timeout)
        for event in _events(env):
            file = event["test"].split("::")[0].removeprefix("unit/")
            if event["event"] == "found":
                found[event["test"]] = None
            elif event["event"] in ("broken", "left"):
                result = "failed" if event["event"] == "broken" else "skipped"
                for number in range({**COUNTED, **FURTHER}[file]):
                    test = f"{event['test']}::{number}"
                    rows[test] = {**event, "test": test, "file": file, "result": result}
            elif event["event"] != "begin":  # one that fails to end cleanly has passed first: the last counts
                rows[event["test"]] = {**event, "file": file, "result": event["event"]}
        if hanging is None or hanging in rows:
            break
        file = hanging.split("::")[0].removeprefix("unit/")
        rows[hanging] = {"file": file, "test": hanging, "result": "hang", "error": f"over {timeout:g} s"}
    for test in found:
        file = test.split("::")[0].removeprefix("unit/")
        rows.setdefault(
            test, {"file": file, "test": test, "result": "failed", "error": "the run ended early"}
        )
    return list(rows.values())


def _events(env: dict[str, str]) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(env[EVENTS]).read_text().splitlines()]


def _run_once(tests: Path, names: list[str], env: dict[str, str], timeout: float) -> str | None:
    """Run what is left of the files. Return the test that was under way when the run died, if any."""
    command = [sys.executable, "-m", "pytest", "-p", "deepspeed_unit_tests", "-p", "no:cacheprovider", "-q"]
    with open(env[EVENTS] + ".log", "a") as log:
        run = subprocess.Popen(
            [*command, "--continue-on-collection-errors", *(f"unit/{name}" for name in names)],
            cwd=tests,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        killed, size = False, os.stat(env[EVENTS]).st_size
        while run.poll() is None and not killed:
            time.sleep(0.2)
            state = os.stat(env[EVENTS])
            allowed = timeout if state.st_size > size else 10 * timeout  # imports come first
            killed = time.time() - state.st_mtime > allowed
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)  # with all that its tests started
        run.wait()
    last = next((e for e in reversed(_events(env)) if e["event"] != "found"), None)
    return last["test"] if last and last["event"] == "begin" else None


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of the runs, with a `deepspeed` that is uni3d's."""
    names = folder / "names"
    names.mkdir()
    (names / "deepspeed.py").write_text(STAND_IN)
    (names / "unit_test_worker.py").write_text(WORKERS)
    path = [str(names), str(HERE), str(HERE.parents[1]), str(folder / "tests")]
    settings = {
        "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "LOCAL_SIZE": "8",  # how many "devices" a machine of CPUs has for DeepSpeed
        "OMP_NUM_THREADS": "1",
        "DS_UNITTEST_TIMEOUT": "100000",  # ours is shorter, and doesn't end the run
        EVENTS: str(folder / "events"),
        DONE: str(folder / "done"),
    }
    return {**os.environ, **settings}


def table(rows: list[Row]) -> str:
    """Return a line for each file: how many passed, and why the others didn't."""
    results = ("passed", "insides", "cuda", "refused", "not yet")
    lines = [f"| file | tests | {' | '.join(results)} | hang |", "| --- |" + " --- |" * 7]
    counts = collections.defaultdict(collections.Counter)
    for row in rows:
        for file in (row["file"], "**all**"):
            counts[file][row["reason"]] += 1
            counts[file]["hang"] += row["result"] == "hang"
    for file in [f for f in counts if f != "**all**"] + ["**all**"]:
        found = counts[file]
        numbers = [sum(found[r] for r in results), *(found[r] for r in results), found["hang"]]
        lines.append(f"| {file} | " + " | ".join(str(n or "") for n in numbers) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the names of the files to run")
    parser.add_argument("--further", action="store_true", help="run the files of the second list")
    parser.add_argument("--out", type=Path, default=Path("deepspeed-tests"))
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one test")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(args.checkout / "tests", folder / "tests", symlinks=True)
        env = environment(folder)
        names = [n for n in (FURTHER if args.further else COUNTED) if any(part in n for part in args.only)]
        rows = run_files(folder / "tests", names, env, args.timeout)
        for row in rows:
            row["reason"] = reason_of(row)
        (args.out / "tests.json").write_text(json.dumps(rows, indent=1))
        shutil.copy(env[EVENTS] + ".log", args.out / "log.txt")
    print(table(rows))


if __name__ == "__main__":
    main()
