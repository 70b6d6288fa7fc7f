"""The trainer that is measured: uni3d's engine, with the model on the meta device."""

from __future__ import annotations

from pathlib import Path

import uni3d
from benchmarks.training.task import ADAMW, CLIP, Batch, Task
from benchmarks.training.trainer import Trainer
from uni3d.engine.engine import Engine


def build(task: Task) -> Trainer:
    """Make the engine. Collective."""
    config = {
        "train_batch_size": task.batch,
        "train_micro_batch_size_per_gpu": task.micro_batch,
        "gradient_clipping": CLIP,
        "steps_per_print": None,
        "bf16": {"enabled": task.precision == "bf16"},
        "compile": {"enabled": task.compile},
        "optimizer": {"type": "AdamW", "params": ADAMW},
        "zero_optimization": {"stage": task.zero},
        "parallel": {
            "pp": task.pp,
            "tp": task.tp,
            "device": task.device,
            "balance": task.balance,
            "schedule": task.schedule,
        },
    }
    engine: Engine = uni3d.initialize(model=task.meta_model(), config=config, weights=task.weights)[0]
    run = Path(task.folder) / "run"

    def step(batch: Batch) -> float:
        return engine.train_batch(iter(batch))

    return Trainer(
        step=step,
        norm=engine.get_global_grad_norm,
        parameters=[engine.model.first_name(name) for name, _ in engine.module.named_parameters()],
        save=lambda number: engine.save_checkpoint(run, f"global_step{number}"),
        wait=engine.wait_for_checkpoint,
    )
