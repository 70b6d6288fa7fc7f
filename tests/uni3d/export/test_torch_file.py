"""Files of `torch.save`, written without holding the tensors."""

import errno
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import answer, refused
from whole_arrays import save_whole

import ckpt
from ckpt.stores import files


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Save tensors of several types and sizes; return them."""
    random = np.random.default_rng(0)
    arrays = {
        "wide": random.standard_normal((700, 2500)).astype(np.float32),
        "one": np.array([1.5], np.float32),
        "none": np.zeros((0, 3), np.float32),
    }
    buffers = {"count": np.array(7), "mask": random.random((5, 3)) > 0.5, "half": np.ones(3, np.float16)}
    parts = {(name, "fp32"): x for name, x in arrays.items()}
    parts |= {(name, "value"): x for name, x in buffers.items()} | {("wide", "exp_avg"): arrays["wide"] + 1}
    save_whole(folder, "t1", parts, step=1, aliases={"again": "wide"})
    return arrays | buffers


def test_it_is_what_torch_itself_would_have_written(tmp_path: Path) -> None:
    """Values and ties come back, and a zip reader finds the checksums right, as importers ask."""
    expected, path = stored(tmp_path / "run"), tmp_path / "out.pt"
    row = answer("export", tmp_path / "run", path, "--format", "torch")
    assert row["bytes"] == path.stat().st_size
    for mapped in (False, True):
        found = torch.load(path, weights_only=True, mmap=mapped)
        assert found.keys() == {*expected, "again"}
        for name, array in expected.items():
            assert found[name].numpy().dtype == array.dtype
            assert found[name].shape == array.shape
            assert found[name].numpy().tobytes() == array.tobytes()
        assert found["again"].data_ptr() == found["wide"].data_ptr()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    torch.save(found, tmp_path / "torch.pt")
    assert path.stat().st_size < (tmp_path / "torch.pt").stat().st_size + 1000
    answer("import", path, tmp_path / "back")
    back = ckpt.open_checkpoint(tmp_path / "back")
    assert back.read("wide", "fp32").tobytes() == expected["wide"].tobytes()


def test_a_damaged_checksum_is_found(tmp_path: Path) -> None:
    """The checksums are those of the bytes, not left at zero."""
    stored(tmp_path / "run")
    path = tmp_path / "out.pt"
    answer("export", tmp_path / "run", path)
    with zipfile.ZipFile(path) as archive:
        large = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    data[large.header_offset + 5_000_000] ^= 1
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == large.filename
    assert "CRC-32" in refused("import", path, tmp_path / "back")


MEASURED = """
import resource, sys
from pathlib import Path
import ckpt
from uni3d.export_torch.torch_file import write_torch_file
run = Path(sys.argv[1])
checkpoint = ckpt.open_checkpoint(run)
infos = ckpt.weights(checkpoint)
write_torch_file(checkpoint, run / "warm.pt", {"s": infos["s"]})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_torch_file(checkpoint, run / "out.pt", infos)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    arrays = {(f"w{i}", "fp32"): np.full((8, 1 << 20), i, np.float32) for i in range(6)}
    save_whole(tmp_path, "t1", arrays | {("s", "fp32"): np.ones(3, np.float32)}, step=1)
    total = sum(x.nbytes for x in arrays.values())
    command = [sys.executable, "-c", MEASURED, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < total / 4, "192 MiB in bands of 4 MiB"
    found = torch.load(tmp_path / "out.pt", weights_only=True, mmap=True)
    assert all((found[f"w{i}"] == i).all() for i in range(6))


@pytest.mark.parametrize("at", ["head", "tensors"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    stored(tmp_path / "run")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if at == "head":
        monkeypatch.setattr(torch, "save", full)
    else:
        monkeypatch.setattr(files, "write_at", full)
    assert "No space left" in refused("export", tmp_path / "run", tmp_path / "out.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
