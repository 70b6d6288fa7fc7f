"""Generators of random numbers of all ranks, as an object of a `Checkpointer`."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uni3d.checkpoint.checkpointer import connect

_Own = tuple[dict[str, Tensor], list[Any]]
"""Words of a rank's generators, and what else they keep."""


class RandomStates:
    """States of the generators of Python, numpy and torch, of the GPU's too, on each rank.

    `take` before a save, `apply` after a load. On another number of ranks, rank r takes the state of rank r
    modulo the old number: the same on every such resume, but not what the old ranks would have drawn.
    """

    def __init__(self) -> None:
        """Connect all ranks. Collective."""
        self._comm = connect()
        self._words: dict[str, Tensor] = {}
        self._rest: list[list[Any]] = []

    def take(self) -> None:
        """Read the generators of all ranks. Collective."""
        found = self._comm.all_reduce({self._comm.rank: _read()}, _joined)
        own = [found[rank] for rank in range(self._comm.size)]
        for name in own[0][0]:
            stacked = torch.stack([words[name] for words, _ in own])
            known = self._words.get(name)  # kept, so that the save needs no new plan
            if known is None or known.shape != stacked.shape:
                known = self._words[name] = torch.empty_like(stacked)
            known.copy_(stacked)
        self._rest = [rest for _, rest in own]

    def apply(self) -> None:
        """Set this rank's generators to what was loaded or taken; nothing if nothing was."""
        if not self._rest:
            return
        row = self._comm.rank % len(self._rest)
        _write({name: words[row] for name, words in self._words.items()}, self._rest[row])

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all ranks: a row of each tensor for a rank."""
        return {**self._words, "rest": self._rest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the states for `apply`."""
        self._words = {name: value for name, value in state.items() if name != "rest"}
        self._rest = state["rest"]


def _joined(parts: list[dict[int, _Own]]) -> dict[int, _Own]:
    return {rank: own for part in parts for rank, own in part.items()}


def _read() -> _Own:
    _, words, gauss = random.getstate()
    kind, key, *rest = np.random.get_state(legacy=True)
    assert kind == "MT19937", "numpy's global generator has no other"
    found = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.tensor(np.asarray(key).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found, [gauss, *(float(n) if isinstance(n, float) else int(n) for n in rest)]


def _write(words: dict[str, Tensor], rest: list[Any]) -> None:
    gauss, *more = rest
    random.setstate((3, tuple(words["python"].tolist()), gauss))
    np.random.set_state(("MT19937", words["numpy"].numpy().astype(np.uint32), *more))
    torch.set_rng_state(words["torch"].clone())
    if "cuda" in words and torch.cuda.is_available():
        torch.cuda.set_rng_state(words["cuda"].clone())
