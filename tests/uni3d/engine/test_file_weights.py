"""`initialize(..., weights=path)`: exactly the model's tensors, read from safetensors."""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from fresh_memory import fresh_memory_is_nan
from marks import slow
from models import (
    OwnLoss,
    Stack,
    assert_same,
    global_batches,
    make_engine,
    save_and_wait,
    seeded,
    train,
    train_plainly,
    whole,
)
from ranks import Ranks
from safetensors.torch import save_file
from torch import Tensor, nn

import ckpt
import parallel
from uni3d.importers.tensor_parts import read_parts

MODELS: dict[str, Callable[..., nn.Module]] = {"ties_and_buffers": OwnLoss, "stages": Stack}


def stored(kind: str) -> nn.Module:
    """Return a model with weights and buffers that none is built with."""
    model = seeded(MODELS[kind])
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor += 3 if name == "calls" else 0.25
    return model


def save(model: nn.Module, path: Path, but: str = "decode.weight", **more: Tensor) -> None:
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != but}
    save_file(tensors | more, path)


def filled_case(kind: str, zero: int, pp: int, where: str, path: Path) -> Any:
    with parallel.meta_parameters() if where == "meta" else torch.device("cpu"):
        model = seeded(MODELS[kind])
    with fresh_memory_is_nan():
        engine = make_engine(model, zero=zero, pp=pp, weights=path)
    found = whole(engine.module)
    return found, train(engine, global_batches(2))


@pytest.mark.parametrize("where", ["meta", "cpu"])
@pytest.mark.parametrize(
    ("kind", "zero", "pp", "left_out"),
    [
        ("ties_and_buffers", 3, 1, "decode.weight"),
        slow("ties_and_buffers", 0, 1, "encode.weight"),
        ("stages", 1, 2, ""),
        slow("stages", 3, 1, ""),
    ],
)
def test_the_model_has_the_stored_tensors(
    ranks: Ranks, tmp_path: Path, kind: str, zero: int, pp: int, left_out: str, where: str
) -> None:
    expected = stored(kind)
    save(expected, tmp_path / "w.safetensors", but=left_out)
    losses = train_plainly(expected, global_batches(2))[0]
    together: dict[str, Tensor] = {}
    for found, again in ranks.run(2, filled_case, kind, zero, pp, where, tmp_path / "w.safetensors"):
        assert again == pytest.approx(losses, rel=1e-5)
        together |= found
    assert_same(together, expected)


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (
        lambda t: (t.pop("out.bias"), t.pop("calls")),
        "2 missing: out.bias, calls",
    ),
    "tied and missing": (
        lambda t: (t.pop("encode.weight"), t.pop("decode.weight")),
        "1 missing: encode.weight",
    ),
    "unexpected": (
        lambda t: t.update(more=torch.ones(1), scratch=torch.ones(2)),
        "2 not in the model: more, scratch",
    ),
    "shape": (
        lambda t: t.update({"out.weight": torch.ones(2, 6)}),
        "1 of another shape or type: out.weight is float32[2, 6], in the model float32[1, 6]",
    ),
    "type": (
        lambda t: t.update({"out.bias": torch.ones(1, dtype=torch.int8), "calls": torch.ones(())}),
        "2 of another shape or type: calls is float32[], in the model int64[], out.bias is int8[1], in the",
    ),
    "all of it": (
        lambda t: (t.pop("out.bias"), t.update(more=torch.ones(1))),
        "weights in {path} don't fit the model: 1 missing: out.bias; 1 not in the model: more (rank 0)",
    ),
    "ties that differ": (
        lambda t: t.update({"decode.weight": t["encode.weight"] + 1}),
        "{path} has other values in decode.weight than under another name of the weight, which the model",
    ),
}


def wrong_case(folder: Path) -> dict[str, str]:
    errors = {}
    for name in WRONG:
        with pytest.raises(ckpt.CheckpointError) as caught:
            make_engine(seeded(OwnLoss), zero=3, weights=folder / f"{name}.safetensors")
        errors[name] = str(caught.value)
    return errors


def test_other_tensors_are_one_error_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    for name, (change, _) in WRONG.items():
        tensors = {n: t.clone() for n, t in stored("ties_and_buffers").state_dict().items()}
        change(tensors)
        save_file(tensors, tmp_path / f"{name}.safetensors")
    first, second = ranks.run(2, wrong_case, tmp_path)
    for name, (_, message) in WRONG.items():
        expected = message.format(path=tmp_path / f"{name}.safetensors")
        assert expected in first[name]
        assert second[name] == first[name]


def test_what_is_no_file_of_weights_is_refused(alone: None, tmp_path: Path) -> None:
    with pytest.raises(ckpt.CheckpointError, match=r"weights=.*nothing doesn't exist; give a safetensors"):
        make_engine(seeded(Stack), weights=tmp_path / "nothing")
    with pytest.raises(ckpt.CheckpointError, match="weights=s3://a/b: weights are read from files, not"):
        make_engine(seeded(Stack), weights="s3://a/b")
    with pytest.raises(ckpt.CheckpointError, match=r"has no file \*\.safetensors with weights"):
        make_engine(seeded(Stack), weights=tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 4)
    with pytest.raises(ckpt.CheckpointError, match="isn't a complete safetensors file"):
        make_engine(seeded(Stack), weights=tmp_path / "cut.safetensors")
    run = tmp_path / "run"
    save_and_wait(make_engine(seeded(Stack)), run)
    for folder in (run, run / "global_step0"):
        with pytest.raises(ckpt.CheckpointError, match=r"is a run of uni3d.*give it as resume="):
            make_engine(seeded(Stack), weights=folder)


def test_parts_of_any_type_and_form(tmp_path: Path) -> None:
    values = torch.randn(5, 6, 7)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool):
        tensors = {"a": values.to(dtype), "scalar": values[0, 0, 0].clone().to(dtype)}
        save_file(tensors, tmp_path / "w")
        for part in [
            (slice(0, 5), slice(0, 6), slice(0, 7)),
            (slice(2, 4), slice(0, 6), slice(0, 7)),
            (slice(1, 2), slice(3, 6), slice(2, 5)),
        ]:
            (found, scalar) = read_parts(tmp_path / "w", [("a", part), ("scalar", ())])
            bits = np.uint16 if found.dtype == ml_dtypes.bfloat16 else found.dtype
            wanted = tensors["a"][part]
            wanted = wanted.view(torch.uint16) if dtype == torch.bfloat16 else wanted
            assert np.array_equal(found.view(bits), wanted.numpy())
            assert scalar.shape == ()


def resident() -> int:
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_rest_of_a_tensor_is_not_read(tmp_path: Path) -> None:
    rows, width, head = (
        1 << 14,
        1 << 12,
        b'{"w":{"dtype":"F32","shape":[16384,4096],"data_offsets":[0,268435456]}}',
    )
    with (tmp_path / "w").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + 4 * rows * width)  # a hole, of 256 MiB
    before = resident()
    parts = read_parts(tmp_path / "w", [("w", (slice(64, 128), slice(0, width)))])
    (part,) = [(array, resident()) for array in parts][:1]
    assert part[0].nbytes == 1 << 20
    assert part[1] - before < 8 << 20
