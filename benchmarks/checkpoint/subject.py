"""What is saved and loaded: a GPT and its AdamW states, held by uni3d's engine on some topology."""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
from collections.abc import Iterator
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
from uni3d.config import load_config

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
"""For smoke runs: 80 MiB."""

BATCH, SEQ_LEN = 12, 4  # a step is only taken to have moments: 48 tokens


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
    """The GPT without memory, on the meta device."""
    with torch.device("meta"):
        return GPT(GPTConfig(**options))


def make_engine(rank: Rank, place: Place, options: dict[str, Any], *, step: bool) -> None:
    """Collective: this rank's engine from now on; with `step` it has taken one, and so has moments."""
    settings = _settings(place, durable=True, background=False)
    with _quiet():
        engine = uni3d.initialize(model=unfilled_model(options), config=settings)[0]
    rank.kept.update(engine=engine, place=place)
    if step:
        tokens = torch.randint(options["vocab_size"], (engine.triad.micro_batch, SEQ_LEN + 1))
        engine.train_batch(itertools.repeat((tokens[:, :-1], tokens[:, 1:])))


def face(rank: Rank, *, durable: bool, background: bool) -> Any:
    """The engine of this rank as it would be with these settings of `checkpoint`.

    Engines over the same model and optimizer, so that arms which differ in settings save the same memory.
    """
    name = f"engine {durable=} {background=}"
    if name not in rank.kept:
        first = rank.kept["engine"]
        rank.kept[name] = uni3d.Engine(
            config=load_config(_settings(rank.kept["place"], durable=durable, background=background)),
            triad=first.triad,
            model=first.model,
            optimizer=first.optimizer,
            lr_scheduler=None,
        )
    return rank.kept[name]


def save(rank: Rank, run: Path, *, durable: bool) -> None:
    """A synchronous save."""
    face(rank, durable=durable, background=False).save_checkpoint(run, "bench")


def begin_save(rank: Rank, run: Path) -> None:
    """Start an asynchronous, durable save; returns when training may go on."""
    face(rank, durable=True, background=True).save_checkpoint(run, "bench")


def wait(rank: Rank) -> None:
    """Until the asynchronous save is committed."""
    face(rank, durable=True, background=True).wait_for_checkpoint()


def load(rank: Rank, run: Path) -> None:
    with _quiet():  # it says what it loaded, in a line
        rank.kept["engine"].load_checkpoint(run, "bench")


def bytes_read(rank: Rank) -> int:
    """By this rank, in its last load, as uni3d counts them."""
    return int(rank.kept["engine"].last_load.bytes_read)


def bytes_held(rank: Rank) -> int:
    """What this rank has of the state, and so what it wants of a checkpoint."""
    return sum(array.nbytes for array in local_arrays(rank))


def local_arrays(rank: Rank) -> list[npt.NDArray[Any]]:
    """This rank's parts of all parameters and moments: the memory that the engine trains with.

    Read off torch's own objects, without the code that is measured.
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
    """One number for all of this rank's state."""
    return hash(tuple(crc32c(np.ascontiguousarray(array)) for array in local_arrays(rank)))


def erase(rank: Rank) -> None:
    """Make the state wrong, so that only a load makes it right again."""
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
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stderr(io.StringIO()):
        yield
