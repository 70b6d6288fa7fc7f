"""The manifest apart from its arrays: written and read here, and nowhere else.

`RunManifest` is the typed form of the keys "for whoever resumes the training" in docs/format.md. Saves and
imports build one and write its `document()`; readers get one from `RunManifest.of(checkpoint)`. The arrays,
sizes and checksums in the same file belong to `ckpt`.

Any key may be missing: `ckpt.save` by itself writes none, and an import only those it knows. The only other
reader is `uni3d/zero_to_fp32.py`, which must run without this package.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from ckpt import Checkpoint, CheckpointError
from ckpt.format import Json
from parallel.degrees import Ranks
from uni3d.version import __version__

SCRIPT = Path(__file__).with_name("zero_to_fp32.py")
"""Copied into every checkpoint; extracts the weights without this package."""

SAMPLE_ORDER = 1
"""Version of the order of samples that `uni3d/engine/sample_order.py` computes."""

_AXES = ("pp", "dp", "tp")
_JSON_NAMES = {str: "a string", int: "an integer", bool: "a boolean", dict: "an object", list: "a list"}


@dataclass(frozen=True, kw_only=True)
class WriterRecord:
    """The job that wrote the checkpoint. For information only: no reader may depend on it."""

    uni3d: str | None = __version__
    """Release that wrote it; this one by default."""
    torch: str | None = None
    topology: Mapping[str, int] = field(default_factory=dict)
    """Degrees of `pp`, `dp` and `tp`; 1 x 1 x 1 for an import."""
    zero_stage: int | None = None
    shard_group: int | None = None
    """Number of data-parallel ranks over which ZeRO sharded a tensor."""
    layers: list[list[str]] | None = None
    """Names of the layers on each pipeline rank; None if the model isn't a chain of layers."""
    imported: Json | None = None
    """For an import: the kind of its source as `from`, and the source's own record of its writer."""

    @property
    def ranks(self) -> Ranks | None:
        """Ranks that wrote the checkpoint; None if the manifest lacks them."""
        try:
            return Ranks(**{axis: self.topology[axis] for axis in _AXES}, zero=self.zero_stage)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError):
            return None

    def document(self) -> Json:
        without = {"imported"} if self.imported is None else {"torch", "shard_group", "layers"}
        return {key: value for key, value in vars(self).items() if key not in without}


EXTRA_STATE = "extra_state"
"""First part of the state names of an extra state's tensors; a JSON pointer to the tensor's place follows."""
OPTIMIZER_ATOM = ".optimizer"
"""Atom of the tensors in the optimizer's extra state; no module can have this name."""

DCP_ATOM = ".dcp"  # tensors and bytes that `uni3d.dcp` saved beside model and optimizer
DATA_ATOM = ".data"
"""First part of the atoms of tensors in states of the script's loaders; a data-parallel index follows."""


def data_atom(index: int) -> str:
    """Return the atom of the tensors in the state of a data-parallel rank's loader."""
    return f"{DATA_ATOM}.{index}"


def is_extra(state: str) -> bool:
    """Return whether a state is a tensor of an extra state."""
    return state.partition("/")[0] == EXTRA_STATE


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """The model's parameters and buffers, and its own description."""

    requires_grad: Mapping[str, bool] = field(default_factory=dict)
    """One entry per parameter."""
    buffers: list[str] = field(default_factory=list)
    left_out: list[str] | None = None
    """Frozen parameters that the save excluded; None if it included them."""
    declared: Json = field(default_factory=dict)
    """The model's own description (`uni3d.checkpoint.model_spec`)."""
    extra_state: Mapping[str, Json] | None = None
    """Extra states of modules by torch's names (`layers.0._extra_state`); None if its writer saves none."""

    def trains(self, parameter: str) -> bool:
        """Return whether the parameter required a gradient; True if the manifest lacks it."""
        return self.requires_grad.get(parameter, True)

    def document(self) -> Json:
        document: Json = {
            "parameters": {name: {"requires_grad": trains} for name, trains in self.requires_grad.items()},
            "buffers": self.buffers,
        }
        if self.left_out is not None:
            document["left_out"] = self.left_out
        if self.extra_state is not None:
            document["extra_state"] = dict(self.extra_state)
        return document | ({"declared": self.declared} if self.declared else {})


@dataclass(frozen=True, kw_only=True)
class OptimizerRecord:
    """The optimizer apart from its arrays."""

    type: str
    """Name of its class, or `resume_rules.UNKNOWN`."""
    groups: list[Json]
    """Hyperparameters of each parameter group, with the names of its parameters under `params`."""
    scalars: dict[str, Json]
    """Parameter -> state -> value, for states that aren't arrays, such as step counts."""
    extra_state: Json | None = None
    """Further keys of its `state_dict`, and its states under strings as `state`; None as in `ModelRecord`."""

    def document(self) -> Json:
        without = {"extra_state"} if self.extra_state is None else set()
        return {key: value for key, value in vars(self).items() if key not in without}


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """The engine's counters, the loss scale of fp16, and the numbers that fix the order of samples."""

    global_steps: int | None = None
    global_samples: int | None = None
    skipped_steps: int = 0
    loss_scale: Json | None = None
    """State of `LossScale`; None if the run wasn't in fp16."""
    seed: int | None = None
    train_batch_size: int | None = None
    dataset_length: int | None = None
    """Samples in the engine's own training data; 0 if the script brought the batches, None if not known."""
    epoch_length: int | None = None
    """Samples of it that an epoch has; None if it has all."""
    sample_order: int | None = None
    """Version of the order of samples; None for an import, and for the order before version 1."""

    def samples(self, train_batch: int) -> int:
        """Return the samples that the run has seen, or as many as these steps take of a global batch."""
        return (self.global_steps or 0) * train_batch if self.global_samples is None else self.global_samples

    @property
    def order(self) -> dict[str, int]:
        """Known ones of the numbers that fix the order of samples, and the global batch."""
        known = {
            "seed": self.seed,
            "train_batch_size": self.train_batch_size,
            "dataset_length": self.dataset_length,
            "epoch_length": self.epoch_length,
            "sample_order": self.sample_order,
        }
        return {key: number for key, number in known.items() if number is not None}

    def document(self) -> Json:
        counters = ("global_steps", "global_samples", "skipped_steps", "loss_scale")
        return {key: getattr(self, key) for key in counters} | self.order


class DataRecord(NamedTuple):
    """Where the script's own loaders of training data stand."""

    kind: str
    """Name of their class."""
    states: list[Json]
    """Extra state of each data-parallel rank's."""


@dataclass(frozen=True, kw_only=True)
class RunManifest:
    """The run's part of a manifest."""

    step: int | None = None
    created: str | None = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """Time in UTC, ISO 8601; now by default."""
    run_id: str | None = None
    """Identifier of the run, which a resume keeps; None for an import."""
    writer: WriterRecord = field(default_factory=WriterRecord)
    model: ModelRecord = field(default_factory=ModelRecord)
    optimizer: OptimizerRecord | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    """Other names of tied weights -> the name under which the arrays are stored."""
    scheduler: Json | None = None
    """State of the learning-rate scheduler."""
    schedule: Json | None = None
    """Type and parameters of a schedule from the config; None if the script made the scheduler."""
    engine: EngineRecord = field(default_factory=EngineRecord)
    client_state: Json = field(default_factory=dict)
    data: DataRecord | None = None
    """States of the script's own loaders; None if it brings none, or they have none."""
    dcp: Json | None = None
    """Form of the state_dict that `uni3d.dcp` saved (`uni3d.dcp.form`); None for other writers."""

    @property
    def written_on(self) -> Ranks | None:
        """Ranks that wrote the checkpoint; None for an import, or if the manifest lacks them."""
        return self.writer.ranks if self.writer.imported is None else None

    @property
    def imported_from(self) -> str | None:
        """Kind of checkpoint that `uni3d import` made this one from; None if it wasn't imported."""
        return None if self.writer.imported is None else str(self.writer.imported.get("from"))

    @property
    def zero_so_far(self) -> int:
        """ZeRO stage of the run that wrote the checkpoint, or that wrote the source of the import."""
        imported = self.writer.imported
        stage = imported.get("zero_stage") if imported else self.writer.zero_stage
        return stage if isinstance(stage, int) and stage in range(4) else 0

    # --- writing -----------------------------------------------------------------------------------------

    def document(self) -> Json:
        """Return the keys and values for `ckpt.save`: the fields, in the order of the file."""
        without = [key for key in ("run_id", "schedule", "data", "dcp") if getattr(self, key) is None]
        document = {key: value for key, value in vars(self).items() if key not in without}
        if self.data is not None:
            document["data"] = self.data._asdict()
        return document | {
            "writer": self.writer.document(),
            "model": self.model.document(),
            "optimizer": None if self.optimizer is None else self.optimizer.document(),
            "engine": self.engine.document(),
        }

    def merged(self, others: Iterable[RunManifest]) -> RunManifest:
        """Merge the manifests of all pipeline stages, `self` and `others` in order, into the whole model's.

        Raises:
            CheckpointError: a parameter group has different hyperparameters on two stages.
        """
        whole = self
        for other in others:
            model, more = whole.model, other.model
            left_out = model.left_out
            if left_out is not None:  # a tied weight may be on both stages
                left_out = list(dict.fromkeys([*left_out, *(more.left_out or [])]))
            model = replace(
                model,
                requires_grad={**model.requires_grad, **more.requires_grad},
                buffers=[*model.buffers, *more.buffers],
                left_out=left_out,
                extra_state=None
                if model.extra_state is None
                else {**model.extra_state, **(more.extra_state or {})},
            )
            whole = replace(whole, model=model, optimizer=_merged(whole.optimizer, other.optimizer))
        return whole

    # --- reading -----------------------------------------------------------------------------------------

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> RunManifest:
        """Read the manifest of an open checkpoint.

        Raises:
            CheckpointError: a value has the wrong type.
        """
        return cls.read(checkpoint.manifest, checkpoint.where("manifest.json"))

    @classmethod
    def read(cls, manifest: Mapping[str, Any], where: str = "the manifest") -> RunManifest:
        """Read a manifest that `ckpt` has decoded; `where` names it in errors.

        Raises:
            CheckpointError: a value has the wrong type.
        """
        top = _Section(manifest, where)
        writer, engine = top.section("writer"), top.section("engine")
        counters = ("global_steps", "global_samples")
        numbers = (*counters, "seed", "train_batch_size", "dataset_length", "epoch_length", "sample_order")
        return cls(
            **top.values(step=int, created=str, run_id=str, scheduler=dict, schedule=dict, dcp=dict),
            writer=WriterRecord(
                **writer.values(uni3d=str, torch=str, zero_stage=int, shard_group=int, imported=dict),
                topology=writer.map_of("topology", int),
                layers=writer.list_of("layers", list),
            ),
            model=_read_model(top.section("model")),
            optimizer=_read_optimizer(top),
            aliases=top.map_of("aliases", str),
            engine=EngineRecord(
                **engine.values(**dict.fromkeys(numbers, int), loss_scale=dict),
                skipped_steps=engine.get("skipped_steps", int) or 0,
            ),
            client_state=top.get("client_state", dict) or {},
            data=_read_data(top),
        )


def _merged(mine: OptimizerRecord | None, other: OptimizerRecord | None) -> OptimizerRecord | None:
    """Merge the optimizers of two pipeline stages: the same groups, each with its stage's parameters."""
    if mine is None or other is None:
        return mine
    groups = []
    for i, (first, second) in enumerate(zip(mine.groups, other.groups, strict=True)):
        if first | {"params": []} != second | {"params": []}:
            raise CheckpointError(f"parameter group {i} has different hyperparameters on two pipeline stages")
        groups.append(first | {"params": list(dict.fromkeys([*first["params"], *second["params"]]))})
    return replace(mine, groups=groups, scalars={**mine.scalars, **other.scalars})


class _Section:
    """One JSON object of the manifest; checks the type of each value read. A missing key reads as None."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values, self.where = values, where

    def get(self, key: str, kind: type) -> Any:
        value = self._values.get(key)
        if value is not None:
            _check(value, kind, f"{self.where}: {key}")
        return value

    def values(self, **kinds: type) -> dict[str, Any]:
        """Return the value of each of these keys."""
        return {key: self.get(key, kind) for key, kind in kinds.items()}

    def section(self, key: str) -> _Section:
        """Return an object in this one. One that is missing has no keys."""
        return _Section(self.get(key, dict) or {}, f"{self.where}: {key}")

    def list_of(self, key: str, kind: type) -> list[Any] | None:
        values = self.get(key, list)
        for i, value in enumerate(values or []):
            _check(value, kind, f"{self.where}: {key}[{i}]")
        return values  # type: ignore[no-any-return]

    def map_of(self, key: str, kind: type) -> dict[str, Any]:
        values = self.get(key, dict) or {}
        for name, value in values.items():
            if not isinstance(value, kind):  # before the text is made: there may be thousands
                _check(value, kind, f"{self.where}: {key}[{name!r}]")
        return values

    def needed(self, key: str, kind: type) -> Any:
        value = self.get(key, kind)
        if value is None:
            raise CheckpointError(f"{self.where} has no {key!r}; use another tag")
        return value


def _check(value: Any, kind: type, where: str) -> None:
    # A bool is an int in Python but not in JSON.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(f"{where} is {value!r:.80}; expected {_JSON_NAMES[kind]}; use another tag")


def _read_model(section: _Section) -> ModelRecord:
    parameters = section.map_of("parameters", dict)
    return ModelRecord(
        requires_grad={name: _trains(name, values, section.where) for name, values in parameters.items()},
        buffers=section.list_of("buffers", str) or [],
        left_out=section.list_of("left_out", str),
        declared=section.get("declared", dict) or {},
        extra_state=section.get("extra_state", dict),
    )


def _trains(name: str, values: Json, where: str) -> bool:
    trains = values.get("requires_grad", True)
    if not isinstance(trains, bool):
        _check(trains, bool, f"{where}: parameters[{name!r}]: requires_grad")
    return bool(trains)


def _read_data(top: _Section) -> DataRecord | None:
    if top.get("data", dict) is None:
        return None
    section = top.section("data")
    section.list_of("states", dict)
    return DataRecord(section.needed("kind", str), section.needed("states", list))


def _read_optimizer(top: _Section) -> OptimizerRecord | None:
    if top.get("optimizer", dict) is None:
        return None
    section = top.section("optimizer")
    groups = section.needed("groups", list)
    for i, group in enumerate(groups):
        where = f"{section.where}: groups[{i}]"
        _check(group, dict, where)
        _Section(group, where).needed("params", list)
    return OptimizerRecord(
        type=section.needed("type", str),
        groups=groups,
        scalars=section.map_of("scalars", dict),
        extra_state=section.get("extra_state", dict),
    )
