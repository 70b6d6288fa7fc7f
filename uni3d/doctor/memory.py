"""Memory that a rank of any topology needs to resume from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from parallel.degrees import Ranks
from parallel.settings import ITEMSIZE, Settings
from uni3d.estimate.gpt import from_model_config
from uni3d.estimate.job import Job, read_document
from uni3d.estimate.memory import memory, worst
from uni3d.estimate.saved import Kind, SavedModel
from uni3d.estimate.zero import MASTER_BYTES, beside_shards


class Need(NamedTuple):
    """Bytes on the rank that needs most, each field at its own peak in a step."""

    parameters: int
    """Shards in fp32, and whole copies to compute with (but not ZeRO 3's transient ones)."""
    gradients: int
    optimizer: int
    buffers: int
    other: int = 0
    """Activations and the rest of a step's peak, if the model is known."""
    host: int = 0
    """Host memory with offload: shards of parameters, gradients and optimizer states."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.parameters + self.gradients + self.optimizer + self.buffers + self.other

    def row(self) -> dict[str, int]:
        """Return the fields and the total as JSON has them."""
        return {**self._asdict(), "total": self.total}


def needs(
    source: SavedModel, ranks: Ranks, settings: Settings, shards: int, accumulation: int = 1
) -> list[Need]:
    """Return the memory of the states on each pipeline rank, from the checkpoint's arrays."""
    stages = source.kinds(ranks.pp, settings)
    return [_held(counts, ranks, settings, shards, accumulation) for counts in stages]


def _held(
    counts: Mapping[Kind, int], ranks: Ranks, settings: Settings, shards: int, accumulation: int
) -> Need:
    """Return the memory of the stage's first rank, the largest of its shards."""
    shard = trained_shard = optimizer = buffers = whole = trained = 0
    for kind, n in counts.items():
        size = n * kind.largest(ranks.tp, shards)
        if kind.role == "buffer":
            buffers += size * kind.itemsize
        elif kind.role == "state":
            optimizer += size * kind.itemsize
        else:
            shard += size * kind.itemsize
            whole += n * kind.largest(ranks.tp, 1)
            if kind.role == "trained":
                trained_shard += MASTER_BYTES * size
                trained += n * kind.largest(ranks.tp, 1)
    copies, sums = beside_shards(
        whole,
        trained,
        stage=ranks.zero,
        shards=shards,
        compute_bytes=ITEMSIZE[settings.precision.compute],
        reduce_bytes=ITEMSIZE[settings.precision.reduce],
        accumulation=accumulation,
        offload=settings.offload,
    )
    if settings.offload:
        return Need(copies, sums, 0, buffers, host=shard + trained_shard + optimizer)
    return Need(shard + copies, max(sums, trained_shard), optimizer, buffers)


# --- with activations, for a known model ---------------------------------------------------------------


class Known:
    """An example's GPT, for which `uni3d plan` can estimate all memory."""

    def __init__(self, path: Path, source: SavedModel) -> None:
        """Raises ValueError if the file isn't an example's config, or describes another model."""
        self.document: Mapping[str, Any] = read_document(path)
        self._shape = from_model_config(self.document["model"])
        links = [(link.name, weight) for link in self._shape.links for weight in link.weights]
        expected = {f"{link}.{w.name}": w.shape for link, w in links if not w.same_as}
        stored = {name: source.shape(name) for name in source.parameters}
        if wrong := sorted(expected.items() ^ stored.items()):
            name = wrong[0][0]
            here, there = (list(of.get(name, ())) or "missing" for of in (expected, stored))
            raise ValueError(
                f"--model {path} isn't the checkpoint's: {name} is {here}, and {there} in the checkpoint"
            )

    def need(self, held: Need, ranks: Ranks, settings: Mapping[str, Any]) -> Need:
        """Return the memory at the peak of a step as `uni3d plan` estimates it, with the buffers of `held`.

        Raises:
            ValueError: the job is impossible.
        """
        job = Job(shape=self._shape, ranks=ranks, seq_len=self.document["seq_len"], **settings)
        stage = worst(memory(replace(job, device="cuda")))
        peak = stage.peak
        rest = peak.activations + peak.loss + peak.communication + peak.pipeline
        return Need(
            peak.parameters + peak.gathered, peak.gradients, peak.optimizer, held.buffers, rest, stage.host
        )
