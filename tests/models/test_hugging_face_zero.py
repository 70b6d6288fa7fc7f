"""Hugging Face models under every ZeRO stage take the steps of plain PyTorch."""

from itertools import product
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from marks import matrix
from models import save_and_wait
from ranks import Ranks
from torch import Tensor, nn

pytestmark = pytest.mark.slow

KINDS = ("bert", "gpt2", "llama", "mixtral")
CASES = [matrix(k, z) if z in (1, 2) and k != "gpt2" else (k, z) for k, z in product(KINDS, range(4))]


def steps_case(kind: str, zero: int) -> tuple[list[float], list[float], dict[str, Tensor], int]:
    engine = hf_models.make_engine(hf_models.make(kind), zero, dp=2)
    gathered = 0

    def look(module: nn.Module, *_: Any) -> None:
        nonlocal gathered
        whole = [p for p in engine.module.parameters() if not isinstance(p, torch.distributed.tensor.DTensor)]
        gathered = max(gathered, sum(p.numel() for p in whole))

    for name, module in engine.module.named_modules():
        if name.split(".")[-1].isdigit():
            module.register_forward_hook(look)
    losses, norms = hf_models.train(engine, kind)
    return losses, norms, hf_models.whole(engine.module), gathered


@pytest.mark.parametrize(("kind", "zero"), CASES)
def test_the_steps_are_those_of_one_process(hf_ranks: Ranks, kind: str, zero: int) -> None:
    losses, norms, model = hf_models.train_plainly(kind)
    expected = dict(model.named_parameters())
    for found_losses, found_norms, parameters, gathered in hf_ranks.run(2, steps_case, kind, zero):
        assert found_losses == pytest.approx(losses, rel=1e-5)
        assert found_norms == pytest.approx(norms, rel=1e-5)
        assert parameters.keys() == expected.keys()
        for name, parameter in expected.items():
            torch.testing.assert_close(parameters[name], parameter.detach(), rtol=1e-5, atol=1e-6, msg=name)
        if zero == 3:
            layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
            one = sum(p.numel() for p in layers[0].parameters())
            rest = sum(p.numel() for p in expected.values()) - one * len(layers)
            assert gathered <= one + rest, "one layer at a time is whole, beside what belongs to none"


def save_case(run: str) -> tuple[float, dict[str, Tensor]]:
    engine = hf_models.make_engine(hf_models.make("llama"), 3, dp=2)
    losses, _ = hf_models.train(engine, "llama")
    save_and_wait(engine, run)
    return losses[-1], hf_models.whole(engine.module)


def load_case(run: str) -> tuple[int, dict[str, Tensor]]:
    engine = hf_models.make_engine(hf_models.make("llama"), 1)
    engine.load_checkpoint(run)
    return engine.global_steps, hf_models.whole(engine.module)


def test_a_checkpoint_of_two_ranks_is_loaded_on_one(hf_ranks: Ranks, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    (_, saved), _ = hf_ranks.run(2, save_case, run)
    ((steps, loaded),) = hf_ranks.run(1, load_case, run)
    assert steps == hf_models.STEPS
    assert loaded.keys() == saved.keys()
    assert "lm_head.weight" not in saved, "it is the embedding's"
    for name, parameter in saved.items():
        torch.testing.assert_close(loaded[name], parameter, rtol=0, atol=0, msg=name)
