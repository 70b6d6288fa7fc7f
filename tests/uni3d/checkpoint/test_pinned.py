"""Loads into a GPU's memory through pinned buffers; the CPU's memory stands for the GPU's."""

from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckpt
from uni3d.checkpoint import pinned
from uni3d.checkpoint.pinned import DeviceArray, PinnedMemory, targets_of
from uni3d.state import Held

CPU = torch.device("cpu")


@given(shape=st.lists(st.integers(1, 9), max_size=3), size=st.integers(8, 200), data=st.data())
def test_parts_of_any_size_and_strides(shape: list[int], size: int, data: st.DataObject) -> None:
    """A buffer of `size` bytes holds less than many of the parts."""
    filled = torch.zeros(shape[::-1], dtype=torch.float64).permute(tuple(reversed(range(len(shape)))))
    expected = np.zeros(shape)
    begin = [data.draw(st.integers(0, n - 1)) for n in shape]
    part = tuple(slice(b, data.draw(st.integers(b + 1, n))) for b, n in zip(begin, shape, strict=True))
    values = np.random.default_rng(0).normal(size=[s.stop - s.start for s in part][::-1]).T
    with mock.patch.multiple(pinned, BUFFER_BYTES=size, MOST_BYTES=2 * size):
        DeviceArray(filled, PinnedMemory(CPU))[part or ...] = values
    expected[part or ...] = values
    assert np.array_equal(filled.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool])
def test_types(dtype: torch.dtype) -> None:
    filled = torch.zeros(4, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    DeviceArray(filled, PinnedMemory(CPU))[(slice(1, 3),)] = np.ones(2, ckpt.numpy_dtype(name))
    assert filled.tolist() == [0, 1, 1, 0]


def test_a_tensor_without_memory_is_refused() -> None:
    spec = ckpt.ShardSpec(ckpt.ArrayKey("norm.mean", "value"), "float32", (2,), ckpt.Box.whole((2,)))
    held = Held(spec, torch.empty(2, device="meta"), {})
    with pytest.raises(ckpt.CheckpointError, match=r"norm\.mean/value is on the meta device"):
        targets_of([held], CPU)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads share three buffers, and one alone needs one."""
    monkeypatch.setattr(pinned, "MOST_BYTES", 3 * pinned.BUFFER_BYTES)
    made: list[int] = []
    empty = torch.empty

    def counted(size: int, **settings: object) -> torch.Tensor:
        made.append(size)
        return empty(size, dtype=torch.uint8)

    monkeypatch.setattr(torch, "empty", counted)
    memory, filled = PinnedMemory(CPU), torch.zeros(64, 1000)
    array = DeviceArray(filled, memory)

    def fill(row: int) -> None:
        array[slice(row, row + 1), slice(None)] = np.full((1, 1000), row, np.float32)

    for row in range(8):
        fill(row)
    assert made == [pinned.BUFFER_BYTES]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(fill, range(64)))
    assert len(made) <= 3
    assert torch.equal(filled[:, 7], torch.arange(64.0))
