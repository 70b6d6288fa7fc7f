"""Uses of an engine that are easily handled wrongly without an error."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import OwnLoss, Stack, global_batches, make_engine, seeded, train
from ranks import Ranks
from torch import Tensor, nn

import ckpt
import uni3d


def engine_of(model: nn.Module, **config: Any) -> uni3d.Engine:
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "parallel": {"device": "cpu"},
    }
    return uni3d.initialize(model=model, config=settings | config)[0]


def both_at_once_case(folder: str) -> list[str]:
    engine = make_engine(seeded(OwnLoss), zero=1)
    train(engine, global_batches(1))
    for i in range(5):
        engine.save_checkpoint(f"{folder}/run", tag=f"t{i}")  # goes on in the background
        engine.save_16bit_model(f"{folder}/out", f"{i}.bin")
    engine.wait_for_checkpoint()
    return ckpt.committed_tags(f"{folder}/run")


def test_weights_are_written_while_a_save_goes_on(ranks: Ranks, tmp_path: Path) -> None:
    tags, _ = ranks.run(2, both_at_once_case, str(tmp_path))
    assert tags == [f"t{i}" for i in range(5)]
    for i in range(5):
        assert torch.load(tmp_path / "out" / f"{i}.bin", weights_only=True).keys() >= {"out.weight"}


class Beside(nn.Module):
    """Model that returns its loss and something else."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.linear, self.order = nn.Linear(4, 4), order

    def forward(self, x: Tensor) -> Any:
        logits = self.linear(x)
        return {"loss logits": (logits.sum(), logits), "one trained": (logits.sum(), logits.mean())}[
            self.order
        ]


@pytest.mark.parametrize("order", ["loss logits", "one trained"])
def test_a_loss_beside_something_else_is_refused(alone: None, order: str) -> None:
    engine = engine_of(Beside(order))
    with pytest.raises(ValueError, match=r"got a tuple of a tensor of shape \[\], a tensor of shape "):
        engine.train_batch(iter([(torch.ones(2, 4),)]))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is None
        assert x.shape == (2, 4)
        return self.linear(x).square().mean()


def test_a_batch_that_is_one_tensor(alone: None) -> None:
    engine = engine_of(Tokens())
    engine.train_batch(iter([torch.ones(2, 4)]))
    assert engine.global_steps == 1
    with pytest.raises(ValueError, match="gave a str; expected a tuple of the model's arguments"):
        engine.train_batch(iter(["text"]))
    with pytest.raises(ValueError, match=r"gave a Tensor; this model has a loss_fn\(outputs, targets\)"):
        engine_of(Stack()).train_batch(iter([torch.ones(2, 6)]))
    engine.train_batch(iter([torch.ones(2, 4)]))  # nothing was begun


class Counted(nn.Module):
    """Loss function that returns a sum and a number of terms, both in the compute dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.scale.weight)

    def forward(self, value: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        out = self.scale(value.to(self.scale.weight.dtype)).sum()
        return out, terms.sum().to(out.dtype)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sums_and_counts_are_added_up_in_more_than_16_bits(alone: None, precision: str) -> None:
    section = {"enabled": True} | ({"loss_scale": 1} if precision == "fp16" else {})
    engine = engine_of(Counted(), gradient_accumulation_steps=4, **{precision: section})
    terms = [100.0, 100.0, 100.0, 1.0]  # which bf16 adds up to 300
    batches = [(torch.full((1, 1), 32_768.0), torch.tensor([n])) for n in terms]  # four, beyond 65,504
    assert engine.train_batch(iter(batches)).item() == pytest.approx(4 * 32_768 / 301, rel=1e-6)
    assert engine.was_step_applied()


def test_zero_grad_between_micro_batches_is_no_secret(alone: None) -> None:
    engine = make_engine(seeded(Stack), micro=4)
    (x, y), *_ = global_batches(1)
    engine.backward(F.mse_loss(engine(x[:4]), y[:4]))
    engine.step()
    with pytest.warns(UserWarning, match="drops the gradients of 1 of the step's 3 micro batches"):
        engine.zero_grad()
    engine.zero_grad()


class Indices(torch.utils.data.Dataset[Any]):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> Any:
        self.seen.append(i)
        return torch.full((4,), float(i))


def test_the_engines_own_iterator_knows_what_others_have_taken(alone: None) -> None:
    data = Indices()
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 1e-5}}}
    engine = uni3d.initialize(
        model=Tokens(), training_data=data, config=config | {"parallel": {"device": "cpu"}}
    )[0]
    engine.train_batch()
    mine = iter(engine.training_dataloader)
    engine.train_batch(mine)
    engine.train_batch(mine)
    engine.train_batch()
    assert len(data.seen) == len(set(data.seen)) == 8, "each sample once"


def late_case() -> Any:
    """Read a step's numbers during the next, as on GPUs; one rank asks in between, as loggers do."""
    torch.manual_seed(0)
    engine = engine_of(Tokens(), optimizer={"type": "Adam", "params": {"lr": 0.1}})
    engine._stepper.deferred = True
    norms: list[float | None] = []
    for i in range(5):
        batch = torch.full((2, 4), float("nan") if i == 1 else 1.0)
        try:
            engine.train_batch(iter([batch]))
        except FloatingPointError:
            norms.append(None)
        if engine.global_rank == 0:
            norms.append(engine.get_global_grad_norm())
            engine.was_step_applied()
    weights = [tensor.tolist() for tensor in engine.module_state_dict().values()]
    return engine.global_samples, weights, norms


def test_a_rank_that_looks_changes_nothing(ranks: Ranks) -> None:
    (samples, weights, norms), (others, their_weights, _) = ranks.run(2, late_case)
    assert samples == others == 5 * 4, "all batches were taken"
    assert weights == their_weights
    assert norms[1] != norms[1], "NaN, as it was"
    assert None in norms, "raised by all in the next step"
