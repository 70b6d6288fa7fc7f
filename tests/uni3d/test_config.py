"""The config: the batch triad, and an error that helps for everything that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uni3d.config import BatchTriad, Config, batch_triad, load_config
from uni3d.deepspeed_keys import REFUSED

SIZES = st.integers(1, 12)


def config(total: int | None, micro: int | None, steps: int | None) -> Config:
    values = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    return load_config({k: v for k, v in values.items() if v is not None})


@given(SIZES, SIZES, SIZES)
def test_any_two_of_the_batch_sizes_give_the_third(micro: int, steps: int, dp: int) -> None:
    total = micro * steps * dp
    expected = BatchTriad(train_batch=total, micro_batch=micro, accumulation=steps)
    assert batch_triad(config(total, micro, steps), dp) == expected
    assert batch_triad(config(total, micro, None), dp) == expected
    assert batch_triad(config(total, None, steps), dp) == expected
    assert batch_triad(config(None, micro, steps), dp) == expected


@given(SIZES, SIZES)
def test_one_batch_size_alone_means_no_accumulation(micro: int, dp: int) -> None:
    expected = BatchTriad(train_batch=micro * dp, micro_batch=micro, accumulation=1)
    assert batch_triad(config(micro * dp, None, None), dp) == expected
    assert batch_triad(config(None, micro, None), dp) == expected


OPTIONAL = st.none() | st.integers(1, 40)


@given(OPTIONAL, OPTIONAL, OPTIONAL, st.integers(1, 6))
def test_an_answer_fits_what_was_given_and_an_error_shows_it(
    total: int | None, micro: int | None, steps: int | None, dp: int
) -> None:
    settings = config(total, micro, steps)
    if total is None and micro is None:
        with pytest.raises(ValueError, match=r"^config: give train_batch_size or train_micro_batch"):
            batch_triad(settings, dp)
        return
    default = range(1, 41) if micro and total else [1]  # of accumulation steps
    solutions = {
        (m * s * dp, m, s)
        for m in ([micro] if micro else range(1, 41))
        for s in ([steps] if steps else default)
        if total in (None, m * s * dp)
    }
    if solutions:
        triad = batch_triad(settings, dp)
        assert solutions == {(triad.train_batch, triad.micro_batch, triad.accumulation)}
        return
    with pytest.raises(ValueError, match="can't be solved in whole numbers") as caught:
        batch_triad(settings, dp)
    shown = ["?" if x is None else x for x in (total, micro, steps)]
    assert (
        f"train_batch_size({shown[0]}) = train_micro_batch_size_per_gpu({shown[1]}) * "
        f"gradient_accumulation_steps({shown[2]}) * dp({dp})"
    ) in str(caught.value)


def error_of(values: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=r"^config: ") as caught:
        load_config(values)
    return str(caught.value).removeprefix("config: ")


ADAMW = {"type": "AdamW"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_batchsize": 8}, "unknown key 'train_batchsize'; did you mean 'train_batch_size'?"),
        ({"parallel": {"ppp": 2}}, "unknown key 'parallel.ppp'; did you mean 'pp'?"),
        ({"zero_optimization": {"stge": 1}}, "unknown key 'zero_optimization.stge'; did you mean 'stage'?"),
        ({"zero_optimization": {"xyz": 1}}, "unknown key 'zero_optimization.xyz'; known here: stage"),
        (
            {"optimizer": ADAMW | {"params": {"weight_decy": 1}}},
            "unknown key 'optimizer.params.weight_decy'; did you mean 'weight_decay'?",
        ),
        (
            {"optimizer": {"type": "SGD", "params": {"qqq": 1}}},
            "unknown key 'optimizer.params.qqq'; known here: lr, momentum, nesterov, weight_decay",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "prams": {}}},
            "unknown key 'scheduler.prams'; did you mean 'params'?",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest(values: dict[str, Any], message: str) -> None:
    assert error_of(values) == message


@pytest.mark.parametrize("key", REFUSED)
def test_a_refused_key_says_why(key: str) -> None:
    values: dict[str, Any] = {"enabled": True}
    for part in reversed(key.split(".")):
        values = {part: values}
    assert error_of(values) == f"{key} is refused: {REFUSED[key]}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4: input should be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "1"}}, "zero_optimization.stage is '1': "),
        ({"train_batch_size": "8"}, "train_batch_size is '8': input should be a valid integer"),
        ({"train_batch_size": 8.5}, "train_batch_size is 8.5: "),
        ({"train_batch_size": 0}, "train_batch_size is 0: input should be greater than 0"),
        ({"train_batch_size": True}, "train_batch_size is True: "),
        ({"gradient_clipping": -1}, "gradient_clipping is -1: "),
        ({"seed": -1}, "seed is -1: "),
        ({"parallel": []}, "parallel is []: "),
        ({"parallel": {"tp": 1.5}}, "parallel.tp."),
        (
            {"parallel": {"device": "tpu"}},
            "parallel.device is 'tpu': input should be 'auto', 'cpu' or 'cuda'",
        ),
        ({"optimizer": {"type": "Lion"}}, "optimizer is {'type': 'Lion'}: "),
        ({"optimizer": {"params": {}}}, "optimizer is {'params': {}}: unable to extract tag"),
        ({"optimizer": ADAMW | {"params": {"lr": "1e-3"}}}, "optimizer.params.lr is '1e-3': "),
        ({"optimizer": ADAMW | {"params": {"betas": [0.9, 1.0]}}}, "optimizer.params.betas.1 is 1.0: "),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is True: expected 0, 1, 2 or 3"),
        ({"checkpoint": {"keep_last": 0}}, "checkpoint.keep_last is 0: "),
        ({"checkpoint": {"keep_every": 2}}, "checkpoint is {'keep_every': 2}: keep_every says what is kept"),
        (
            {"checkpoint": {"keep_last": 2, "durable": False}},
            "checkpoint is {'keep_last': 2, 'durable': Fals",
        ),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal is refused: not needed"),
        ({"scheduler": {"type": "WarmupDecayLR"}}, "scheduler.params is {'type': 'WarmupDecayLR'}: "),
    ],
)
def test_a_wrong_value_names_the_key(values: dict[str, Any], message: str) -> None:
    assert error_of(values).startswith(message)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    text = error_of({"seed": "x", "fp17": {}, "parallel": {"pp": 0.5, "device": "tpu"}})
    for part in ("seed is 'x'", "unknown key 'fp17'", "parallel.pp", "parallel.device is 'tpu'"):
        assert part in text


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match=r"config .*config\.json can't be read: No such file"):
        load_config(path)
    path.write_text('{"seed": 1,}')
    with pytest.raises(ValueError, match=r"config .*config\.json is not JSON: "):
        load_config(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"config: the whole is \[1\]: "):
        load_config(path)
    values = {"train_batch_size": 8, "seed": 3, "optimizer": ADAMW | {"params": {"betas": [0.8, 0.9]}}}
    path.write_text(json.dumps(values))
    assert load_config(path) == load_config(str(path)) == load_config(values)
    assert load_config(path).optimizer.params.betas == (0.8, 0.9)  # type: ignore[union-attr]
