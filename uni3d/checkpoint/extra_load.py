"""Extra states of a checkpoint: compared with those of the run, read, and given back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

import ckpt
from parallel import HostComm
from uni3d import state
from uni3d.checkpoint.extra_state import (
    OBJECT,
    ExtraRecord,
    array_key,
    current_extra,
    modules_with_extra,
    put_together,
    restore_optimizer_extra,
    shown,
    takes,
)
from uni3d.checkpoint.several import optimizers_by_name
from uni3d.manifest import OPTIMIZER_ATOM, RunManifest
from uni3d.stored_model import StoredModel

MISSING, OLD = "not in the checkpoint", "not in the checkpoint: its release saved no extra states"


_ONE = "the optimizer's"


def _texts(whose: str, value: Mapping[str, Any]) -> dict[Any, str]:
    """Return the texts of an optimizer's further keys, and of `("state", key)` for states under strings."""
    named: dict[Any, str] = {key: f"{whose} {key}" for key in value if key != "state"}
    return named | {("state", key): f"{whose} state[{key!r}]" for key in value.get("state", {})}


class _Taker:
    """An object of the script's in the place of a module."""

    def __init__(self, taker: Any) -> None:
        self.set_extra_state = taker.load_state_dict


class ExtraLoad:
    """Load of a checkpoint's extra states into a model, an optimizer and further objects."""

    def __init__(
        self,
        model: StoredModel,
        optimizer: Optimizer | None,
        saved: RunManifest,
        comm: HostComm,
        *,
        model_too: bool,
        objects: Mapping[str, Any],
    ) -> None:
        """Collective. With `model_too` false, the script loads the modules itself."""
        self._model, self._optimizer, self._comm, self._manifest = model, optimizer, comm, saved
        self._modules: dict[str, Any] = {
            model.first_name(n): m for n, m in modules_with_extra(model.module).items()
        }
        self._modules |= {OBJECT + name: _Taker(taker) for name, taker in objects.items()}
        self._everyone = comm.all_reduce(set(self._modules), ckpt.union)
        self._model_too = model_too
        self._saved: dict[str, ExtraRecord] = {}
        self._further: ExtraRecord | None = None  # the optimizer's, if it is to be restored
        self._further_names: list[str] = []
        self._defaulted: dict[str, str] = {}
        self._dropped: dict[str, str] = {}
        self._read: dict[ckpt.ArrayKey, Tensor] = {}

    def check(self, url: str, *, strict: bool) -> None:
        """Raise CheckpointError on all ranks if extra states differ. Collective."""

        def compare() -> None:
            for name, document in (self._manifest.model.extra_state or {}).items():
                self._saved[name] = ExtraRecord.of(document, name)
            problems = [*self._compare_modules(), *self._compare_optimizer()]
            if strict and problems:
                raise ckpt.CheckpointError(
                    f"{url} doesn't fit the model and optimizer: extra states {'; '.join(problems)}"
                )

        ckpt.agreed(self._comm, compare)

    def _compare_modules(self) -> Iterator[str]:
        """Yield a strict load's problems with the modules' extra states."""
        if not self._model_too:
            self._dropped |= dict.fromkeys(self._saved, "custom_load_fn loads the model")
            return
        old = self._manifest.model.extra_state is None
        for name in sorted(self._everyone - self._saved.keys()):
            self._defaulted[shown(name)] = OLD if old else MISSING
            if not old:
                yield f"missing in the checkpoint: {shown(name)}"
        for name in sorted(self._saved.keys() - self._everyone):
            if name.startswith(OBJECT):  # as a loader's state, of no use to another script
                self._dropped[name] = "not asked for"
                continue
            self._dropped[name] = "not in the model"
            yield f"unexpected in the checkpoint: {name}"

    def _compare_optimizer(self) -> Iterator[str]:
        """Yield a strict load's problems with the optimizer's extra state."""
        record = self._manifest.optimizer
        document = None if record is None else record.extra_state
        saved = None if document is None else ExtraRecord.of(document, "optimizer's extra_state")
        value: Mapping[str, Any] = {} if saved is None else saved.value
        several = record is not None and record.members is not None
        parts = {f"optimizer {name}'s": part for name, part in value.items()} if several else {_ONE: value}
        everything = [text for whose, part in parts.items() for text in _texts(whose, part).values()]
        if self._optimizer is None:
            self._dropped |= dict.fromkeys(everything, "optimizer states were not requested")
            return
        refused = False
        for name, member in optimizers_by_name(self._optimizer).items():
            whose = f"optimizer {name}'s" if name else _ONE
            part = parts.get(whose, {})
            here = current_extra(member).keys() - {"state"}
            for key in sorted(here - part.keys()):
                self._defaulted[f"{whose} {key}"] = OLD if saved is None else MISSING
                if saved is not None:
                    yield f"missing in the checkpoint: {whose} {key}"
            if part.keys() - {"state"} and not takes(member):
                kind, refused = type(member).__name__, True
                self._dropped |= dict.fromkeys(everything, f"{kind} has no load_state_dict of its own")
                names = [text for key, text in _texts(whose, part).items() if isinstance(key, str)]
                yield from (f"unexpected by {kind}, which loads as torch does: {n}" for n in names)
        if not refused:
            self._further, self._further_names = saved, everything

    def reason(self, atom: str) -> str | None:
        """Return why the tensors of an extra state aren't loaded on any rank; None if they are."""
        if atom == OPTIMIZER_ATOM:
            return "the optimizer's extra state is left" if self._further is None else None
        return self._dropped.get(atom)

    def targets(self, checkpoint: ckpt.Checkpoint) -> list[ckpt.Shard]:
        """Return the tensors that this rank reads, each whole. Local."""
        wanted = {name: self._saved[name] for name in self._modules if name in self._restored}
        if self._further is not None:
            wanted[OPTIMIZER_ATOM] = self._further
        keys = [array_key(atom, place) for atom, record in wanted.items() for place in record.tensors]
        shards = [state.whole_target(checkpoint.info(*key)) for key in keys]
        self._read = {shard.spec.key: state.to_torch(shard.data) for shard in shards}
        return shards

    def restore(self) -> None:
        """Give modules and the optimizer what was read. Local."""
        for name, module in self._modules.items():
            if name in self._restored:
                module.set_extra_state(self._value(name, self._saved[name]))
        if self._further is not None and self._optimizer is not None:
            restore_optimizer_extra(self._optimizer, self._value(OPTIMIZER_ATOM, self._further))

    def tell(self, report: ckpt.LoadReport) -> None:
        """Add the extra states to the report. Local."""
        report.extra = [*map(shown, sorted(self._restored)), *self._further_names]
        report.defaulted |= self._defaulted
        report.dropped |= {shown(name): why for name, why in self._dropped.items()}

    @property
    def _restored(self) -> set[str]:
        return self._saved.keys() - self._dropped.keys()

    def _value(self, atom: str, record: ExtraRecord) -> Any:
        return put_together(record, partial(self._tensor, atom, record))

    def _tensor(self, atom: str, record: ExtraRecord, place: str) -> Tensor:
        tensor = self._read[array_key(atom, place)]
        on_host = record.tensors[place] == "cpu"
        return tensor if on_host else tensor.to(self._model.device)
