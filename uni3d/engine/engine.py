"""The engine: one optimizer step after another, on any topology, with DeepSpeed's names for everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from parallel.placement import Placement
from uni3d.engine.arguments import refuse_copy
from uni3d.engine.checkpoint_core import CheckpointCore
from uni3d.engine.data_loader import TrainingLoader
from uni3d.engine.grid import Grid


class Engine(CheckpointCore):
    """Trains one model. Made by `uni3d.initialize`; every method is collective unless it says otherwise.

    A step's loss is the mean over the global batch: over its tokens where the loss is `(sum, count)` or, in
    `train_batch`, a Hugging Face model's own; over its micro batches where it is another single value.

    As a `torch.nn.Module` it has one child, `module`, so names of parameters begin with `module.`, as in
    DeepSpeed. Attributes that it hasn't are looked up in `module`.

    Attributes:
        config, triad: the config, and the three batch sizes that it comes to on this topology.
        model, module: this rank's part of the model, with and without what `parallel.build` adds.
        optimizer, lr_scheduler, training_dataloader: as `initialize` made them, or None.
        scaler: the loss scale of fp16, or None.
        device, global_rank, local_rank, world_size: of this process, as torchrun counts.
        last_load, client_state: the report of the last load and the checkpoint's client_state, or None.
        grid: places of the ranks, as a DeepSpeed pipeline's grid or an `mpu` has them.
    """

    def __init__(self, **given: Any) -> None:
        """Collective. Takes what `TrainingCore` takes."""
        super().__init__(**given)
        self.grid = Grid(self.model.topology)

    # --- a module of torch -----------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Return the module's attribute of that name. Called only for what the engine itself hasn't."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = vars(self).get("_modules", {}).get("module")
            if module is None or name.startswith("__"):
                raise
        try:
            return getattr(module, name)
        except AttributeError:
            kinds = f"{type(self).__name__} nor its {type(module).__name__}"
            raise AttributeError(f"neither the {kinds} has an attribute {name!r}") from None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Do what `to`, `cuda`, `half` and the like ask for if it is so already.

        Raises:
            RuntimeError: it isn't. Ranks hold parts of the parameters, where the config says.
        """
        dtype = self.model.zero.compute_dtype
        probe = torch.zeros((1, 1, 2, 2), dtype=dtype, device=self.device)
        result = fn(probe)
        if result is probe and (probe.is_cuda or not probe.is_shared()):  # type: ignore[no-untyped-call]
            return self
        raise RuntimeError(
            f"an engine can't be moved or cast after initialize(): it computes in {dtype} on {self.device}; "
            "set parallel.device, and bf16 or fp16, in the config"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_copy()

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> NoReturn:
        """Raise an error for DistributedDataParallel, which asks for it."""
        raise RuntimeError(
            "an engine sums its gradients over the ranks itself; use it without DistributedDataParallel"
        )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing if the config compiles the layers, as it is too late for it now. Local.

        Raises:
            RuntimeError: the config doesn't.
        """
        if not self.is_compiled:
            raise RuntimeError(
                'engine.compile() comes after the layers were sharded; set "compile": {"enabled": true} in '
                "the config, which compiles each of them"
            )

    @property
    def is_compiled(self) -> bool:
        return self.config.compile.enabled

    # --- by DeepSpeed's names: progress; local, as all that follows but `destroy` ------------------------

    @property
    def global_steps(self) -> int:
        return self._progress.global_steps

    @property
    def global_samples(self) -> int:
        return self._progress.global_samples

    @property
    def skipped_steps(self) -> int:
        return self._progress.skipped_steps

    @property
    def micro_steps(self) -> int:
        """Micro batches that this engine has ended, by `step` or `train_batch`; a load doesn't change it."""
        return self._micro.micro_steps

    def get_global_grad_norm(self) -> float | None:
        return self._stepper.look().norm  # before clipping; None before the first step

    def was_step_applied(self) -> bool:
        """Return whether the last `step()` or `train_batch()` changed the parameters: it may be skipped."""
        return self._stepper.look().applied

    # --- the optimizer -----------------------------------------------------------------------------------

    def get_lr(self) -> list[float]:
        return [float(value) for value in self._of_groups("lr")]

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of all parameter groups.

        Raises:
            RuntimeError: there is a schedule, which would set it again.
        """
        if self.lr_scheduler is not None:
            raise RuntimeError(
                "set_lr() would last until the next step, as the schedule sets the learning rate; leave the "
                "scheduler out, or change its base_lrs"
            )
        for group in self.optimizer.param_groups if self.optimizer else []:
            group["lr"] = lr

    def get_mom(self) -> list[Any]:
        """Return each parameter group's momentum, or its betas."""
        kind = "momentum" if any("momentum" in group for group in self._groups()) else "betas"
        return self._of_groups(kind)

    def get_loss_scale(self) -> float:
        return 1.0 if self.scaler is None else self.scaler.scale

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups if self.optimizer else []

    def _of_groups(self, key: str) -> list[Any]:
        return [group.get(key, 0.0) for group in self._groups()]

    # --- settings ----------------------------------------------------------------------------------------

    def train_batch_size(self) -> int:
        return self.triad.train_batch

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.triad.micro_batch

    def gradient_accumulation_steps(self) -> int:
        return self.triad.accumulation

    def get_batch_info(self) -> tuple[int, int, int]:
        """Return the sizes of a global batch and a micro batch, and the micro batches per step."""
        return self.triad.train_batch, self.triad.micro_batch, self.triad.accumulation

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Refuse another size of the global batch.

        Raises:
            ValueError: it isn't the config's.
        """
        self._refuse_size("train_batch_size", train_batch_size, self.triad.train_batch)

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Refuse another size of the micro batches.

        Raises:
            ValueError: it isn't the config's.
        """
        self._refuse_size("train_micro_batch_size_per_gpu", micro_batch_size, self.triad.micro_batch)

    def _refuse_size(self, key: str, size: int, ours: int) -> None:
        if size != ours:
            raise ValueError(
                f"{key} can't change from {ours} to {size} during a run, as data order and schedule depend "
                "on it; save a checkpoint, and resume it with another config (checkpoint.accept_changes)"
            )

    def gradient_clipping(self) -> float:
        return self.config.gradient_clipping

    def fp16_enabled(self) -> bool:
        return self.config.precision == "fp16"

    def bfloat16_enabled(self) -> bool:
        return self.config.precision == "bf16"

    def zero_optimization(self) -> bool:
        return self.model.zero.stage > 0

    def zero_optimization_stage(self) -> int:
        return self.model.zero.stage

    def zero_optimization_partition_gradients(self) -> bool:
        return self.model.zero.stage >= 2

    def zero_optimization_partition_weights(self) -> bool:
        return self.model.zero.stage >= 3

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        return True

    # --- places of ranks ---------------------------------------------------------------------------------

    @property
    def mpu(self) -> Grid:
        return self.grid

    @property
    def dp_world_size(self) -> int:
        return self.grid.get_data_parallel_world_size()

    @property
    def mp_world_size(self) -> int:
        return self.grid.get_model_parallel_world_size()

    @property
    def data_parallel_group(self) -> dist.ProcessGroup:
        return self.grid.get_data_parallel_group()

    @property
    def sequence_parallel_size(self) -> int:
        return 1  # sequences are split over tensor-parallel ranks alone

    def get_data_parallel_rank(self) -> int:
        return self.grid.get_data_parallel_rank()

    def get_model_parallel_rank(self) -> int:
        return self.grid.get_model_parallel_rank()

    def get_tensor_parallel_rank(self) -> int:
        return self.grid.get_tensor_model_parallel_rank()

    def get_pipeline_parallel_rank(self) -> int:
        return self.grid.get_pipe_parallel_rank()

    def is_first_stage(self) -> bool:
        return self.grid.is_first_stage

    def is_last_stage(self) -> bool:
        """Return whether this rank has the model's outputs; under a V schedule that is the first rank."""
        p, pp = self.config.parallel, self.model.topology.degrees.pp
        ranks = Placement.of(pp, schedule=p.schedule, virtual_stages=p.virtual_stages).ranks
        return ranks[-1] == self.model.topology.pp_rank

    # --- data --------------------------------------------------------------------------------------------

    def set_dataloader(self, loader: Iterable[Any]) -> None:
        """Let `train_batch()` take its micro batches from `loader`, once through."""
        self._given = iter(loader)

    def set_dataiterator(self, iterator: Iterator[Any]) -> None:
        """Let `train_batch()` take its micro batches from `iterator`."""
        self._given = iterator

    def deepspeed_io(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> TrainingLoader:
        """Return this rank's micro batches of `dataset`, as `loader` does, whatever the route.

        Raises:
            ValueError: another batch size than the config's, a sampler, or workers.
        """
        if batch_size not in (None, self.triad.micro_batch):
            raise ValueError(
                f"deepspeed_io() has a batch_size of {batch_size}, but micro batches have "
                f"{self.triad.micro_batch} samples; leave it out"
            )
        if data_sampler is not None or num_local_io_workers:
            raise ValueError(
                "deepspeed_io() has an order of its own and no workers; make a torch DataLoader with "
                "data_sampler and num_workers, and pass uni3d.RepeatingLoader(loader) to train_batch"
            )
        return self.loader(dataset, collate_fn)

    # --- memory, and what the engine does itself ---------------------------------------------------------

    @property
    def enable_backward_allreduce(self) -> bool:
        return True

    @property
    def sparse_tensor_module_names(self) -> set[str]:
        """Names of modules whose gradients are summed as sparse tensors: none."""
        return set()

    def allreduce_gradients(self, bucket_size: int = 0) -> None:
        """Do nothing: the last `backward()` before a step has summed the gradients."""

    def empty_partition_cache(self) -> None:
        """Free parameters that a forward pass at ZeRO stage 3 has left gathered."""
        if self.model.zero.stage == 3:
            self.model.zero.reshard()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def offload_states(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            "offload_states() isn't supported; keep the states in host memory from the start, with "
            "zero_optimization.offload_optimizer"
        )

    def reload_states(self, non_blocking: bool = False) -> NoReturn:
        raise RuntimeError("reload_states() isn't supported, as offload_states() isn't")

    def destroy(self) -> None:
        """Wait for the last save, drop gradients and process groups; the engine can't be used afterwards."""
        self._saver.wait()
        self.model.zero.drop_gradients()
        self.model.topology.close()
        self._guard.unusable = self._guard.unusable or "destroy() was called"

    # --- weights -----------------------------------------------------------------------------------------

    def save_fp16_model(self, save_dir: str, save_filename: str = "pytorch_model.bin") -> bool:
        """Do what `save_16bit_model` does, under its old name."""
        return self.save_16bit_model(save_dir, save_filename)

    def _zero3_consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> dict[str, Tensor] | None:
        return self.consolidated_state_dict(exclude_frozen_parameters)

    _consolidated_16bit_state_dict = _zero3_consolidated_16bit_state_dict
