"""Tensor parallelism: the split model has the loss and every gradient of the unsplit one."""

from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from marks import slow
from model import GPT, GPTConfig
from one_stage import run_batch
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import parallel
from parallel.loss import Loss, split_logits
from parallel.tensor import check_plan, expand_plan
from parallel.ties import tied_names

GPT_OPTIONS = oracle.MODEL | {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped_query": {"num_kv_heads": 2},
    "layernorm_learned": {"norm": "layernorm", "positions": "learned"},
    "gelu_tied": {"activation": "gelu", "tied_head": True},
    "tied_grouped_layernorm": {"tied_head": True, "num_kv_heads": 2, "norm": "layernorm"},
}

COLUMNS = ("tokens", "positions", "head", "q", "k", "v", "up", "gate")
SPLIT_DIM = dict.fromkeys(COLUMNS, 0) | {"o": 1, "down": 1}
"""Dim of the weight that is split, by the last part of the module's name."""


def batch() -> tuple[Tensor, Tensor]:
    inputs, targets = oracle.samples(masked=True)
    return inputs[:6], targets[:6]


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def gradients_case(options: dict[str, Any]) -> tuple[float, float, dict[str, Tensor], dict[str, Any]]:
    with torch.device("meta"):
        model = GPT(GPTConfig(**(GPT_OPTIONS | options)))
    topology = parallel.Topology(parallel.Degrees(pp=1, dp=1, tp=2), zero_stage=0)
    built = parallel.build(model, topology, parallel.Settings(zero_stage=0, seed=oracle.SEED))
    loss = run_batch(built, *batch(), 2)
    built.zero.reshard()
    parameters = dict(built.module.named_parameters())
    assert all(p.grad is not None for p in parameters.values())
    sizes = {name: tuple(p.to_local().shape) for name, p in parameters.items()}
    gradients = {name: whole(p.grad) for name, p in parameters.items()}
    return loss.total.item(), loss.tokens.item(), gradients, sizes


QUICK = ("plain", "tied_grouped_layernorm")


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in OPTIONS])
def test_loss_and_gradients_are_those_of_the_unsplit_gpt(ranks: Ranks, name: str) -> None:
    model = oracle.initial_model(GPT_OPTIONS | OPTIONS[name])
    inputs, targets = batch()
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    loss.backward()
    results = ranks.run(2, gradients_case, OPTIONS[name])
    for rank, (total, tokens, gradients, sizes) in enumerate(results):
        assert total == pytest.approx(loss.item(), rel=1e-6)
        assert tokens == (targets != -100).sum()
        assert gradients.keys() == {n for n, _ in model.named_parameters()}
        for key, parameter in model.named_parameters():
            scale = parameter.grad.abs().max()
            assert (gradients[key] - parameter.grad).abs().max() <= 1e-5 * scale, key
            half = list(parameter.shape)
            dim = SPLIT_DIM.get(key.split(".")[-2])
            if dim is not None:  # rounded up on the first rank
                half[dim] = (half[dim] + 1 - rank) // 2
            assert list(sizes[key]) == half, key


class Biased(nn.Module):
    """A plain module with biases, which computes its own loss."""

    tp_plan = {"up": "colwise", "down": "rowwise"}  # noqa: RUF012 - as models declare it

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.down(torch.tanh(self.up(x))), y)


def biased() -> tuple[Biased, Tensor, Tensor]:
    torch.manual_seed(1)
    return Biased(), torch.randn(4, 5), torch.randn(4, 3)


def biased_case() -> tuple[float, dict[str, Tensor]]:
    model, x, y = biased()
    topology = parallel.Topology(parallel.Degrees(pp=1, dp=1, tp=2), zero_stage=1)
    built = parallel.build(model, topology, parallel.Settings(zero_stage=1, seed=0))
    with split_logits(topology):
        loss = Loss.of(built.module(x, y))
        loss.total.backward()
    return loss.total.item(), {n: whole(p.grad) for n, p in built.module.named_parameters()}


def test_biases_count_once(ranks: Ranks) -> None:
    model, x, y = biased()
    loss = model(x, y)
    loss.backward()
    for total, gradients in ranks.run(2, biased_case):
        assert total == pytest.approx(loss.item(), rel=1e-6)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


def gpt(**options: Any) -> GPT:
    with torch.device("meta"):
        return GPT(GPTConfig(**(GPT_OPTIONS | options)))


def test_patterns_of_a_plan() -> None:
    model = gpt()
    expanded = expand_plan(model, {"layers.*.attn.[qk]": "colwise", "head": "colwise_logits"})
    assert expanded == {
        "layers.0.attn.q": "colwise",
        "layers.0.attn.k": "colwise",
        "layers.1.attn.q": "colwise",
        "layers.1.attn.k": "colwise",
        "head": "colwise_logits",
    }
    with pytest.raises(ValueError, match=r"^tp_plan\['head'\] is 'diagonal'; expected one of colwise, row"):
        expand_plan(model, {"head": "diagonal"})
    with pytest.raises(ValueError, match=r"^tp_plan names 'layers\.\*\.mlp', but GPT has no such module$"):
        expand_plan(model, {"layers.*.mlp": "colwise"})


@pytest.mark.parametrize(
    ("options", "tp", "message"),
    [
        ({"num_kv_heads": 2, "ffn_size": 28}, 4, "the 2 heads of layers.0.attn.k (colwise)"),
        ({}, 3, "the 26 features of layers.0.ffn.gate (colwise)"),
        ({"ffn_size": 27}, 2, "the 27 features of layers.0.ffn.gate (colwise)"),
        ({"ffn_size": 27, "activation": "gelu"}, 3, "the 4 heads of layers.0.attn.q (colwise)"),
    ],
)
def test_a_degree_that_does_not_divide(options: dict[str, Any], tp: int, message: str) -> None:
    model = gpt(**options)
    with pytest.raises(ValueError, match=r"choose a tp that does$") as caught:
        check_plan(model, expand_plan(model, model.tp_plan), model.tp_units, tp)
    assert str(caught.value).startswith(f"tp({tp}) doesn't divide {message}")


def test_other_names_of_tied_weights() -> None:
    assert tied_names(gpt(tied_head=True)) == {"head.weight": "embed.tokens.weight"}
    assert tied_names(gpt()) == {}


def splits_case() -> list[str]:
    """Return the errors of models that can't be split, raised before any work is done."""
    errors = []
    for model, pp, tp in ((nn.Linear(2, 2), 1, 2), (nn.Linear(2, 2), 2, 1), (gpt(ffn_size=27), 1, 2)):
        topology = parallel.Topology(parallel.Degrees(pp=pp, dp=1, tp=tp), zero_stage=0)
        with pytest.raises(ValueError, match=r"needs a model|doesn't divide") as caught:
            parallel.build(model, topology, parallel.Settings(zero_stage=0, seed=0))
        errors.append(str(caught.value))
    return errors


def test_models_that_do_not_say_how_they_are_split(ranks: Ranks) -> None:
    one, other = ranks.run(2, splits_case)
    assert one == other
    assert one[0] == "tp(2) needs a model with a tp_plan, but Linear has none; use tp=1"
    assert one[1] == "pp(2) needs a model with pipeline_layers, but Linear has none; use pp=1"
    assert one[2].startswith("tp(2) doesn't divide the 27 features of layers.0.ffn.gate")


def no_plan_case() -> str:
    model = GPT(GPTConfig(**oracle.MODEL))
    plan = {name: style for name, style in model.tp_plan.items() if style != "sequence_parallel"}
    model.__class__ = type("Plain", (GPT,), {"tp_plan": plan})
    topology = parallel.Topology(parallel.Degrees(pp=1, dp=1, tp=2), zero_stage=0)
    with pytest.raises(ValueError, match="sequence_parallel") as caught:
        parallel.build(model, topology, parallel.Settings(seed=0, sequence_parallel=True))
    return str(caught.value)


def test_a_plan_without_sequence_parallelism_is_refused(ranks: Ranks) -> None:
    for error in ranks.run(2, no_plan_case):
        assert error == (
            "sequence_parallel needs a tp_plan that says where the sequence is split, but that of Plain has "
            "no 'sequence_parallel' for the norms"
        )
