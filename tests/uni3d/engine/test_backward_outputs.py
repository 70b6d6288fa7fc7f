"""`backward` takes a loss, or a model's output that has one."""

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from models import OwnLoss, global_batches, make_engine, micro_batches, seeded, whole
from torch import Tensor

import uni3d


class Output:
    def __init__(self, loss: Any) -> None:
        self.loss = loss


class NamedOutput(NamedTuple):
    loss: Tensor
    logits: Tensor | None = None


OUTPUTS: dict[str, Any] = {
    "an object": Output,
    "a namespace": lambda loss: SimpleNamespace(loss=loss, logits=None),
    "a named tuple": NamedOutput,
    "a dict": lambda loss: {"logits": loss.detach(), "loss": loss},
    "an ordered dict": lambda loss: OrderedDict(loss=loss),
    "an object with a sum and a count": lambda loss: Output((loss * 3, torch.tensor(3))),
    "a sum and a count": lambda loss: (loss * 3, 3),
}


def steps(wrap: Any) -> tuple[list[float], dict[str, Tensor]]:
    engine = make_engine(seeded(OwnLoss), micro=6)
    losses = []
    for x, y in global_batches(2):
        for half in range(2):
            loss = engine(x[half * 6 :][:6], y[half * 6 :][:6])
            losses.append(engine.backward(wrap(loss)).item())
            engine.step()
    return losses, whole(engine.module)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_is_as_good_as_its_loss(alone: None, kind: str) -> None:
    expected, weights = steps(lambda loss: loss)
    losses, found = steps(OUTPUTS[kind])
    assert losses == pytest.approx(expected, rel=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, msg=name)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (Output(None), r"^the loss of the Output is None; does the batch have labels\?$"),
        ({"loss": None}, r"^the loss of the dict is None; does the batch have labels\?$"),
        ({"logits": torch.zeros(2)}, r"^the dict has no loss$"),
        (None, r"^expected a loss, or an output with a \.loss; got a NoneType$"),
        (1.5, r"^expected a loss, or an output with a \.loss; got a float$"),
        (SimpleNamespace(logits=0), r"^expected a loss, or an output with a \.loss; got a SimpleNamespace$"),
        ((torch.ones(()), torch.zeros(2, 3)), r"^expected a loss, or a tuple of its sum and its number"),
    ],
    ids=["none", "none in a dict", "no loss", "nothing", "a number", "an object without", "a tuple"],
)
def test_an_output_without_a_loss_is_an_error(alone: None, output: Any, message: str) -> None:
    engine = make_engine(seeded(OwnLoss), micro=12)
    x, y = global_batches(1)[0]
    loss = engine(x, y)
    with pytest.raises(ValueError, match=message):
        engine.backward(output)
    engine.backward(loss)  # nothing has happened
    engine.step()
    assert engine.was_step_applied()


class MappedLoss(OwnLoss):
    """`OwnLoss` that returns a mapping."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return {"loss": super().forward(x, y)}


def whole_batches_case(model: str) -> tuple[list[float], list[float], dict[str, Tensor]]:
    engine = make_engine(seeded({"plain": OwnLoss, "mapped": MappedLoss}[model]), zero=3, micro=3)
    batches = global_batches(2)
    data = micro_batches(batches, engine)
    losses = [engine.train_batch(data).item() for _ in batches]
    evaluated = [engine.eval_batch(micro_batches(batches[:1], engine)).item()]
    return losses, evaluated, whole(engine.module)


def test_train_batch_opens_a_mapping(ranks: Any) -> None:
    for (*expected, weights), (*found, mapped) in zip(
        ranks.run(2, whole_batches_case, "plain"), ranks.run(2, whole_batches_case, "mapped"), strict=True
    ):
        assert found == expected
        assert all(torch.equal(mapped[name], weight) for name, weight in weights.items())


def both_ranks_case(kind: str) -> tuple[float, bool]:
    engine: uni3d.Engine = make_engine(seeded(OwnLoss), zero=2, micro=6)
    x, y = global_batches(1)[0]
    half = slice(6 * engine.global_rank, 6 * engine.global_rank + 6)
    engine.backward(OUTPUTS[kind](engine(x[half], y[half])))
    engine.step()
    norm = engine.get_global_grad_norm()
    assert norm is not None
    return norm, engine.was_step_applied()


def test_on_two_ranks(ranks: Any) -> None:
    """The script opens the output after the forward pass, so any kind will do."""
    model = seeded(OwnLoss)
    x, y = global_batches(1)[0]
    model(x, y).backward()
    squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
    expected = torch.stack(squares).sum().sqrt().item()
    for kind in ("an object", "a dict"):
        assert ranks.run(2, both_ranks_case, kind) == [(pytest.approx(expected, rel=1e-5), True)] * 2
