"""The keys of a config that say how samples are loaded."""

from __future__ import annotations

from pydantic import Field, model_validator

from uni3d.config.batch import BatchSizes


class DataKeys(BatchSizes):
    """Loading of `training_data`, and of the data given to `Engine.loader`."""

    dataloader_drop_last: bool = False
    """Leave out an epoch's last samples if they don't fill a global batch; by default the next epoch's first
    ones fill it."""
    dataloader_pin_memory: bool = True
    """Load batches for a GPU into pinned memory."""
    num_local_io_workers: int = Field(default=0, ge=0)
    """Processes of each rank that load samples; 0 loads them in the rank itself, when they are needed."""
    prefetch_factor: int | None = Field(default=None, gt=0)
    """Micro batches that each of these processes loads ahead; 2 by default."""
    persistent_workers: bool = False
    """Keep these processes from one epoch to the next."""

    @model_validator(mode="after")
    def _need_workers(self) -> DataKeys:
        if self.num_local_io_workers == 0:
            for key in ("prefetch_factor", "persistent_workers"):
                if value := getattr(self, key):
                    raise ValueError(
                        f"{key}({value}) has no effect without processes that load; set num_local_io_workers"
                    )
        return self


def epoch_length(samples: int, train_batch: int, *, drop_last: bool) -> int:
    """Return the samples of an epoch that are trained on: with `drop_last`, those in whole global batches.

    Raises:
        ValueError: `drop_last` would leave none.
    """
    if drop_last and 0 < samples < train_batch:
        raise ValueError(
            f"the data has {samples} samples, fewer than train_batch_size({train_batch}), so with "
            "dataloader_drop_last an epoch has no global batch; use more data, a smaller batch, or "
            "dataloader_drop_last false, which fills the batch with the next epoch's samples"
        )
    return samples // train_batch * train_batch if drop_last else samples
