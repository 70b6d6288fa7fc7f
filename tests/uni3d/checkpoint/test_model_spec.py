"""A model's description of itself stands in its checkpoints, whatever topology wrote them."""

from typing import Any

import pytest
from marks import slow
from model import GPT, GPTConfig
from models import OwnLoss, make_engine, save_and_wait
from ranks import Ranks
from tied_gpt import TIED, gpt_engine
from torch import nn

import ckpt
from uni3d.checkpoint.model_spec import declared

LAYER = 4 * TIED["hidden_size"] ** 2 + 3 * TIED["hidden_size"] * TIED["ffn_size"]
HEAD = TIED["vocab_size"] * TIED["hidden_size"]
"""Elements of their matrices."""


def save_case(place: tuple[int, int, int, int], folder: str, config: dict[str, Any]) -> None:
    engine = gpt_engine(*place, **config)
    save_and_wait(engine, folder)


V: dict[str, Any] = {
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
}


@pytest.mark.parametrize(
    ("place", "config", "layers", "shard_group"),
    [
        ((1, 2, 1, 0), {}, [["embed", "layers.0", "layers.1", "layers.2", "norm", "head"]], 1),
        slow((2, 1, 2, 1), {}, [["embed", "layers.0", "layers.1"], ["layers.2", "norm", "head"]], 1),
        ((2, 2, 1, 3), V, [["embed", "norm", "head"], ["layers.0", "layers.1", "layers.2"]], 2),
    ],
    ids=["copies", "stages", "V"],
)
def test_how_it_may_be_split_and_how_it_was(ranks: Ranks, tmp_path, place, config, layers, shard_group):
    ranks.run(place[0] * place[1] * place[2], save_case, place, str(tmp_path), config)
    model = GPT(GPTConfig(**TIED))
    manifest = ckpt.open_checkpoint(tmp_path).manifest
    assert manifest["model"]["declared"] == {
        "class": "GPT",
        "pipeline_layers": model.pipeline_layers,
        "layer_flops": [1, *[1 + LAYER] * TIED["num_layers"], 1, 1 + HEAD],
        "loss_fn": True,
        "tp_plan": model.tp_plan,
        "tp_units": model.tp_units,
        "hugging_face": model.hugging_face,
    }, "whatever the config's balance"
    assert manifest["writer"]["layers"] == layers
    assert manifest["writer"]["shard_group"] == shard_group


class Heads(nn.Module):
    head_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(12, 6), nn.Linear(6, 12)


class Said(nn.Module):
    """Declarations of Hugging Face's models and of pipelines written as lists."""

    tp_plan = {"attn.q": "colwise", "attn.o": "rowwise", "up": "colwise"}  # noqa: RUF012 - as models declare it

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.up = Heads(), nn.Linear(12, 12)
        self.embed = nn.Embedding(5, 12)
        self.pipeline_layers, self.pipeline_costs, self.num_stages = ["embed", "attn", "up"], [3, 1, 1], 2


def test_what_only_the_modules_tell():
    model = Said()
    said = declared(model)
    assert said == {
        "class": "Said",
        "pipeline_layers": ["embed", "attn", "up"],
        "layer_flops": [1, 145, 145],
        "loss_fn": False,
        "pipeline_costs": [3, 1, 1],
        "num_stages": 2,
        "tp_plan": Said.tp_plan,
        "tp_units": {"attn.q": 2, "attn.o": 2},
    }
    model.tp_units = {"attn.*": 6}
    assert declared(model)["tp_units"] == {"attn.*": 6}
    model.attn.q = nn.Bilinear(12, 12, 6)
    assert declared(model)["tp_refused"].startswith("attn.q is a Bilinear, which the style 'colwise' can't")


@pytest.mark.usefixtures("alone")
def test_what_was_left_out_is_named(tmp_path):
    engine = make_engine(OwnLoss())
    save_and_wait(engine, tmp_path, exclude_frozen_parameters=True)
    assert ckpt.open_checkpoint(tmp_path).manifest["model"]["left_out"] == ["fixed.weight", "fixed.bias"]
    save_and_wait(engine, tmp_path, tag="all")
    assert "left_out" not in ckpt.open_checkpoint(tmp_path).manifest["model"]


class Says(OwnLoss):
    """A model with something to say, good or bad."""

    hugging_face: Any = None


@pytest.mark.usefixtures("alone")
def test_what_it_is_to_hugging_face(tmp_path):
    model = Says()
    model.hugging_face = {"config": {"model_type": "m", "sizes": [1, None]}, "names": {"z": "a", "a.*": None}}
    engine = make_engine(model)
    model.hugging_face["config"].clear()  # kept as it was at the beginning
    save_and_wait(engine, tmp_path)
    found = ckpt.open_checkpoint(tmp_path).manifest["model"]["declared"]["hugging_face"]
    assert found["config"] == {"model_type": "m", "sizes": [1, None]}
    assert list(found["names"].items()) == [("z", "a"), ("a.*", None)], "their order counts"


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ({"config": {"model_type": "m", "sizes": (1, 2)}}, r"it\['config'\]\['sizes'\] is a tuple"),
        ({"config": {"model_type": "m"}, "name": {}}, r"must be \{\"config\": "),
        ({"config": {"hidden_size": 3}}, 'a JSON object with a "model_type"'),
        (
            {"config": {"model_type": "m"}, "names": {"(": "a"}},
            r"the pattern '\(' isn't a regular expression",
        ),
        ({"config": {"model_type": "m"}, "names": ["a"]}, r"must map patterns to replacements, not \['a'\]"),
    ],
)
def test_what_cannot_be_kept_is_no_reason_not_to_train(tmp_path, form, problem):
    model = Says()
    model.hugging_face = form
    with pytest.warns(UserWarning, match=f"won't have a Hugging Face description of Says .*{problem}"):
        engine = make_engine(model)
    save_and_wait(engine, tmp_path)
    assert ckpt.open_checkpoint(tmp_path).manifest["model"]["declared"] == {"class": "Says"}
