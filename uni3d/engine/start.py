"""First values of an engine's parameters: a run's newest checkpoint, files of weights, or the model's own."""

from __future__ import annotations

from pathlib import Path

from torch import nn

import parallel
from parallel import HostComm
from parallel import meta_parameters as meta_parameters
from uni3d.checkpoint.file_weights import FileWeights
from uni3d.checkpoint.newest_tag import newest
from uni3d.engine.arguments import using_up


class Start:
    """Chooses where the values come from, so that none are drawn or sent that a load would replace."""

    def __init__(
        self, comm: HostComm, model: nn.Module, resume: str | Path | None, weights: str | Path | None
    ) -> None:
        """Collective: look for a checkpoint of the run `resume`; else compare `weights` with the model.

        Raises:
            ckpt.CheckpointError: the run is damaged, or the files don't fit; the same on all ranks.
        """
        found = resume is not None and newest(comm, resume) is not None
        self.run = resume if found else None
        """Run whose newest checkpoint is to be loaded into the engine, or None."""
        self._files = None if found or weights is None else FileWeights(comm, weights, model)

    def build(
        self, model: nn.Module, topology: parallel.Topology, settings: parallel.Settings
    ) -> parallel.ParallelModel:
        """Return this rank's part of the model, with parameters of NaN if `run` is to be loaded. Collective.

        Raises:
            ValueError: the model can't be split this way, or it needs values and there are none.
            ckpt.CheckpointError: a file can't be read; the same on all ranks.
        """
        later = self.run is not None or self._files is not None
        built = using_up(model, lambda: parallel.build(model, topology, settings, loaded_later=later))
        if self._files is not None:
            self._files.fill(built)
        return built
