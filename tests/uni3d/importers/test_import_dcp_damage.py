"""Damaged or malicious distributed checkpoints are refused."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign_files import FIXTURES, RUNS, Runs, assert_bits, expected, saved, source_of, values
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata

from ckpt import CheckpointError
from uni3d.importers.dcp import read_dcp
from uni3d.importers.dcp.layout import ChunkedTensor, FileRange, StoredChunk, check_cover
from uni3d.importers.source import Options


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "dcp_fsdp" / "checkpoint", tmp_path / "checkpoint"))


def change(folder: Path, edit: Callable[[Metadata], None]) -> None:
    """Change `.metadata` and write it back in torch's format."""
    metadata = FileSystemReader(folder).read_metadata()
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_a_flipped_bit_is_found(copy: Path) -> None:
    weight = expected("dcp_fsdp")[0]["fp32/blocks.0.up.weight"]
    (file,) = (f for f in copy.glob("*.distcp") if weight[5:].tobytes() in f.read_bytes())
    data = bytearray(file.read_bytes())
    data[data.index(weight[5:].tobytes()) + 7] ^= 1
    file.write_bytes(data)
    source = source_of(copy)
    with pytest.raises(CheckpointError, match=rf"{file.name} is damaged"):
        values(source)
    values(source_of(copy, verify=False))


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__1_0.distcp is missing; .metadata refers to it"):
        source_of(copy)


def test_a_file_that_was_cut_short_is_named(copy: Path) -> None:
    file = copy / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is truncated: it has \d+ bytes"):
        source_of(copy)


def test_metadata_that_is_cut_short_or_missing(copy: Path) -> None:
    file = copy / ".metadata"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="can't be unpickled"):
        source_of(copy)
    file.rename(copy / "__0.metadata")
    with pytest.raises(CheckpointError, match="one per rank"):
        read_dcp(copy, Options())


def test_a_gap_is_found(copy: Path) -> None:
    def edit(metadata: Metadata) -> None:
        metadata.state_dict_metadata["model.blocks.0.up.weight"].chunks.pop()

    change(copy, edit)
    with pytest.raises(CheckpointError, match=r"model.blocks.0.up.weight has no chunk that covers \[5, 0\]"):
        source_of(copy)


def test_chunks_of_nothing_may_be_anywhere(copy: Path) -> None:
    """Write the empty chunks of ranks without rows, which some torch releases store."""

    def edit(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["model.blocks.0.up.weight"]
        entry.chunks.append(ChunkStorageMetadata(torch.Size([15, 0]), torch.Size([0, 7])))

    change(copy, edit)
    assert_bits(values(source_of(copy)), expected("dcp_fsdp")[0])


def test_a_chunk_of_another_shape_than_the_metadata_says_is_found(copy: Path) -> None:
    def edit(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["model.blocks.0.up.weight"]
        entry.size = torch.Size([7, 10])
        entry.chunks = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([7, 10]))]

    change(copy, edit)
    with pytest.raises(
        CheckpointError, match=r"is float32\[5, 7\], expected float32\[7, 10\] from .metadata"
    ):
        values(source_of(copy, weights_only=True))


@pytest.mark.parametrize("path", ["../__0_0.distcp", "/etc/passwd", "a/../../b", "", "..\\b"])
def test_no_file_outside_of_the_folder_is_opened(copy: Path, path: str) -> None:
    def edit(metadata: Metadata) -> None:
        next(iter(metadata.storage_data.values())).relative_path = path

    change(copy, edit)
    with pytest.raises(CheckpointError, match="outside its folder"):
        source_of(copy)


def test_transforms_are_refused_by_name(copy: Path) -> None:
    def edit(metadata: Metadata) -> None:
        next(iter(metadata.storage_data.values())).transform_descriptors = ["stream.zstd/1"]

    change(copy, edit)
    with pytest.raises(CheckpointError, match=r"written through stream.zstd/1"):
        source_of(copy)


def test_the_format_of_safetensors_is_refused_by_name(tmp_path: Path) -> None:
    folder = saved(
        tmp_path / "dcp", {"w": torch.ones(2)}, serialization_format=SerializationFormat.SAFETENSORS
    )
    with pytest.raises(CheckpointError, match="as safetensors, written by"):
        values(source_of(folder))


def chunked(shape: tuple[int, ...], *boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> ChunkedTensor:
    place = FileRange(file="f", offset=0, length=0)
    chunks = tuple(StoredChunk(offsets=offsets, sizes=sizes, place=place) for offsets, sizes in boxes)
    return ChunkedTensor(name="t", dtype="float32", shape=shape, chunks=chunks)


@pytest.mark.parametrize(
    "tensor",
    [
        chunked((), ((), ())),
        chunked((0, 3), ((0, 0), (0, 3))),
        chunked((0, 3)),
        chunked(
            (4, 4), ((0, 0), (3, 1)), ((0, 1), (1, 3)), ((1, 2), (3, 2)), ((3, 0), (1, 2)), ((1, 1), (2, 1))
        ),
    ],
)
def test_exact_covers_pass(tensor: ChunkedTensor) -> None:
    check_cover("t", tensor)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (chunked((3,)), r"no chunk that covers \[0\]"),
        (chunked(()), r"no chunk that covers \[\]"),
        (chunked((4, 4), ((0, 0), (4, 2)), ((0, 2), (3, 2))), r"no chunk that covers \[3, 2\]"),
        (chunked((4,), ((0,), (3,)), ((2,), (2,))), "overlaps"),
        (chunked((4,), ((0,), (2,)), ((0,), (2,)), ((2,), (2,))), "overlaps"),
        (chunked((4,), ((2,), (3,)), ((0,), (2,))), "beyond its shape"),
        (chunked((4,), ((-1,), (5,))), "beyond its shape"),
    ],
)
def test_others_do_not(tensor: ChunkedTensor, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_cover("t", tensor)


# --- nothing runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", RUNS)
def test_nothing_runs_that_the_metadata_names(copy: Path, tmp_path: Path, how: str) -> None:
    def edit(metadata: Metadata) -> None:
        metadata.planner_data["model.gain"] = Runs(how, tmp_path / "ran")

    change(copy, edit)
    with pytest.raises(CheckpointError, match=rf"\.metadata pickles {RUNS[how]}, which is refused"):
        source_of(copy)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["beside", "optim"])
@pytest.mark.parametrize("how", RUNS)
def test_nothing_runs_that_an_object_names(tmp_path: Path, how: str, key: str) -> None:
    value = Runs(how, tmp_path / "ran")
    state = (
        {"beside": value}
        if key == "beside"
        else {"optim": {"param_groups": [{"lr": value, "params": ["w"]}]}}
    )
    folder = saved(tmp_path / "dcp", {"model": {"w": torch.ones(2)}, **state})
    with pytest.raises(CheckpointError, match=rf"\.distcp pickles {RUNS[how]}, which is refused"):
        source_of(folder)
    assert not (tmp_path / "ran").exists()
