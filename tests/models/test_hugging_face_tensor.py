"""Hugging Face models train under tensor parallelism with their own plans."""

from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from dispatch_modes import ComputedShapes
from marks import slow
from models import save_and_wait
from ranks import Ranks

import ckpt
import parallel
from uni3d.estimate.saved import SavedModel
from uni3d.manifest import RunManifest
from uni3d.state import Inventory

LOGITS = {"lm_head": "colwise_logits"}


def steps_case(kind: str, zero: int, plan: dict[str, str]) -> Any:
    model: Any = hf_models.make(kind)
    model.tp_plan.update(plan)
    engine = hf_models.make_engine(model, zero, tp=2)
    losses, norms = hf_models.train(engine, kind)
    return losses, norms, hf_models.whole(engine.module)


@pytest.mark.parametrize(
    ("kind", "zero", "plan"),
    [slow("llama", 0, {}), ("llama", 3, LOGITS), slow("qwen3", 3, {}), ("mixtral", 1, {})],
)
def test_steps_are_those_of_one_process(hf_ranks: Ranks, kind: str, zero: int, plan: dict[str, str]) -> None:
    losses, norms, model = hf_models.train_plainly(kind)
    for found_losses, found_norms, parameters in hf_ranks.run(2, steps_case, kind, zero, plan):
        assert found_losses == pytest.approx(losses, rel=1e-5)
        assert found_norms == pytest.approx(norms, rel=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameters[name], parameter.detach(), rtol=1e-5, atol=1e-6, msg=name)


def logits_case(plan: dict[str, str]) -> set[int]:
    model: Any = hf_models.make("llama")
    model.tp_plan.update(plan)
    engine = hf_models.make_engine(model, 3, tp=2)
    (batch, *_) = hf_models.batches("llama")
    micro = [hf_models.rows(batch, start, 4) for start in (0, 4)]
    with ComputedShapes() as shapes:
        engine.train_batch(iter(micro))
    return {shape[-1] for shape in shapes.seen if shape}


def test_with_split_logits_no_rank_holds_all_of_them_under_the_models_own_loss(hf_ranks: Ranks) -> None:
    for part, seen in zip((31, 30), hf_ranks.run(2, logits_case, LOGITS), strict=True):
        assert part in seen, "a rank's own part is seen"
        assert hf_models.VOCABULARY not in seen
    for seen in hf_ranks.run(2, logits_case, {}):
        assert hf_models.VOCABULARY in seen, "the plan as it comes gathers them"


def refused_case(kind: str, plan: dict[str, str], options: dict[str, Any]) -> str:
    model: Any = hf_models.make(kind, **options)
    model.tp_plan.update(plan)
    with pytest.raises(ValueError, match=r"tp|split") as caught:
        hf_models.make_engine(model, 0, tp=2)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "plan", "options", "message"),
    [
        ("gpt2", {}, {}, "tp(2) needs a model with a tp_plan, but GPT2LMHeadModel has none; use tp=1"),
        ("bert", {}, {}, "tp(2) needs a model with a tp_plan, but BertForSequenceClassification has none"),
        (
            "llama",
            {},
            {"num_key_value_heads": 1},
            "tp(2) doesn't divide the 1 heads of model.layers.0.self_attn.k_proj (colwise); choose",
        ),
        (
            "llama",
            {},
            {"hidden_size": 12, "num_attention_heads": 3, "num_key_value_heads": 3},
            "tp(2) doesn't divide the 3 heads of model.layers.0.self_attn.q_proj (colwise); choose",
        ),
        (
            "gpt2",
            {"transformer.h.*.attn.c_attn": "colwise"},
            {},
            "transformer.h.0.attn.c_attn is a Conv1D, which the style 'colwise' can't split; expected Linear",
        ),
    ],
)
def test_what_cannot_be_split_is_named(
    hf_ranks: Ranks, kind: str, plan: dict[str, str], options: dict[str, Any], message: str
) -> None:
    for error in hf_ranks.run(2, refused_case, kind, plan, options):
        assert error.startswith(message)


def forgotten_case() -> str:
    model: Any = hf_models.make("qwen3")
    del model.tp_plan["model.layers.*.self_attn.q_norm"]
    engine = hf_models.make_engine(model, 1, tp=2)
    with pytest.raises(ValueError, match="different gradients") as caught:
        hf_models.train(engine, "qwen3")
    return str(caught.value)


def test_a_norm_over_each_head_that_the_plan_forgets_is_named_at_the_first_step(hf_ranks: Ranks) -> None:
    for error in hf_ranks.run(2, forgotten_case):
        assert error.startswith(
            "tp(2) ranks have different gradients of model.layers.0.self_attn.q_norm.weight, "
            "model.layers.1.self_attn.q_norm.weight, which the tp_plan leaves out"
        )


def resharding_case(kind: str, zero: int, run: str) -> list[Any]:
    engine = hf_models.make_engine(hf_models.make(kind), zero, dp=2, tp=2)
    hf_models.train(engine, kind)
    save_and_wait(engine, run)
    arrays = Inventory(engine.model).arrays(engine.optimizer)
    return sorted((tuple(spec.key), tuple(spec.box)) for spec, _, _ in arrays)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "zero"), [("llama", 3), ("qwen3", 0), ("mixtral", 1)])
def test_boxes_are_those_of_real_ranks(hf_ranks: Ranks, tmp_path: Path, kind: str, zero: int) -> None:
    found = hf_ranks.run(4, resharding_case, kind, zero, str(tmp_path))
    checkpoint = ckpt.open_checkpoint(tmp_path)
    source = SavedModel(checkpoint.arrays, RunManifest.of(checkpoint))
    assert source.refuses_tp(2) is None
    assert "heads of model.layers.0.self_attn" in (source.refuses_tp(3) or "")
    assert source.refuses_pp(2) is not None
    ranks = parallel.Ranks(pp=1, dp=2, tp=2, zero=zero)
    told: list[list[Any]] = [[] for _ in range(4)]
    for part in source.by_pipeline_rank(1)[0]:
        for rank, box in enumerate(part.boxes(ranks, ranks.shards())):
            told[rank].append((tuple(part.info.key), tuple(box)))
    assert found == [sorted(boxes) for boxes in told]
    assert any(part.kind.tp_dim is not None for part in source.by_pipeline_rank(1)[0])
