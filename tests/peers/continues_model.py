"""Model, data and config of the fixture `deepspeed_continues`, in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor, nn

SEED = 1234
STEPS_BEFORE = 20
"""Steps before the save."""
STEPS_AFTER = 10
"""Steps after the save."""
BATCH = 8
"""Samples in a global batch."""
FEATURES = 9
CLASSES = 5

OPTIMIZER = {"type": "AdamW", "params": {"lr": 2e-2, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.05}}
SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": {
        "total_num_steps": 40,
        "warmup_min_lr": 1e-4,
        "warmup_max_lr": 2e-2,
        "warmup_num_steps": 5,
        "warmup_type": "linear",
    },
}
CLIPPING = 0.5


class Classifier(nn.Module):
    """A model with sizes that two ranks don't divide; it returns the mean loss over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES, 13)
        self.norm = nn.LayerNorm(13)
        self.outer = nn.Linear(13, CLASSES)

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of `[batch, FEATURES]` inputs with `[batch]` labels."""
        hidden = torch.tanh(self.norm(self.inner(inputs)))
        return nn.functional.cross_entropy(self.outer(hidden), labels)


def model() -> Classifier:
    """Return the model with the run's initial weights."""
    torch.manual_seed(SEED)
    return Classifier()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return the global batch of `step`, from 0: `[BATCH, FEATURES]` inputs, `[BATCH]` labels.

    Data parallel ranks take equal slices of it, in the order of the ranks.
    """
    generator = torch.Generator().manual_seed(SEED + 1 + step)
    inputs = torch.randn(BATCH, FEATURES, generator=generator)
    target = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(SEED))
    return inputs, (inputs @ target).argmax(dim=1)


def config() -> dict[str, Any]:
    """Return the run's training config, with DeepSpeed's keys, without the ZeRO stage."""
    return {
        "train_batch_size": BATCH,
        "gradient_clipping": CLIPPING,
        "optimizer": OPTIMIZER,
        "scheduler": SCHEDULER,
    }
