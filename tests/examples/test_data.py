"""The example's text: the same on every rank, split without overlap, and refused in one clear line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "megatron_gpt"


def load_example(name: str) -> ModuleType:
    """A file of the example as a module: the examples are scripts, not a package."""
    spec = importlib.util.spec_from_file_location(f"megatron_gpt_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


data = load_example("data")


def test_builtin_is_the_same_each_time_and_split_by_file() -> None:
    train, valid = (data.load_tokens("builtin", split) for split in ("train", "valid"))
    assert train.dtype == np.uint8
    np.testing.assert_array_equal(train, data.load_tokens("builtin", "train"))

    names = [name for name, _ in data.standard_library_files()]
    assert names == sorted(set(names))
    assert not {part for name in names for part in name.split("/")[:-1]} & data.SKIPPED_FOLDERS
    in_valid = sum(map(data.is_valid_document, names))
    assert (valid == data.SEPARATOR).sum() == in_valid
    assert (train == data.SEPARATOR).sum() == len(names) - in_valid
    assert 0.02 < in_valid / len(names) < 0.10
    assert len(train) > 2_000_000


def test_builtin_keeps_whole_documents() -> None:
    name, path = next(pair for pair in data.standard_library_files() if not data.is_valid_document(pair[0]))
    text = path.read_bytes() + bytes([data.SEPARATOR])
    assert data.load_tokens("builtin", "train")[: len(text)].tobytes() == text, name


def test_one_more_document_moves_no_other_to_another_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    names = [f"module_{i}.py" for i in range(200)]
    for name in names:
        (tmp_path / name).write_text(f"# {name}\n")
    before = bytes(data.load_tokens("builtin", "valid"))
    (tmp_path / "module_0a.py").write_text("# one more\n")
    after = bytes(data.load_tokens("builtin", "valid"))
    assert before.replace(b"# one more\n\0", b"") == after.replace(b"# one more\n\0", b"")
    assert 0 < before.count(0) < 30


def test_a_library_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=r"no \*\.py files in .*; give a FILE\.txt or FILE\.bin"):
        data.load_tokens("builtin", "train")


def test_txt_is_its_bytes_and_the_last_of_them_are_valid(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(200)))
    train, valid = (data.load_tokens(str(path), split) for split in ("train", "valid"))
    assert (train.tolist(), valid.tolist()) == (list(range(190)), list(range(190, 200)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_bin_is_mapped_and_the_last_tokens_are_valid(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "tokens.bin"
    ids = np.arange(1000) % 251
    ids.astype(f"<{np.dtype(dtype).str[1:]}").tofile(path)
    train, valid = (data.load_tokens(str(path), split, dtype=dtype) for split in ("train", "valid"))
    assert isinstance(train, np.memmap)
    assert train.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(np.concatenate([train, valid]), ids)
    assert len(valid) == 50


def test_bin_is_uint16_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    np.array([1, 50303, 2], dtype="<u2").tofile(path)
    assert data.load_tokens(str(path), "train").tolist() == [1, 50303, 2]


@pytest.mark.parametrize(("n_tokens", "samples"), [(5, 1), (8, 1), (9, 2), (12, 2), (13, 3)])
def test_samples_follow_each_other_and_targets_are_shifted_by_one(n_tokens: int, samples: int) -> None:
    dataset = data.TokenDataset(np.arange(n_tokens, dtype=np.uint16), 4, vocab_size=256)
    assert len(dataset) == samples
    for i, (inputs, targets) in enumerate(dataset[i] for i in range(samples)):
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.tolist() == [4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3]
        assert targets.tolist() == [4 * i + 1, 4 * i + 2, 4 * i + 3, 4 * i + 4]
    for outside in (samples, -1):
        with pytest.raises(IndexError, match=f"sample {outside} of {samples}"):
            dataset[outside]


def test_samples_make_batches() -> None:
    dataset = data.TokenDataset(np.arange(100, dtype=np.uint8), 8, vocab_size=256)
    inputs, targets = next(iter(torch.utils.data.DataLoader(dataset, batch_size=3)))
    assert inputs.shape == targets.shape == (3, 8)


def test_a_token_beyond_the_vocabulary_is_refused_when_it_is_read() -> None:
    tokens = np.array([1, 2, 3, 4, 5, 300, 7, 8, 9], dtype=np.uint16)
    dataset = data.TokenDataset(tokens, 4, vocab_size=256)
    assert dataset[0][1].tolist() == [2, 3, 4, 5]
    message = r"token 5 has the id 300, but vocab_size\(256\) ends at 255; give the vocab_size"
    with pytest.raises(ValueError, match=message):
        dataset[1]


def test_too_little_text_is_refused() -> None:
    message = r"too little text: 8 tokens, but one sample of seq_len\(8\) needs 9; give more text"
    with pytest.raises(ValueError, match=message):
        data.TokenDataset(np.zeros(8, dtype=np.uint8), 8, vocab_size=256)
    with pytest.raises(ValueError, match=r"seq_len\(0\) must be at least 1"):
        data.TokenDataset(np.zeros(8, dtype=np.uint8), 0, vocab_size=256)


@pytest.mark.parametrize(
    ("name", "content", "dtype", "message"),
    [
        ("missing.txt", None, "uint16", r"missing\.txt: there is no such file; give an existing one"),
        ("missing.bin", None, "uint16", r"missing\.bin: there is no such file"),
        ("text.md", b"text", "uint16", r"text\.md: expected 'builtin', FILE\.txt \(text\) or FILE\.bin"),
        ("empty.txt", b"", "uint16", r"empty\.txt: the file is empty"),
        ("odd.bin", b"abc", "uint16", r"odd\.bin: 3 bytes are not a whole number of uint16 tokens"),
        ("float.bin", b"abcd", "float32", r"dtype 'float32' is unknown, give one of uint8, uint16, uint32"),
    ],
)
def test_bad_sources_are_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, dtype: str, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        data.load_tokens(str(tmp_path / name), "train", dtype=dtype)
    assert "\n" not in str(error.value)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"split 'test' is unknown: give 'train' or 'valid'"):
        data.load_tokens("builtin", "test")
