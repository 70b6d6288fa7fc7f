"""Engines with the test's own topology and settings, for options without a config key."""

from __future__ import annotations

from typing import Any

from models import ADAM
from torch import nn

import parallel
import uni3d
from uni3d.config import batch_triad, load_config
from uni3d.optim.loss_scale import LossScale
from uni3d.optim.optimizers import make_optimizer
from uni3d.train_state import Progress, TrainState

CLIP = 0.5


def build_engine(
    model: nn.Module,
    degrees: parallel.Degrees,
    *,
    zero: int,
    group: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    config: dict[str, Any] | None = None,
    **settings: Any,
) -> uni3d.Engine:
    """Return an engine with a global batch of 12 and micro batches of one sample; dp 4 accumulates 3."""
    values = {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": CLIP,
        "optimizer": ADAM,
    }
    resolved = load_config(values | (config or {}))
    topology = parallel.Topology(degrees, zero_stage=zero, shard_group=group, device_type=device)
    built = parallel.build(model, topology, parallel.Settings(seed=seed, zero_stage=zero, **settings))
    assert resolved.optimizer is not None
    trained = [p for p in built.module.parameters() if p.requires_grad]
    triad = batch_triad(resolved, degrees.dp)
    state = TrainState(
        model=built,
        optimizer=make_optimizer(resolved.optimizer, [{"params": trained}]),
        lr_scheduler=None,
        scaler=LossScale(resolved.fp16) if resolved.precision == "fp16" else None,
        progress=Progress(train_batch=triad.train_batch),
    )
    return uni3d.Engine(config=resolved, triad=triad, state=state, model_spec={})
