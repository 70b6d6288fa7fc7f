"""The state that is saved and loaded: a GPT and its AdamW states, in uni3d's engine on some topology."""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from crc32c import crc32c
from torch import Tensor
from torch.distributed.tensor import DTensor

import uni3d
from benchmarks.checkpoint.ranks import Rank
from parallel import HostComm
from uni3d.checkpoint.save import Saver
from uni3d.config import load_config
from uni3d.state import Inventory

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "megatron_gpt"))

from model import GPT, GPTConfig

FULL: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "num_layers": 12,
    "num_heads": 12,
    "max_seq_len": 16,
    "norm": "layernorm",
}
"""134M parameters, untied head: with fp32 moments 1.5 GiB in 408 arrays."""
SMALL: dict[str, Any] = FULL | {"vocab_size": 4_000, "hidden_size": 384, "num_layers": 2}
"""80 MiB, for smoke tests."""

BATCH, SEQ_LEN = 12, 4  # steps are taken only to have moments: 48 tokens


class Place(NamedTuple):
    """A topology and its ZeRO stage."""

    pp: int
    dp: int
    tp: int
    zero: int

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.tp

    def __str__(self) -> str:
        return f"({self.pp}, {self.dp}, {self.tp}) ZeRO {self.zero}"


def unfilled_model(options: dict[str, Any]) -> GPT:
    """Make the GPT on the meta device."""
    with torch.device("meta"):
        return GPT(GPTConfig(**options))


def make_engine(rank: Rank, place: Place, options: dict[str, Any], *, step: bool) -> None:
    """Collective: make this rank's engine. With `step` it takes one step, and so has moments."""
    settings = _settings(place, durable=True, background=False)
    with quiet():
        engine = uni3d.initialize(model=unfilled_model(options), config=settings)[0]
    rank.kept.update(engine=engine, place=place)
    if step:
        tokens = torch.randint(options["vocab_size"], (engine.triad.micro_batch, SEQ_LEN + 1))
        engine.train_batch(itertools.repeat((tokens[:, :-1], tokens[:, 1:])))


def face(rank: Rank, *, durable: bool, background: bool) -> Any:
    """Return this rank's engine with these settings of `checkpoint`.

    Arms that differ in settings save the same memory, each by a saver of its own.
    """
    name, engine = f"saver {durable=} {background=}", rank.kept["engine"]
    if name not in rank.kept:
        config = load_config(_settings(rank.kept["place"], durable=durable, background=background))
        rank.kept[name] = Saver(
            replace(engine._state, settings=config.checkpoint),
            comm=engine._comm,
            writing=HostComm(),
            inventory=Inventory(engine.model),
            model_spec=engine._saver._model_spec,
        )
    engine._saver = rank.kept[name]
    return engine


def save(rank: Rank, run: Path, *, durable: bool) -> None:
    """Save, and return when it is committed."""
    face(rank, durable=durable, background=False).save_checkpoint(run, "bench")


def begin_save(rank: Rank, run: Path) -> None:
    """Start an asynchronous, durable save; return when training may go on."""
    face(rank, durable=True, background=True).save_checkpoint(run, "bench")


def wait(rank: Rank) -> None:
    """Wait until the asynchronous save is committed."""
    face(rank, durable=True, background=True).wait_for_checkpoint()


def load(rank: Rank, run: Path) -> None:
    with quiet():  # it prints a line about each load
        rank.kept["engine"].load_checkpoint(run, "bench")


def show_parameters(rank: Rank) -> None:
    """Gather whole parameters, as a load does at ZeRO 0 to 2."""
    zero = rank.kept["engine"].model.zero
    zero.reshard()
    zero.show_parameters()


def bytes_read(rank: Rank) -> int:
    """Return the bytes that this rank read in its last load, by uni3d's count."""
    return int(rank.kept["engine"].last_load.bytes_read)


def bytes_held(rank: Rank) -> int:
    """Return the bytes of this rank's part of the state, which are those it wants of a checkpoint."""
    return sum(array.nbytes for array in local_arrays(rank))


def local_arrays(rank: Rank) -> list[npt.NDArray[Any]]:
    """Return this rank's parts of all parameters and moments: the memory that the engine trains with.

    They come from torch's own objects, without the code that is measured.
    """
    engine = rank.kept["engine"]
    engine.model.zero.reshard()
    return [local.detach().numpy() for local in _local_tensors(engine) if local.numel()]


def _local_tensors(engine: Any) -> Iterator[Tensor]:
    for parameter in engine.module.parameters():
        for tensor in (parameter, *engine.optimizer.state[parameter].values()):
            if tensor.ndim:  # not the count of steps
                yield tensor.to_local() if isinstance(tensor, DTensor) else tensor


def digest(rank: Rank) -> int:
    """Return one number that depends on all of this rank's state."""
    return hash(tuple(crc32c(np.ascontiguousarray(array)) for array in local_arrays(rank)))


def erase(rank: Rank) -> None:
    """Overwrite the state, so that only a load brings it back."""
    for array in local_arrays(rank):
        array.fill(np.nan)


def _settings(place: Place, *, durable: bool, background: bool) -> dict[str, Any]:
    return {
        "train_batch_size": BATCH,
        "parallel": {"pp": place.pp, "dp": place.dp, "tp": place.tp, "device": "cpu"},
        "zero_optimization": {"stage": place.zero},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "checkpoint": {"async_save": background, "durable": durable},
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out the lines that building and loading print."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
