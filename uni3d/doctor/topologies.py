"""Topologies of a number of ranks on which a checkpoint would resume, and the reasons against the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

from parallel.degrees import ZERO_STAGES, Ranks
from parallel.settings import Settings
from uni3d.config import Config, load_config
from uni3d.config.batch import nearest_batch
from uni3d.config.settings import parallel_settings
from uni3d.doctor.memory import Known, Need, needs
from uni3d.estimate.job import settings_of
from uni3d.estimate.saved import USUAL, RefusedDegrees, SavedModel
from uni3d.estimate.search import factorizations

NEARBY = 3
"""Number of world sizes proposed on either side of one on which nothing fits."""

LOOKED_AT = 20
"""Number of world sizes tried on either side."""


class Batch(NamedTuple):
    """Samples of a data-parallel rank in a step: `micro * accumulation == share`."""

    share: int
    micro: int | None
    """Size of a micro batch, or None without a config."""
    accumulation: int | None

    def config(self, samples: int | None) -> dict[str, int]:
        """Return the keys of a config for a global batch of `samples`, as far as they are known."""
        triad = {
            "train_batch_size": samples,
            "train_micro_batch_size_per_gpu": self.micro,
            "gradient_accumulation_steps": self.accumulation,
        }
        return {key: number for key, number in triad.items() if number is not None}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A user's question: any topology of `world` ranks, or one with given degrees."""

    world: int
    """0 for as many as wrote the checkpoint."""
    pp: int | None = None
    dp: int | None = None
    tp: int | None = None
    zero: int | None = None
    memory: float | None = None
    """Memory limit of a rank, in bytes."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Topology on which the run could go on."""

    pp: int
    dp: int
    tp: int
    batch: Batch
    needs: dict[int, Need]
    """Memory by ZeRO stage."""
    zero: int | None
    """First stage, by preference, that fits in memory; None if none does."""

    def __str__(self) -> str:
        return f"pp {self.pp}, dp {self.dp}, tp {self.tp}, ZeRO {self.ranks.zero}"

    @property
    def ranks(self) -> Ranks:
        """The ranks, at the ZeRO stage that fits, or else at the one that needs the least memory."""
        least = min(self.needs, key=lambda stage: self.needs[stage].total)
        return Ranks(pp=self.pp, dp=self.dp, tp=self.tp, zero=least if self.zero is None else self.zero)

    @property
    def need(self) -> Need:
        return self.needs[self.ranks.zero]


@dataclass(frozen=True, kw_only=True)
class Answer:
    topologies: list[Candidate]
    """Topologies that the model and the batch can be split by, preferred first."""
    reasons: list[RefusedDegrees]

    @property
    def fitting(self) -> list[Candidate]:
        """Topologies that also fit in memory."""
        return [topology for topology in self.topologies if topology.zero is not None]


@dataclass(frozen=True, kw_only=True)
class Fitter:
    """Finds the topologies for a checkpoint and a config."""

    source: SavedModel
    batch: int | None
    """Global batch, which doesn't change."""
    zero: int
    """ZeRO stage of the run so far, which is kept if possible."""
    config: Config | None = None
    values: dict[str, Any]
    """Content of the config's file."""
    known: Known | None = None

    @cached_property
    def settings(self) -> Settings:
        return USUAL if self.config is None else parallel_settings(self.config)

    @property
    def shard_group(self) -> int | None:
        return None if self.config is None else self.config.shard_group

    def answer(self, asked: Asked) -> Answer:
        """Return all topologies of the ranks, by preference: lowest tp, then lowest pp."""
        found: list[Candidate] = []
        refused: dict[tuple[str, str], set[int]] = {}
        for split in _splits(asked):
            against = list(self._refused(*split))
            for axis, degrees, why in against:
                refused.setdefault((axis, why), set()).update(degrees)
            if not against:
                found.append(self._topology(*split, asked))
        reasons = [RefusedDegrees(axis, sorted(n), why) for (axis, why), n in refused.items()]
        return Answer(topologies=found, reasons=reasons)

    def nearby(self, asked: Asked) -> list[int]:
        """Return world sizes around the one asked for that have a topology which fits in memory.

        Only the nearest `LOOKED_AT` that the model and the batch can be split by are tried on either side.
        """
        anything = replace(asked, dp=None, memory=None)  # dp is what a world size changes
        limited = replace(asked, dp=None)
        sides = range(asked.world - 1, 0, -1), range(asked.world + 1, 2 * asked.world + 1)
        found: list[int] = []
        for numbers in sides:
            possible = islice((n for n in numbers if self._fits(replace(anything, world=n))), LOOKED_AT)
            found += islice((n for n in possible if self._fits(replace(limited, world=n))), NEARBY)
        return sorted(found)

    def _fits(self, asked: Asked) -> bool:
        possible = (split for split in _splits(asked) if not any(self._refused(*split)))
        if asked.memory is None:
            return any(True for _ in possible)
        return any(self._topology(*split, asked).zero is not None for split in possible)

    def stages(self, asked: int | None) -> list[int]:
        """Return the possible ZeRO stages: only `asked`, or else the run's own first, then ascending.

        Raises:
            ValueError: the config refuses the stage asked for.
        """
        refused = self._refused_stages
        if asked is None:
            return [n for n in dict.fromkeys((self.zero, *range(4))) if refused[n] is None]
        if refused[asked] is not None:
            raise ValueError(f"--zero {asked}: {refused[asked]}")
        return [asked]

    @cached_property
    def _refused_stages(self) -> dict[int, str | None]:
        return {stage: _zero_refusal(self.values, stage) for stage in ZERO_STAGES}

    def _refused(self, pp: int, dp: int, tp: int) -> Iterator[RefusedDegrees]:
        """Yield the impossible degrees."""
        settings = self.settings
        yield from self.source.refused(pp, dp, tp, settings, batch=self.batch, shard_group=self.shard_group)
        if settings.sequence_parallel and self.known is not None and self.known.document["seq_len"] % tp:
            length = self.known.document["seq_len"]
            yield RefusedDegrees("tp", [tp], f"doesn't divide the sequence of {length} tokens")
        if (self.batch is None or self.batch % dp == 0) and self._batch(pp, dp) is None:
            why = f"leaves a share that schedule {settings.schedule} can't run on pp {pp}"
            yield RefusedDegrees("dp", [dp], why)

    def _batch(self, pp: int, dp: int) -> Batch | None:
        """Return a rank's share, with a micro batch as close as possible to the config's, or None."""
        share = 0 if self.batch is None else self.batch // dp
        if self.batch is None or self.config is None:
            return Batch(share, None, None)
        micro = self.config.train_micro_batch_size_per_gpu
        steps = self.config.gradient_accumulation_steps
        wanted = micro if micro is not None else share / (steps or 1)  # as DeepSpeed derives it
        pair = nearest_batch(share, micro=wanted, schedule=self.settings.schedule, pp=pp)
        return None if pair is None else Batch(share, *pair)

    def _topology(self, pp: int, dp: int, tp: int, asked: Asked) -> Candidate:
        batch = self._batch(pp, dp)
        assert batch is not None, "refused before"
        stages = self.stages(asked.zero)
        needs = {zero: self._need(Ranks(pp=pp, dp=dp, tp=tp, zero=zero), batch) for zero in stages}
        limit = float("inf") if asked.memory is None else asked.memory
        fits = next((zero for zero in stages if needs[zero].total <= limit), None)
        return Candidate(pp=pp, dp=dp, tp=tp, batch=batch, needs=needs, zero=fits)

    def _need(self, ranks: Ranks, batch: Batch) -> Need:
        """Return the memory of the rank that needs most."""
        config, steps = self.config, batch.accumulation or 2  # unknown micro batches count as several
        by_stage = needs(self.source, ranks, self.settings, ranks.shards(self.shard_group), steps)
        held = max(by_stage, key=lambda need: (need.total, need.host))
        if self.known is None or config is None or batch.micro is None:
            return held
        sized = config.model_copy(update=batch.config(self.batch))
        return self.known.need(held, ranks, settings_of(sized, ranks.dp))


def _zero_refusal(values: Mapping[str, Any], stage: int) -> str | None:
    """Return why a config refuses this ZeRO stage, or offloads otherwise at it; None if neither."""
    given = values.get("zero_optimization")  # an object, or a boolean or null for one
    zero = {**(given if isinstance(given, Mapping) else {}), "stage": stage}
    try:
        there = load_config({**values, "zero_optimization": zero})
    except ValueError as error:
        return " ".join(str(error).split())
    if there.offload == load_config(values).offload:
        return None
    return (
        f"the config {'offloads' if there.offload else 'offloads nothing'} at stage {stage}, not at its own"
    )


def _splits(asked: Asked) -> Iterator[tuple[int, int, int]]:
    """Yield pp, dp and tp of every topology with the degrees asked for, by preference."""
    for split in factorizations(asked.world):
        given = zip(split, (asked.pp, asked.dp, asked.tp), strict=True)
        if all(wanted in (None, degree) for degree, wanted in given):
            yield split
