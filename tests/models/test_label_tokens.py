"""Masked labels: Hugging Face models train on the mean over the global batch's label tokens."""

from typing import Any

import hf_models
import pytest
import torch
from hf_models import BATCH, LENGTH, VOCABULARY, hf
from marks import matrix, slow
from ranks import Ranks
from torch import Tensor, nn

import uni3d

LR = 0.5


def make(kind: str) -> nn.Module:
    sizes = hf_models.SIZES | {"num_key_value_heads": 2, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if kind == "masked words":
            ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id"), 0)
            return hf.ModernBertForMaskedLM(hf.ModernBertConfig(**(hf_models.SIZES | ends), sep_token_id=0))
        if kind == "token classes":
            return hf.LlamaForTokenClassification(
                hf.LlamaConfig(**sizes, num_labels=4, classifier_dropout=0.0)
            )
        if kind == "classes":
            return hf.LlamaForSequenceClassification(hf.LlamaConfig(**sizes, num_labels=3))
    return hf_models.make(kind)


def batches(kind: str) -> list[dict[str, Tensor]]:
    """Return two global batches whose labels are masked unevenly; a whole micro batch has none."""
    g = torch.Generator().manual_seed(1)
    made = []
    for _ in range(2):
        ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=g)
        labels = torch.randint(0, 4, ids.shape, generator=g) if kind == "token classes" else ids.clone()
        if kind == "classes":
            labels = torch.randint(0, 3, (BATCH,), generator=g)
            labels[[0, 1, 5]] = -100
        else:
            for row, kept in enumerate([0, 0, 1, 5, 6, 2, 6, 3]):
                labels[row, kept:] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def plainly(kind: str) -> tuple[list[float], dict[str, Tensor]]:
    model = make(kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(trained, lr=LR), []
    for batch in batches(kind):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, dict(model.named_parameters())


def mine(batch: dict[str, Tensor], engine: uni3d.Engine) -> list[dict[str, Tensor]]:
    size, steps = engine.triad.micro_batch, engine.triad.accumulation
    first = engine.model.topology.dp_rank * size * steps
    return [hf_models.rows(batch, first + i * size, size) for i in range(steps)]


def engine_of(model: nn.Module, zero: int, micro: int, **config: Any) -> uni3d.Engine:
    settings = {
        "train_batch_size": BATCH,
        "gradient_clipping": 0.0,
        "train_micro_batch_size_per_gpu": micro,
        "optimizer": {"type": "SGD", "params": {"lr": LR}},
        "zero_optimization": {"stage": zero},
        "parallel": {"device": "cpu"},
    }
    return uni3d.initialize(model=model, config=settings | config)[0]


Trained = tuple[list[float], float, dict[str, Tensor]]


def case(kind: str, zero: int, micro: int, precision: str = "fp32", tp: int = 1) -> Trained:
    config: dict[str, Any] = {"parallel": {"device": "cpu", "tp": tp}}
    if precision != "fp32":
        config[precision] = {"enabled": True} | ({"initial_scale_power": 12} if precision == "fp16" else {})
    model = make(kind)
    if tp > 1:
        model.tp_plan["lm_head"] = "colwise_logits"
    engine = engine_of(model, zero, micro, **config)
    data = [mine(batch, engine) for batch in batches(kind)]
    evaluated = engine.eval_batch(iter(data[0])).item()
    losses = []
    for step in data:
        losses.append(engine.train_batch(iter(step)).item())
        assert engine.was_step_applied()
    assert "_loss_function" not in vars(engine.module), "the model is as it was"
    return losses, evaluated, engine.module_state_dict()


def check(kind: str, results: list[Trained], rel: float = 1e-5, weights_to: float = 2e-5) -> None:
    losses, expected = plainly(kind)
    for found, evaluated, weights in results:
        assert found == pytest.approx(losses, rel=rel)
        assert evaluated == pytest.approx(losses[0], rel=rel)
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight.detach(), rtol=0, atol=weights_to, msg=name)


@pytest.mark.parametrize("micro", [slow(1), 2, slow(4)])
def test_the_mean_is_over_all_label_tokens(hf_ranks: Ranks, micro: int) -> None:
    check("gpt2", hf_ranks.run(2, case, "gpt2", 0, micro))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("kind", ["gpt2", matrix("llama")])
def test_at_every_zero_stage(hf_ranks: Ranks, kind: str, zero: int) -> None:
    check(kind, hf_ranks.run(2, case, kind, zero, 1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masked words", "token classes", "classes"])
def test_other_losses_of_the_library(hf_ranks: Ranks, kind: str) -> None:
    check(kind, hf_ranks.run(2, case, kind, 2, 2))


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "rel"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_in_mixed_precision(hf_ranks: Ranks, precision: str, rel: float) -> None:
    check("gpt2", hf_ranks.run(2, case, "gpt2", 2, 1, precision), rel=rel, weights_to=rel)


@pytest.mark.slow
def test_with_logits_that_are_split_by_vocabulary(hf_ranks: Ranks) -> None:
    check("llama", hf_ranks.run(2, case, "llama", 1, 2, "fp32", 2))


def router_case() -> tuple[float, float]:
    engine = engine_of(router_model(), 0, 4)
    loss = engine.train_batch(iter(mine(batches("mixtral")[0], engine))).item()
    return loss, engine.get_global_grad_norm() or 0.0


def router_model() -> nn.Module:
    model = hf_models.make("mixtral")
    model.config.output_router_logits = True
    model.router_aux_loss_coef = 0.5
    return model


@pytest.mark.slow
def test_a_router_loss_counts_as_often_as_the_micro_batch_has_labels(hf_ranks: Ranks) -> None:
    model = router_model()
    parts = [hf_models.rows(batches("mixtral")[0], first, 4) for first in (0, 4)]
    counts = [(part["labels"][:, 1:] != -100).sum() for part in parts]
    loss = sum(model(**part).loss * n for part, n in zip(parts, counts, strict=True)) / sum(counts)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")).item()
    for found in hf_ranks.run(2, router_case):
        assert found == pytest.approx((loss.item(), norm), rel=1e-5)


def own_loss_case() -> tuple[float, float]:
    """Set a loss function of the script, and use the script's own loop."""
    model = make("gpt2")
    model.loss_function = own_loss
    engine = engine_of(model, 0, 2)
    batch = batches("gpt2")[0]
    loss = engine.train_batch(iter(mine(batch, engine))).item()
    assert engine.module.loss_function is own_loss

    engine = engine_of(make("gpt2"), 0, 4)
    looped = engine(**mine(batch, engine)[0]).loss
    engine.backward(looped)
    engine.step()
    return loss, engine._stepper.look().norm or 0.0


def own_loss(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return logits.square().mean() * (labels != -100).float().mean()


def test_other_means_count_alike(hf_ranks: Ranks) -> None:
    batch = batches("gpt2")[0]
    model = make("gpt2")
    model.loss_function = own_loss
    quarters = [model(**hf_models.rows(batch, first, 2)).loss for first in (0, 2, 4, 6)]
    halves_of = make("gpt2")
    halves = [halves_of(**hf_models.rows(batch, first, 4)).loss for first in (0, 4)]
    torch.stack(halves).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(halves_of.parameters(), float("inf")).item()
    for found in hf_ranks.run(2, own_loss_case):
        assert found == pytest.approx((torch.stack(quarters).mean().item(), norm), rel=1e-5)
