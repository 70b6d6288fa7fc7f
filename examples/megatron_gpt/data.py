"""Text as tokens, and tokens as samples. Plain PyTorch and numpy, no uni3d import.

A source is named by one string, the same on every rank:

- `builtin`: short English sentences from a seeded generator, as bytes;
- `FILE.txt`: the bytes of a file;
- `FILE.bin`: a flat file of little-endian token ids, memory-mapped and never read as a whole.

Every rank builds its own source and leaves no cache behind. The same source gives the same tokens in the
same order on every machine.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Split = Literal["train", "valid"]

SENTENCES = {"train": 20_000, "valid": 1_000}
"""Sentences of `builtin` in each split, about 57 bytes each."""
TIMES = ("This morning", "At noon", "One evening", "Yesterday")
ADJECTIVES = ("big", "old", "red", "young")
ANIMALS = ("fox", "cat", "dog", "owl", "hen", "mouse")
VERBS = ("sees", "calls", "finds", "helps")
PLACES = ("at the mill", "by the river", "in the garden", "under the bridge")
VALID_PERCENT = 5
DTYPES = ("uint8", "uint16", "uint32")


def load_tokens(source: str, split: Split, *, dtype: str = "uint16") -> Tokens:
    """Return the token ids of one split of `source`, a flat array of shape `(n_tokens,)`.

    The last 5% of a file are `valid`. The two splits of `builtin` are generated from different seeds.
    `dtype` (uint8, uint16 or uint32) is the stored type of a token in `FILE.bin`; other sources are uint8.

    Raises:
        ValueError: the split, the source or the dtype is unknown, or the file can't be used.
    """
    if split not in get_args(Split):
        raise ValueError(f"split {split!r} is unknown; expected 'train' or 'valid'")
    if source == "builtin":
        return _sentences(split)
    path = Path(source)
    if path.suffix not in (".txt", ".bin"):
        raise ValueError(f"--data {source}: expected 'builtin', FILE.txt (text) or FILE.bin (token ids)")
    if path.suffix == ".bin" and dtype not in DTYPES:
        raise ValueError(
            f"--data {source}: token dtype {dtype!r} is unknown; expected one of {', '.join(DTYPES)}"
        )
    tokens = _map_file(path, "uint8" if path.suffix == ".txt" else dtype)
    cut = len(tokens) - len(tokens) * VALID_PERCENT // 100
    return tokens[:cut] if split == "train" else tokens[cut:]


def _map_file(path: Path, dtype: str) -> Tokens:
    if not path.is_file():
        raise ValueError(f"--data {path}: no such file; give an existing file, or 'builtin'")
    stored = np.dtype(dtype).newbyteorder("<")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"--data {path}: the file is empty; give a file with text or tokens")
    if size % stored.itemsize:
        raise ValueError(
            f"--data {path}: {size} bytes are not a whole number of {dtype} tokens; "
            f"give the dtype that the file was written with, or write it again"
        )
    return np.memmap(path, dtype=stored, mode="r")


def _sentences(split: Split) -> Tokens:
    """Generate the lines of `builtin`: `At noon the old fox calls the red hen by the river.`"""
    generator = random.Random(split)

    def pick(words: tuple[str, ...]) -> str:
        # Python keeps random() the same in all versions, but not choice().
        return words[int(generator.random() * len(words))]

    def animal() -> str:
        return f"the {pick(ADJECTIVES)} {pick(ANIMALS)}"

    lines = (
        f"{pick(TIMES)} {animal()} {pick(VERBS)} {animal()} {pick(PLACES)}.\n"
        for _ in range(SENTENCES[split])
    )
    return np.frombuffer("".join(lines).encode(), dtype=np.uint8)


class TokenDataset(Dataset[tuple[Tensor, Tensor]]):
    """Consecutive samples of `seq_len` tokens, without overlap.

    Item i is `(tokens[i*S : i*S + S], tokens[i*S + 1 : i*S + S + 1])`: the inputs, and the targets one token
    later, both int64 tensors of shape `(S,)`. A sample's last target is the next sample's first token, so
    there are `(n_tokens - 1) // S` samples.
    """

    def __init__(self, tokens: Tokens, seq_len: int, *, vocab_size: int) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len({seq_len}) must be at least 1")
        if len(tokens) < seq_len + 1:
            raise ValueError(
                f"too little text: {len(tokens)} tokens, but one sample of seq_len({seq_len}) needs "
                f"{seq_len + 1}; give more text, or a smaller seq_len"
            )
        self.tokens = tokens
        self.seq_len = seq_len
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        # A slice past the end would be a short sample. Iteration over a sequence ends with IndexError.
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = index * self.seq_len
        ids = self.tokens[start : start + self.seq_len + 1].astype(np.int64)
        # Checked per sample: checking all at once would read the whole memory-mapped file before step 1.
        if ids.max() >= self.vocab_size:
            at = start + int(ids.argmax())
            raise ValueError(
                f"token {at} has id {ids.max()}, but the largest id of vocab_size({self.vocab_size}) is "
                f"{self.vocab_size - 1}; use the vocab_size and dtype that the data was written with"
            )
        sample = torch.from_numpy(ids)
        return sample[:-1], sample[1:]
