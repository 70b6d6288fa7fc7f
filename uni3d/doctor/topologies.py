"""Which topologies of a number of ranks a checkpoint would resume on, and why it wouldn't on the others."""

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
from uni3d.doctor.memory import Known, Need, most, needs
from uni3d.estimate.saved import USUAL, RefusedDegree, SavedModel

NEARBY = 3
"""How many numbers of ranks are named on either side of one that fits nothing."""

LOOKED_AT = 20
"""And how many are tried for it."""


class Batch(NamedTuple):
    """Of a data-parallel rank, in samples; micro * accumulation = share."""

    share: int
    micro: int | None
    """None where nobody said how large it was."""
    accumulation: int | None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a user wants to know: any topology of so many ranks, or with these degrees."""

    world: int
    pp: int | None = None
    dp: int | None = None
    tp: int | None = None
    zero: int | None = None
    memory: float | None = None
    """Bytes that a rank has."""

    def of(self, world: int) -> Asked:
        """The same of another number of ranks."""
        return Asked(world=world, pp=self.pp, tp=self.tp, zero=self.zero, memory=self.memory)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Topology on which the run could go on."""

    pp: int
    dp: int
    tp: int
    batch: Batch
    needs: dict[int, Need]
    """By ZeRO stage."""
    zero: int | None
    """The first stage, by preference, that fits in the memory; None if none does."""

    def __str__(self) -> str:
        return f"pp {self.pp}, dp {self.dp}, tp {self.tp}, ZeRO {self.ranks.zero}"

    @property
    def ranks(self) -> Ranks:
        """With the stage that fits, or else the one that needs least."""
        least = min(self.needs, key=lambda stage: self.needs[stage].total)
        return Ranks(pp=self.pp, dp=self.dp, tp=self.tp, zero=least if self.zero is None else self.zero)

    @property
    def need(self) -> Need:
        return self.needs[self.ranks.zero]


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why some degrees of one axis can't be."""

    axis: str
    degrees: list[int]
    why: str

    def __str__(self) -> str:
        return f"{self.axis} {', '.join(map(str, self.degrees))} {self.why}"


@dataclass(frozen=True, kw_only=True)
class Answer:
    topologies: list[Candidate]
    """Those that the model and the batch can be split by, the preferred first."""
    reasons: list[Reason]

    @property
    def fitting(self) -> list[Candidate]:
        """Those that fit in the memory, too."""
        return [topology for topology in self.topologies if topology.zero is not None]


@dataclass(frozen=True, kw_only=True)
class Fitter:
    """What of a checkpoint and a config decides which topologies there are."""

    source: SavedModel
    batch: int | None
    """The global batch, that is kept."""
    zero: int
    """The ZeRO stage of the run so far, which is kept if it can be."""
    config: Config | None = None
    values: dict[str, Any]
    """The config as it was given."""
    known: Known | None = None

    @cached_property
    def settings(self) -> Settings:
        return USUAL if self.config is None else parallel_settings(self.config)

    @property
    def shard_group(self) -> int | None:
        return None if self.config is None else self.config.shard_group

    def answer(self, asked: Asked) -> Answer:
        """All topologies of the ranks, in the order of preference: fewest tp, then fewest pp."""
        found: list[Candidate] = []
        refused: dict[tuple[str, str], set[int]] = {}
        for pp, dp, tp in _splits(asked):
            reasons = list(self._refused(pp, dp, tp))
            for axis, n, why in reasons:
                refused.setdefault((axis, why), set()).add(n)
            if not reasons:
                found.append(self._topology(pp, dp, tp, asked))
        return Answer(
            topologies=found,
            reasons=[Reason(axis=axis, degrees=sorted(n), why=why) for (axis, why), n in refused.items()],
        )

    def nearby(self, asked: Asked) -> list[int]:
        """Numbers of ranks around the one that was asked for, with a topology that fits in the memory.

        Of those that the model and the batch can be split by, so many on either side are looked at.
        """
        anything = replace(asked, memory=None)
        sides = range(asked.world - 1, 0, -1), range(asked.world + 1, 2 * asked.world + 1)
        found: list[int] = []
        for numbers in sides:
            possible = islice((n for n in numbers if self._fits(anything.of(n))), LOOKED_AT)
            found += islice((n for n in possible if self._fits(asked.of(n))), NEARBY)
        return sorted(found)

    def _fits(self, asked: Asked) -> bool:
        possible = (split for split in _splits(asked) if not any(self._refused(*split)))
        if asked.memory is None:
            return any(True for _ in possible)
        return any(self._topology(*split, asked).zero is not None for split in possible)

    def stages(self, asked: int | None) -> list[int]:
        """ZeRO stages that can be, the preferred first: the one asked for; or the run's own, then the lowest.

        Raises:
            ValueError: the one that was asked for can't be.
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

    def _refused(self, pp: int, dp: int, tp: int) -> Iterator[RefusedDegree]:
        """Yield the degrees that can't be."""
        settings = self.settings
        yield from self.source.refused(pp, dp, tp, settings, batch=self.batch, shard_group=self.shard_group)
        if settings.sequence_parallel and self.known is not None and self.known.document["seq_len"] % tp:
            length = self.known.document["seq_len"]
            yield RefusedDegree("tp", tp, f"doesn't divide the sequence of {length} tokens")
        if (self.batch is None or self.batch % dp == 0) and self._batch(pp, dp) is None:
            yield RefusedDegree(
                "dp", dp, f"leaves a share that schedule {settings.schedule} can't run on pp {pp}"
            )

    def _batch(self, pp: int, dp: int) -> Batch | None:
        """A rank's share, in micro batches as near as can be to the config's; None if there are no such."""
        if self.batch is None:
            return Batch(0, None, None)
        share = self.batch // dp
        if self.config is None:
            return Batch(share, None, None)
        micro = self.config.train_micro_batch_size_per_gpu
        steps = self.config.gradient_accumulation_steps
        wanted = micro if micro is not None else share / (steps or 1)  # what DeepSpeed's rule makes of it
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
        """With unknown micro batches, as if there were several of them."""
        config, steps = self.config, batch.accumulation or 2
        held = most(
            needs(self.source, ranks, self.settings, shard_group=self.shard_group, accumulation=steps)
        )
        if self.known is None or config is None or batch.micro is None:
            return held
        from uni3d.estimate.job import settings_of

        triad = {
            "train_batch_size": self.batch,
            "train_micro_batch_size_per_gpu": batch.micro,
            "gradient_accumulation_steps": steps,
        }
        return self.known.need(held, ranks, settings_of(config.model_copy(update=triad), ranks.dp))


def _zero_refusal(values: Mapping[str, Any], stage: int) -> str | None:
    """Return why a config can't have another ZeRO stage, or None if it can."""
    zero = {**(values.get("zero_optimization") or {}), "stage": stage}
    try:
        load_config({**values, "zero_optimization": zero})
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def _splits(asked: Asked) -> Iterator[tuple[int, int, int]]:
    """pp, dp, tp of every topology with the degrees that were asked for, fewest tp first, then fewest pp."""
    for tp in _divisors(asked.world):
        for pp in _divisors(asked.world // tp):
            dp = asked.world // tp // pp
            given = zip((pp, dp, tp), (asked.pp, asked.dp, asked.tp), strict=True)
            if all(wanted in (None, degree) for degree, wanted in given):
                yield pp, dp, tp


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
