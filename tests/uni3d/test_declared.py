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


@pytest.mark.parametrize("place", [(1, 1, 1, 0), (2, 1, 2, 1)])
def test_how_it_may_be_split(ranks: Ranks, tmp_path, place):
    ranks.run(place[0] * place[1] * place[2], save_case, place, str(tmp_path))
    model = GPT(GPTConfig(**TIED))
    assert ckpt.open_checkpoint(tmp_path).manifest["model"]["declared"] == {
        "class": "GPT",
        "pipeline_layers": model.pipeline_layers,
        "tp_plan": model.tp_plan,
        "tp_units": model.tp_units,
        "hugging_face": model.hugging_face,
    }


class Says(OwnLoss):
    """A model with something to say, good or bad."""

    hugging_face: Any = None


@pytest.mark.usefixtures("alone")
def test_what_it_is_to_hugging_face(tmp_path):
    model = Says()
    model.hugging_face = {"config": {"model_type": "m", "sizes": [1, None]}, "names": {"z": "a", "a.*": None}}
    engine = make_engine(model)
    model.hugging_face["config"].clear()  # kept as it was at the beginning
    engine.save_checkpoint(tmp_path)
    engine.wait_for_checkpoint()
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
        ({"config": {"model_type": "m"}, "names": ["a"]}, r"must be pattern -> replacement, not \['a'\]"),
    ],
)
def test_what_cannot_be_kept_is_no_reason_not_to_train(tmp_path, form, problem):
    model = Says()
    model.hugging_face = form
    with pytest.warns(UserWarning, match=f"won't say what Says is to Hugging Face .*{problem}"):
        engine = make_engine(model)
    engine.save_checkpoint(tmp_path)
    engine.wait_for_checkpoint()
    assert ckpt.open_checkpoint(tmp_path).manifest["model"]["declared"] == {"class": "Says"}


@pytest.mark.usefixtures("alone")
def test_a_model_that_says_nothing(tmp_path):
    engine = make_engine(OwnLoss())
    engine.save_checkpoint(tmp_path)
    engine.wait_for_checkpoint()
    assert ckpt.open_checkpoint(tmp_path).manifest["model"]["declared"] == {"class": "OwnLoss"}
