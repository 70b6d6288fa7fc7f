"""Foreign pickles run no code: malicious files of every kind are refused by name."""

import io
import pickle
import pickletools
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_files import Runs, rewritten
from imported import imported, refused, source

from ckpt import CheckpointError
from uni3d.importers.pickles import StandIn, plain, read_pickle


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """Return the path of a file that exists only if code ran."""
    return tmp_path / "it-ran"


def poisoned(path: Path, proof: Path) -> None:
    """Put a malicious object into a file of torch.save."""
    rewritten(path, lambda _: pickle.dumps({"x": Runs("os.system", proof)}, protocol=2))


def test_the_poison_works(tmp_path: Path, proof: Path) -> None:
    """Check that the malicious object works, so that the tests below can fail."""
    torch.save({"x": torch.ones(2)}, tmp_path / "x.pt")
    poisoned(tmp_path / "x.pt", proof)
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert proof.exists()


KINDS = {
    "a state_dict": ("weights_bin", "pytorch_model.bin"),
    "one of a folder's state_dicts": ("weights_bin_sharded", "pytorch_model-00002-of-00002.bin"),
    "DeepSpeed's model file": ("deepspeed_zero1_bf16", "*/mp_rank_00_model_states.pt"),
    "DeepSpeed's optimizer file": ("deepspeed_zero1_bf16", "*/*rank_1_*optim_states.pt"),
    "ZeRO-3's model file": ("deepspeed_zero3_fp32", "*/zero_pp_rank_1_*model_states.pt"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_runs(tmp_path: Path, proof: Path, kind: str) -> None:
    name, pattern = KINDS[kind]
    folder = Path(shutil.copytree(source(name), tmp_path / "theirs"))
    (path,) = folder.glob(pattern)
    poisoned(path, proof)
    told = refused(folder, tmp_path / "run")
    assert path.name in told
    assert "posix.system" in told
    assert "refused" in told
    assert "--stand-in" not in told
    assert not proof.exists()
    assert not (tmp_path / "run").exists()


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("x/constants.pkl", pickle.dumps((), protocol=2))
    assert "TorchScript" in refused(tmp_path / "x.pt", tmp_path / "run")


def test_a_tensor_may_not_be_larger_than_what_it_is_stored_in(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(2**40)}, tmp_path / "x.pt")
    assert "repeats elements of its storage" in refused(tmp_path / "x.pt", tmp_path / "run")


# --- the unpickler by itself ----------------------------------------------------------------------------


def assembled(*lines: bytes) -> bytes:
    return b"\x80\x02" + b"".join(lines) + b"."


def call(module: str, name: str, *args: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(args) + b"tR"


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


ATTACKS = {
    "eval": assembled(call("builtins", "eval", text("1"))),
    "exec of Python 2": assembled(call("__builtin__", "exec", text("1"))),
    "getattr": assembled(call("builtins", "getattr", text("x"), text("y"))),
    "import": assembled(call("builtins", "__import__", text("os"))),
    "open": assembled(call("builtins", "open", text("/etc/passwd"))),
    "a module of a framework with a dot": assembled(call("torch.distributed", "os.system", text("true"))),
    "torch.load": assembled(call("torch.serialization", "load", text("x"))),
    "torch.hub": assembled(call("torch.hub", "load", text("x"), text("y"))),
    "numpy's own loader": assembled(call("numpy", "load", text("x"))),
    "a class by its like name": assembled(call("deepspeedx.evil", "Run")),
    "functools": assembled(call("functools", "partial", b"cbuiltins\neval\n", text("1"))),
    "another pickle": assembled(call("pickle", "loads", text("x"))),
    "an extension": assembled(b"\x82\x01"),
    "a persistent id": assembled(text("x"), b"Q"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack(attack: str) -> None:
    if attack == "a module of a framework with a dot":  # a stand-in, which does nothing
        assert isinstance(read_pickle(ATTACKS[attack], "the file"), StandIn)
        return
    with pytest.raises(CheckpointError, match="the file"):
        read_pickle(ATTACKS[attack], "the file")


CHANGES: dict[str, Callable[[], bytes]] = {
    # BUILD with a pair sets attributes of whatever was named; none of ours may be changed.
    "a function": lambda: assembled(b"c_codecs\nencode\n", b"N}", text("_call"), b"Ns\x86b"),
    "a stand-in's class": lambda: assembled(b"cdeepspeed.x\nY\n", b"N}", text("args"), b"Ns\x86b"),
    "a type": lambda: assembled(b"cbuiltins\nlist\n", b"N}", text("name"), b"Ns\x86b"),
    "a class of Python's": lambda: assembled(b"ccollections\nOrderedDict\n", b"N}", text("x"), b"Ns\x86b"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_that_is_named_can_be_changed(change: str) -> None:
    data = CHANGES[change]()
    pickletools.dis(data, out=io.StringIO())  # it is a pickle
    with pytest.raises(CheckpointError, match="can't be unpickled"):
        read_pickle(data, "the file")


def test_an_array_of_objects_is_refused() -> None:
    for value in (np.array([{"a": 1}], dtype=object), np.dtype("O")):
        with pytest.raises(CheckpointError, match="of the type O"):
            read_pickle(pickle.dumps(value, protocol=2), "the file")


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_things_come_back(protocol: int) -> None:
    value = {
        "numbers": [1, -(2**70), 1.5, True, None, complex(1, 2), np.float64(2.5).item()],
        "texts": ("a", b"bytes", bytearray(b"more")),
        "sets": [{1, 2}, frozenset({3})],
        "ordered": OrderedDict(a=1),
        "others": [slice(1, 2, None), range(3)],
    }
    assert read_pickle(pickle.dumps(value, protocol), "the file") == value
    assert plain(read_pickle(pickle.dumps(np.arange(6).reshape(2, 3), protocol), "x")) == [
        [0, 1, 2],
        [3, 4, 5],
    ]


def test_the_user_s_own_classes_are_left_out_if_asked(tmp_path: Path) -> None:
    weights = {"w": torch.ones(2), "how": Mine()}
    torch.save(weights, tmp_path / "x.pt")
    name = f"{Mine.__module__}.Mine"
    assert f"add --stand-in {name}" in refused(tmp_path / "x.pt", tmp_path / "run")
    said = imported(tmp_path / "x.pt", tmp_path / "run", "--stand-in", name)
    assert said["left_out"] == ["how: not a tensor"]


class Mine:
    def __init__(self) -> None:
        self.value = 3
