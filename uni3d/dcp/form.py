"""Form of a state_dict that DCP saved: what its atoms and its JSON values don't show.

The manifest has it, so that the state_dict is loaded as it was, by its own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckpt import CheckpointError
from ckpt.format import Json
from uni3d.dcp.values import Kinds
from uni3d.importers.dcp.names import Steps


@dataclass(frozen=True, kw_only=True)
class StateDictForm:
    """Form of a state_dict."""

    model: Steps = ("model",)
    """Path of the model's weights; empty if they have no key of their own."""
    optimizer: Steps | None = ("optim",)
    """Path of the optimizer's states; None without an optimizer."""
    flat: bool = False
    """True if hyperparameters are stored by parameter (`flatten_optimizer_state_dict`)."""
    beside: list[Steps] = field(default_factory=list)
    """Path of each value and tensor beside model and optimizer."""
    kinds: Mapping[str, Kinds] = field(default_factory=dict)
    """Types of values, by the value's flat name, or by its last key for the optimizer's."""

    def document(self) -> Json:
        """Return the manifest's record."""
        return {
            "model": list(self.model),
            "optimizer": None if self.optimizer is None else list(self.optimizer),
            "flat": self.flat,
            "beside": [list(path) for path in self.beside],
            "kinds": dict(self.kinds),
        }

    @classmethod
    def of(cls, document: Json, where: str) -> StateDictForm:
        """Read the manifest's record.

        Raises:
            CheckpointError: it has another form.
        """
        try:
            optimizer = document["optimizer"]
            return cls(
                model=tuple(document["model"]),
                optimizer=None if optimizer is None else tuple(optimizer),
                flat=bool(document["flat"]),
                beside=[tuple(path) for path in document["beside"]],
                kinds={str(name): dict(kinds) for name, kinds in document["kinds"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{where}: dcp has another form than expected: {error!r}") from None

    def kinds_of(self, key: str, *, optimizer: bool) -> Kinds:
        """Return the types of a value, by its flat name."""
        known = self.kinds
        return known.get(key, known.get(last(key), {})) if optimizer else known.get(key, {})


def last(key: str) -> str:
    """Return the last key of a flat name."""
    return f"*.{key.rpartition('.')[2]}"


def shared_kinds(kinds: Mapping[str, Kinds]) -> dict[str, Kinds]:
    """Return the types of an optimizer's values by last key, and by flat name where they differ."""
    found: dict[str, Kinds] = {}
    for key, each in kinds.items():
        if found.setdefault(last(key), each) != each:
            found[key] = each
    return {key: each for key, each in found.items() if each or not key.startswith("*.")}


def flat_name(path: Any) -> str:
    """Return DCP's flat name of a path."""
    return ".".join(map(str, path))


def pointer(path: Any) -> str:
    """Return the JSON pointer of a path."""
    return "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in path)
