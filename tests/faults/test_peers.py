"""The trial of other libraries: it runs, and finds the file that `torch.save` leaves half written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("peers.py")


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_a_torn_file_of_torch_save_is_found(tmp_path: Path) -> None:
    sizes = ["--points", "6", "--cuts", "0", "--damages", "0", "--ways", "over"]
    command = [sys.executable, str(SCRIPT), "--peers", "torch.save", *sizes]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (theirs,) = json.loads((tmp_path / "out").read_text())
    torn = theirs["ways"]["over"]["kill"]
    assert torn["points"] == 6
    assert torn["torn"] == torn["lost"] > 0
    assert "| over | 6 |" in done.stdout
