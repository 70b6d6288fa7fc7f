"""Run the command `uni3d` in the test's own process, which is faster than starting one per command."""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple
from unittest import mock

from uni3d.cli import main


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str

    @property
    def words(self) -> str:
        """Output joined into one line."""
        return " ".join(self.stdout.split())


def run(*arguments: object) -> Done:
    """Run `uni3d ARGUMENTS`, and return its exit code and output."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = ["uni3d", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def answer(*arguments: object) -> Any:
    """Run a command that must succeed; return its JSON output."""
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(*arguments: object) -> str:
    """Run a command that must exit with 1 and print nothing but an error in one line; return its text."""
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix("error: ").rstrip("\n")
