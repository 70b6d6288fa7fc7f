"""What a model says of itself stands in its checkpoints, whatever topology wrote them."""

from __future__ import annotations

from typing import Any

import pytest
from model import GPT, GPTConfig
from ranks import Ranks
from small_models import OwnLoss, make_engine
from tied_gpt import TIED, gpt_engine

import ckpt


def save_case(place: tuple[int, int, int, int], folder: str) -> None:
    engine = gpt_engine(*place)
    engine.save_checkpoint(folder)
    engine.wait_for_checkpoint()


def costs(model: GPT, sizes: dict[str, int]) -> list[int]:
    """By layer, 1 and the elements of its matrices: none for looking up an embedding, or in a norm."""
    width, ffn, vocab = sizes["hidden_size"], sizes["ffn_size"], sizes["vocab_size"]
    block = 4 * width * width + 3 * width * ffn  # as many heads of keys and values as of queries
    return [1, *[1 + block] * sizes["num_layers"], 1, 1 + vocab * width]


@pytest.mark.parametrize("place", [(1, 1, 1, 0), (2, 1, 2, 1)])
def test_how_it_may_be_split(ranks: Ranks, tmp_path, place):
    ranks.run(place[0] * place[1] * place[2], save_case, place, str(tmp_path))
    model = GPT(GPTConfig(**TIED))
    assert ckpt.open_checkpoint(tmp_path).manifest["model"]["declared"] == {
        "class": "GPT",
        "pipeline_layers": model.pipeline_layers,
        "pipeline_costs": costs(model, TIED),
        "tp_plan": model.tp_plan,
        "tp_units": model.tp_units,
    }


def writer_case(place: tuple[int, int, int, int], folder: str, config: dict[str, Any]) -> None:
    engine = gpt_engine(*place, **config)
    engine.save_checkpoint(folder)
    engine.wait_for_checkpoint()


@pytest.mark.parametrize(
    ("place", "config", "layers", "shard_group"),
    [
        ((1, 2, 1, 0), {}, [["embed", "layers.0", "layers.1", "layers.2", "norm", "head"]], 1),
        ((2, 1, 1, 1), {}, [["embed", "layers.0", "layers.1"], ["layers.2", "norm", "head"]], 1),
        (
            (2, 2, 1, 3),
            {
                "parallel": {
                    "pp": 2,
                    "dp": 2,
                    "device": "cpu",
                    "schedule": "zero_bubble_v",
                    "virtual_stages": 2,
                    "balance": "uniform",
                },
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 6,
            },
            [["embed", "norm", "head"], ["layers.0", "layers.1", "layers.2"]],
            2,
        ),
    ],
    ids=["copies", "stages", "V"],
)
def test_who_wrote_it(ranks: Ranks, tmp_path, place, config, layers, shard_group):
    ranks.run(place[0] * place[1] * place[2], writer_case, place, str(tmp_path), config)
    writer = ckpt.open_checkpoint(tmp_path).manifest["writer"]
    assert writer["layers"] == layers
    assert writer["shard_group"] == shard_group


@pytest.mark.usefixtures("alone")
def test_a_model_that_says_nothing(tmp_path):
    engine = make_engine(OwnLoss())
    engine.save_checkpoint(tmp_path)
    engine.wait_for_checkpoint()
    assert ckpt.open_checkpoint(tmp_path).manifest["model"]["declared"] == {"class": "OwnLoss"}
