"""Text as tokens, and tokens as samples: plain PyTorch and numpy, no uni3d import.

A source is named by one string, the same on every rank:

- `builtin`: the source text of the Python standard library of the running interpreter, as bytes;
- `FILE.txt`: the bytes of a file;
- `FILE.bin`: a flat file of little-endian token ids, mapped into memory and never read as a whole.

Every rank builds its own source and leaves no cache behind: the same interpreter or the same file
gives the same tokens, in the same order.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Split = Literal["train", "valid"]

SEPARATOR = 0
"""The byte that ends each document of `builtin`; no text has it."""
VALID_PERCENT = 5
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
"""Not the standard library, or its tests, which are half of its bytes and much like each other."""
DTYPES = ("uint8", "uint16", "uint32")


def load_tokens(source: str, split: Split, *, dtype: str = "uint16") -> Tokens:
    """All token ids of one split of `source`, one flat array `(n_tokens,)`.

    `builtin` is split by document, about 5 % of them into `valid`; of a file the last 5 % are `valid`.
    `dtype` (uint8, uint16 or uint32) is how `FILE.bin` stores a token; the other sources are uint8.
    Raises ValueError where the source cannot be read as asked.
    """
    if split not in get_args(Split):
        raise ValueError(f"split {split!r} is unknown: give 'train' or 'valid'")
    if source == "builtin":
        return _standard_library(split)
    path = Path(source)
    if path.suffix not in (".txt", ".bin"):
        raise ValueError(f"--data {source}: expected 'builtin', FILE.txt (text) or FILE.bin (token ids)")
    if path.suffix == ".bin" and dtype not in DTYPES:
        raise ValueError(
            f"--data {source}: token dtype {dtype!r} is unknown, give one of {', '.join(DTYPES)}"
        )
    tokens = _map_file(path, "uint8" if path.suffix == ".txt" else dtype)
    cut = len(tokens) - len(tokens) * VALID_PERCENT // 100
    return tokens[:cut] if split == "train" else tokens[cut:]


def _map_file(path: Path, dtype: str) -> Tokens:
    if not path.is_file():
        raise ValueError(f"--data {path}: there is no such file; give an existing one, or 'builtin'")
    stored = np.dtype(dtype).newbyteorder("<")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"--data {path}: the file is empty; give one with text or tokens in it")
    if size % stored.itemsize:
        raise ValueError(
            f"--data {path}: {size} bytes are not a whole number of {dtype} tokens; "
            f"write the file again, or give the dtype that it has"
        )
    return np.memmap(path, dtype=stored, mode="r")


def standard_library_files() -> list[tuple[str, Path]]:
    """`(path relative to the library, path)` of each source file, sorted by the former."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        files += [(path.relative_to(root).as_posix(), path) for path in paths]
    if not files:
        raise ValueError(f"--data builtin: no *.py files in {root}; give a FILE.txt or FILE.bin instead")
    return sorted(files)


def is_valid_document(name: str) -> bool:
    """Whether the document called `name` is of the validation split, by its name alone.

    A hash rather than a position in the list: one more file moves no other file to the other split.
    """
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < VALID_PERCENT


def _standard_library(split: Split) -> Tokens:
    text = bytearray()
    for name, path in standard_library_files():
        if is_valid_document(name) == (split == "valid"):
            text += path.read_bytes()
            text.append(SEPARATOR)
    return np.frombuffer(bytes(text), dtype=np.uint8)


class TokenDataset(Dataset[tuple[Tensor, Tensor]]):
    """Samples of `seq_len` tokens that follow each other without overlap.

    Item i is `(tokens[i*S : i*S + S], tokens[i*S + 1 : i*S + S + 1])`: the input and, shifted by one, what
    is to be predicted; two int64 tensors of shape `(S,)`. The last target is the next sample's first token,
    hence `(n_tokens - 1) // S` samples.
    """

    def __init__(self, tokens: Tokens, seq_len: int, *, vocab_size: int) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len({seq_len}) must be at least 1")
        if len(tokens) < seq_len + 1:
            raise ValueError(
                f"too little text: {len(tokens)} tokens, but one sample of seq_len({seq_len}) needs "
                f"{seq_len + 1}; give more text or a smaller seq_len"
            )
        self.tokens = tokens
        self.seq_len = seq_len
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        # Plain sequences end by IndexError; a slice past the end would be a short sample instead.
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = index * self.seq_len
        ids = self.tokens[start : start + self.seq_len + 1].astype(np.int64)
        # Checked here, not once for all: that would read a whole memory-mapped file before the first step.
        if ids.max() >= self.vocab_size:
            at = start + int(ids.argmax())
            raise ValueError(
                f"token {at} has the id {ids.max()}, but vocab_size({self.vocab_size}) ends at "
                f"{self.vocab_size - 1}; give the vocab_size (or dtype) that the data was made with"
            )
        sample = torch.from_numpy(ids)
        return sample[:-1], sample[1:]
