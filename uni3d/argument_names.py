"""Names of arguments and settings in messages, as whoever saves or loads knows them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ArgumentNames:
    """Advice of messages, in one caller's own arguments."""

    weights_alone: str
    """Advice to load the model and nothing else."""
    without_optimizer: str
    without_scheduler: str
    lenient: str
    """The argument with which a load may lack arrays."""
    accept: str
    """Advice to go on in spite of a change; `{}` is its name."""
    setting: str
    """Advice to give a setting of checkpoints; `{}` is its name."""
    data: str
    """The argument with the training data, or with its loader."""
    save: str
    """The call that saves."""


OF_ENGINE = ArgumentNames(
    weights_alone="load them with load_module_only=True",
    without_optimizer="load it with load_optimizer_states=False",
    without_scheduler="load it with load_lr_scheduler_states=False",
    lenient="load_module_strict=False",
    accept='by the config\'s "checkpoint": {{"accept_changes": ["{}"]}}',
    setting='set "{}" in the config\'s section "checkpoint"',
    data="training_data",
    save="save_checkpoint",
)

_ALONE = "load the model alone, by Checkpointer.load(optimizer=False), or by uni3d.load without an optimizer"

OF_CHECKPOINTER = ArgumentNames(
    weights_alone=_ALONE,
    without_optimizer=_ALONE,
    without_scheduler="leave out lr_scheduler",
    lenient="strict=False",
    accept='by accept_changes=["{}"]',
    setting="set {}",
    data="dataloader",
    save="save",
)
