"""Data of the example: the same on every rank, split without overlap; errors in one clear line."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "megatron_gpt"


def load_example(name: str) -> ModuleType:
    """Load a file of the example as a module. The examples are scripts, not a package."""
    spec = importlib.util.spec_from_file_location(f"megatron_gpt_{name}", EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


data = load_example("data")


def test_builtin_is_the_same_sentences_each_time() -> None:
    train, valid = (data.load_tokens("builtin", split) for split in ("train", "valid"))
    assert train.dtype == np.uint8
    np.testing.assert_array_equal(train, data.load_tokens("builtin", "train"))
    lines = train.tobytes().decode().splitlines()
    assert len(lines) == data.SENTENCES["train"]
    # Fixed for all machines and Python versions: a run may resume on another machine.
    assert lines[0] == "This morning the red owl finds the big owl under the bridge."
    form = r"(This morning|At noon|One evening|Yesterday) the \w+ \w+ \w+ the \w+ \w+ [a-z ]+\."
    assert all(re.fullmatch(form, line) for line in lines[:1000])
    assert lines[:100] != valid.tobytes().decode().splitlines()[:100]


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
    message = r"token 5 has id 300, but the largest id of vocab_size\(256\) is 255; use the vocab_size"
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
        ("missing.txt", None, "uint16", r"missing\.txt: no such file; give an existing file"),
        ("missing.bin", None, "uint16", r"missing\.bin: no such file"),
        ("text.md", b"text", "uint16", r"text\.md: expected 'builtin', FILE\.txt \(text\) or FILE\.bin"),
        ("empty.txt", b"", "uint16", r"empty\.txt: the file is empty"),
        ("odd.bin", b"abc", "uint16", r"odd\.bin: 3 bytes are not a whole number of uint16 tokens"),
        ("float.bin", b"abcd", "float32", r"dtype 'float32' is unknown; expected one of uint8, uint16,"),
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
    with pytest.raises(ValueError, match=r"split 'test' is unknown; expected 'train' or 'valid'"):
        data.load_tokens("builtin", "test")
