"""Values for `"auto"` are those of the Trainer of Hugging Face, whose own code fills in the expected ones."""

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from models import Stack, seeded
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

import uni3d
from uni3d.config import load_config
from uni3d.config.trainer import ARGUMENTS, FILLED, autos, fill, hidden_size, standing_in

PARAMS = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
WARMUP = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
FILE: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": PARAMS},
    "scheduler": {"type": "WarmupDecayLR", "params": {**WARMUP, "total_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}
GIVEN: dict[str, Any] = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5,
    "learning_rate": 2e-5,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "weight_decay": 0.1,
    "fp16": False,
    "bf16": True,
    "warmup_steps": 0.03,
    "max_steps": 1010,
}


class TheirConfig(HfTrainerDeepSpeedConfig):
    """The Trainer's rules, on the little of Accelerate's base class that they need."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.config = copy.deepcopy(values)
        self.mismatches: list[str] = []

    def find_config_node(self, key: str) -> tuple[dict[str, Any] | None, str]:
        *sections, last = key.split(".")
        inner: Any = self.config
        for section in sections:
            inner = None if inner is None else inner.get(section)
        return inner, last

    def get_value(self, key: str) -> Any:
        inner, last = self.find_config_node(key)
        return None if inner is None else inner.get(last)

    def is_true(self, key: str) -> bool:
        return bool(self.get_value(key))

    def is_zero3(self) -> bool:
        return bool(self.get_value("zero_optimization.stage") == 3)


def theirs(values: dict[str, Any], given: dict[str, Any], *, dp: int, width: int) -> dict[str, Any]:
    """Return the config that the Trainer makes, with as many processes as `dp`."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    args = SimpleNamespace(**{**defaults, **given, "world_size": dp})
    args.get_warmup_steps = lambda steps: TrainingArguments.get_warmup_steps(args, steps)
    config = TheirConfig(values)
    config.trainer_config_process(args)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
    config.trainer_config_finalize(args, model, args.max_steps)
    return config.config


def test_the_defaults_are_the_trainers() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    assert {name: fields[name] for name in ARGUMENTS} == ARGUMENTS


CASES = [
    {},
    {"per_device_train_batch_size": 1, "warmup_steps": 0},
    {"warmup_steps": 100},
    {"warmup_steps": 0.0004},
    {"bf16": False, "fp16": True},
    {"bf16": False, "fp16_full_eval": True},
    {"save_on_each_node": True},
]


@pytest.mark.parametrize("dp", [1, 8])
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_are_those_of_the_trainers_own_code(case: dict[str, Any], stage: int, dp: int) -> None:
    values = copy.deepcopy(FILE)
    values["zero_optimization"]["stage"] = stage
    before = copy.deepcopy(values)
    found = fill(values, dp=dp, given=GIVEN | case, width=768)
    assert found.values == theirs(values, GIVEN | case, dp=dp, width=768)
    assert values == before, "the given config isn't modified"
    assert not found.left
    if not case.get("save_on_each_node"):
        assert load_config(found.values).zero_optimization.stage == stage


@pytest.mark.parametrize("fixed", [key for key in FILLED if key in autos(FILE)])
def test_a_value_of_the_config_is_refused_where_the_trainer_refuses_it(fixed: str) -> None:
    values = copy.deepcopy(FILE)
    *sections, last = fixed.split(".")
    inner = values
    for section in sections:
        inner = inner[section]
    inner[last] = [0.1, 0.2] if last == "betas" else last != "enabled" and 7
    if fixed == "fp16.enabled":
        inner[last] = True
    try:
        expected = theirs(values, GIVEN, dp=2, width=4)
    except ValueError:
        with pytest.raises(ValueError, match=rf"a Trainer refuses this config: {fixed} is "):
            fill(values, dp=2, given=GIVEN, width=4)
        return
    assert fill(values, dp=2, given=GIVEN, width=4).values == expected


def test_a_value_that_cant_be_known_is_left_and_named() -> None:
    found = fill(FILE, dp=2)
    assert set(found.left) == {
        "scheduler.params.total_num_steps",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.stage3_param_persistence_threshold",
    }
    assert found.left["scheduler.params.total_num_steps"] == "give max_steps in --training-args"
    assert found.values["scheduler"]["params"]["warmup_num_steps"] == 1
    ratio = fill(FILE, dp=2, given={"warmup_ratio": 0.1}).left
    assert "scheduler.params.warmup_num_steps" in ratio
    both = fill(FILE, dp=2, given={"warmup_ratio": 0.1, "max_steps": 50})
    assert both.values["scheduler"]["params"]["warmup_num_steps"] == 5, "of transformers 4"
    with pytest.raises(
        ValueError, match=r"left in scheduler\.params\.total_num_steps, which Hugging Face's Trainer"
    ):
        load_config(found.values)


def test_arguments_that_arent_given_are_those_that_the_config_implies() -> None:
    values = copy.deepcopy(FILE)
    values |= {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4}
    values["scheduler"]["params"] |= {"warmup_max_lr": 3e-4, "total_num_steps": 200, "warmup_num_steps": 7}
    found = fill(values, dp=2)
    assert found.filled["gradient_accumulation_steps"] == (8, "gradient_accumulation_steps as in the config")
    assert found.filled["optimizer.params.lr"] == (3e-4, "learning_rate as in the config")
    assert found.filled["optimizer.params.eps"] == (1e-8, "adam_epsilon by default")
    with pytest.raises(ValueError, match=r"warmup_max_lr is 0\.0003, but learning_rate gives 0\.1"):
        fill(values, dp=2, given={"learning_rate": 0.1})
    unknown = {**FILE, "train_batch_size": 256}
    with pytest.raises(
        ValueError, match=r"train_batch_size is 256, but per_device_train_batch_size and .* gives 16"
    ):
        fill(unknown, dp=2)


def test_values_of_accelerate() -> None:
    zero = {"stage": "auto", "offload_optimizer": {"device": "auto"}, "offload_param": {"device": "auto"}}
    zero["stage3_gather_16bit_weights_on_model_save"] = "auto"
    found = fill({"zero_optimization": zero}, dp=1).values["zero_optimization"]
    none = {"device": "none"}
    assert found == {
        "stage": 2,
        "offload_optimizer": none,
        "offload_param": none,
        "stage3_gather_16bit_weights_on_model_save": False,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": "2e-5"}, "have learning_rate '2e-5'; expected a number"),
        ({"bf16": 1}, "have bf16 1; expected true or false"),
        ({"per_device_train_batch_size": 2.5}, "have per_device_train_batch_size 2.5; expected a number"),
        ({"max_steps": True}, "have max_steps True; expected a number"),
    ],
)
def test_an_argument_of_another_type_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"the training arguments {message}"):
        fill(FILE, dp=1, given=given)


def test_the_hidden_size_is_found_where_the_trainer_looks() -> None:
    assert hidden_size({"hidden_size": 8, "text_config": {"hidden_size": 4}}) == 8
    assert hidden_size({"hidden_sizes": [8, 16, 4]}) == 16
    assert hidden_size({"text_config": {"hidden_size": 4}}) == 4
    assert hidden_size({"text_config": {"hidden_sizes": [4, 5]}}) == 5
    assert hidden_size({"n_embd": 8}) is None


NAMES = [key for key in FILLED if "nvme" not in key]


@pytest.mark.parametrize(
    "subset", [*itertools.combinations(NAMES, 1), tuple(autos(FILE))], ids=lambda s: s[0]
)
def test_any_auto_can_stand_in_the_checked_config(subset: tuple[str, ...]) -> None:
    """Whichever keys are left to the Trainer, the others are checked, and nothing else is wrong."""
    values: dict[str, Any] = {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 4}}}
    values["optimizer"] = {"type": "AdamW"}
    for key in subset:
        *sections, last = key.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = "auto"
    assert autos(values) == [key for key in FILLED if key in subset]
    load_config(standing_in(values))
    with pytest.raises(ValueError, match="unknown key 'sead'"):
        load_config(standing_in({**values, "sead": 1}))


def test_initialize_names_the_keys_the_trainer_and_the_command(tmp_path: Path, alone: None) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**FILE, "gradient_clipping": 1.0, "fp16": {"hysteresis": "auto"}}))
    with pytest.raises(ValueError, match='"auto" is left in') as caught:
        uni3d.initialize(model=seeded(Stack), config=str(path))
    text = str(caught.value)
    assert "\n" not in text
    assert text.count("optimizer.params.lr") == text.count("scheduler.params.total_num_steps") == 1
    assert "gradient_clipping" not in text
    assert "reduce_bucket_size" not in text, "it has no effect"
    assert f"`uni3d config {path} --world-size N --fill --training-args ARGS.json --save NEW.json`" in text
    assert text.endswith('"auto" is left in fp16.hysteresis, which nothing fills in; give values')
