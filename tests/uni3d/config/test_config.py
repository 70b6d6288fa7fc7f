"""The config: batch sizes, and a helpful error for every mistake."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uni3d.config import BatchTriad, Config, batch_triad, load_config
from uni3d.config.batch import nearest_batch
from uni3d.config.deepspeed_keys import REFUSED

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
def test_batch_sizes_are_solved_or_the_error_shows_the_equation(
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
    with pytest.raises(ValueError, match="has no solution in whole numbers") as caught:
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


def adamw(**params: Any) -> dict[str, Any]:
    return {"optimizer": ADAMW | {"params": params}}


def zero(**section: Any) -> dict[str, Any]:
    return {"zero_optimization": section}


def fp16(**section: Any) -> dict[str, Any]:
    return {"fp16": section}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_batchsize": 8}, "'train_batchsize'; delete it, or did you mean 'train_batch_size'?"),
        ({"parallel": {"ppp": 2}}, "'parallel.ppp'; delete it, or did you mean 'parallel.pp'?"),
        (zero(stge=1), "'zero_optimization.stge'; delete it, or did you mean 'zero_optimization.stage'?"),
        (zero(xyz=1), "'zero_optimization.xyz'; delete it (zero_optimization has mics_shard_size, "),
        (
            adamw(weight_decy=1),
            "'optimizer.params.weight_decy'; delete it, or did you mean 'optimizer.params.weight_decay'?",
        ),
        (
            {"optimizer": {"type": "SGD", "params": {"qqq": 1}}},
            "'optimizer.params.qqq'; delete it (optimizer.params has dampening, foreach, fused, lr, ",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "prams": {}}},
            "'scheduler.prams'; delete it, or did you mean 'scheduler.params'?",
        ),
        ({"qqq": 1}, "'qqq'; delete it"),
        (
            {"offload_optimizer": {}},
            "'offload_optimizer'; delete it, or did you mean 'zero_optimization.offload_optimizer'?",
        ),
        (
            {"zero_optimization": {"partition_activations": 1}},
            "'zero_optimization.partition_activations'; delete it, or did you mean "
            "'activation_checkpointing.partition_activations'?",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest(values: dict[str, Any], message: str) -> None:
    found = error_of(values)
    assert found.startswith(f"unknown key {message}")
    assert message.endswith("?") is found.endswith("?"), "either the nearest key or all keys"


def test_unknown_keys_of_a_place_are_named_together() -> None:
    found = error_of({"qqq": 1, "www": 2, "fp16": {"xxx": 1}})
    assert found.startswith("unknown key 'fp16.xxx'; delete it (fp16 has ")
    assert found.endswith("; unknown keys 'qqq', 'www'; delete them")


@pytest.mark.parametrize("key", REFUSED)
def test_a_refused_key_says_why(key: str) -> None:
    values: dict[str, Any] = {"enabled": True}
    for part in reversed(key.split(".")):
        values = {part: values}
    assert error_of(values) == f"{key} is refused: {REFUSED[key]}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (zero(stage=4), "zero_optimization.stage is 4: input should be 0, 1, 2 or 3"),
        (zero(stage="one"), "zero_optimization.stage is 'one': "),
        (zero(stage=1.5), "zero_optimization.stage is 1.5: input should be 0, 1, 2"),
        (zero(stage=None), "zero_optimization.stage is None: "),
        ({"train_batch_size": "8"}, "train_batch_size is '8': input should be a valid integer"),
        ({"train_batch_size": 8.5}, "train_batch_size is 8.5: "),
        ({"train_batch_size": 0}, "train_batch_size is 0: input should be greater than 0"),
        ({"train_batch_size": True}, "train_batch_size is True: "),
        ({"gradient_clipping": -1}, "gradient_clipping is -1: "),
        ({"seed": -1}, "seed is -1: "),
        ({"parallel": []}, "parallel is []: "),
        ({"parallel": {"tp": 1.5}}, "parallel.tp is 1.5: input should be a valid integer, or"),
        ({"parallel": {"device": "tpu"}}, "parallel.device is 'tpu': input should be 'auto', 'cpu' or"),
        ({"optimizer": {"type": "Lino"}}, "optimizer.type: unknown optimizer 'Lino'; did you mean 'Lion'?"),
        ({"optimizer": {"type": "Optimizer"}}, "optimizer.type: unknown optimizer 'Optimizer'; "),
        ({"optimizer": {"params": {}}}, 'optimizer is {\'params\': {}}: expected {"type": "AdamW", '),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type 'Lamb' is refused: its layer-wise norms"),
        ({"optimizer": {"type": "onebitadam"}}, "optimizer.type 'onebitadam' is refused: it needs DeepSpeed"),
        ({"optimizer": {"type": "Adafactor"}}, "optimizer.type 'Adafactor' is refused: torch's impl"),
        (
            {"optimizer": {"type": "RMSprop", "params": {"alhpa": 0.5}}},
            "unknown key 'optimizer.params.alhpa'; delete it, or did you mean 'optimizer.params.alpha'?",
        ),
        ({"optimizer": {"type": "RMSprop", "params": {"centered": 2}}}, "optimizer.params.centered is 2: "),
        ({"optimizer": {"type": "NAdam", "params": {"betas": [0.9]}}}, "optimizer.params.betas.1 is missing"),
        ({"optimizer": {"type": "SGD", "params": {"params": []}}}, "unknown key 'optimizer.params.params'"),
        (
            {"optimizer": {"type": "SGD", "lr": 0.1}},
            "unknown key 'optimizer.lr'; delete it, or did you mean 'optimizer.params.lr'?",
        ),
        (
            {"optimizer": {"type": "Adam", "eps": 1}},
            "unknown key 'optimizer.eps'; delete it, or did you mean 'optimizer.p",
        ),
        (adamw(adam_w_mode=False), "optimizer: adam_w_mode false contradicts"),
        (adamw(max_grad_norm=1.0), "optimizer.params.max_grad_norm is refused"),
        (
            adamw(bias_correction=False),
            "optimizer.params.bias_correction is False: torch's Adam and AdamW always correct the bias",
        ),
        (adamw(lr="1e-3"), "optimizer.params.lr is '1e-3': "),
        (adamw(betas=[0.9, 1.0]), "optimizer.params.betas.1 is 1.0: "),
        (
            adamw(fp32_optimizer_states=False),
            "optimizer.params.fp32_optimizer_states is False: parameters and their states are always fp32",
        ),
        ({"checkpoint": {"keep_last": 0}}, "checkpoint.keep_last is 0: "),
        ({"checkpoint": {"keep_every": 2}}, "checkpoint: keep_every needs keep_last"),
        ({"checkpoint": {"keep_last": 2, "durable": False}}, "checkpoint: keep_last deletes checkpoints"),
        ({"scheduler": {"type": "WarmupDecayLR"}}, "scheduler.params.total_num_steps is missing"),
        ({"scheduler": {"type": "warmuplr"}}, "scheduler.type: unknown schedule 'warmuplr'; did you mean 'W"),
        ({"scheduler": {"params": {}}}, 'scheduler is {\'params\': {}}: expected {"type": "WarmupLR", '),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"last_batch_iteration": 5}}},
            "scheduler.params.last_batch_iteration is 5: ",
        ),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16 and bf16 are both enabled; enable"),
        (fp16(loss_scale=-1), "fp16.loss_scale is -1: input should be greater than or equal to 0"),
        (fp16(loss_scale=float("inf")), "fp16.loss_scale is inf: input should be a finite number"),
        (fp16(enabled=True, loss_scale_window=0), "fp16: loss_scale_window(0) should be greater than 0"),
        (fp16(enabled=True, hysteresis=0), "fp16: hysteresis(0) should be greater than 0"),
        (fp16(initial_scale_power=200), "fp16.initial_scale_power is 200: "),
        (fp16(enabled=True, min_loss_scale=0), "fp16: min_loss_scale(0) should be greater than 0"),
        (fp16(enabled=True, initial_scale_power=2, min_loss_scale=8), "fp16: min_loss_scale(8) is above the"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping is nan: "),
        ({"communication_data_type": "int8"}, "communication_data_type is 'int8': input should be 'fp32', "),
        ({"data_types": {"grad_accum_dtype": "int8"}}, "data_types.grad_accum_dtype is 'int8': "),
        (
            {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "bf16"},
            "data_types.grad_accum_dtype is fp32, but ZeRO stages 0 and 1",
        ),
        ({"zero_optimization": "true"}, "zero_optimization is 'true': expected an object, {"),
        ({"fp16": True}, "fp16 is True: expected an object, {"),
        (
            zero(stage=3, offload_param={"device": "nvme"}),
            "zero_optimization.offload_param.device is 'nvme': offloading to disk isn't supported",
        ),
        (zero(stage=1, cpu_offload="maybe"), "zero_optimization.cpu_offload is 'maybe': expected true or"),
        (
            zero(cpu_offload=True, offload_optimizer={"device": "none"}),
            "zero_optimization.cpu_offload is {'device': 'cpu'}, but zero_optimization.offload_opt",
        ),
        (zero(mics_shard_size=2), "zero_optimization: a shard group needs stage 1"),
        (
            zero(stage=3, mics_shard_size=-2),
            "zero_optimization.mics_shard_size is -2: input should be greater",
        ),
        (
            zero(stage=3, mics_shard_size=2, zero_hpz_partition_size=4),
            "zero_optimization: zero_hpz_partition_size and mics_shard_size mean the same",
        ),
        (
            {"tensor_parallel": {"autotp_size": 2}, "parallel": {"tp": 4}},
            "tensor_parallel.autotp_size is 2, but parallel.tp, which means the same, is 4; give one",
        ),
        ({"bf16": {}, "bfloat16": {"enabled": True}}, "bfloat16 is {'enabled': True}, but bf16, which"),
        ({"activation_checkpointing": {"every": 2}}, "activation_checkpointing: every has no effect"),
        ({"train_batch_size": "auto"}, '"auto" is left in train_batch_size, which Hugging Face\'s Trainer'),
        (fp16(loss_scale="auto"), '"auto" is left in fp16.loss_scale, which nothing fills in; give values'),
        (
            {
                "activation_checkpointing": {"mode": "selective"},
                "pipeline": {"activation_checkpoint_interval": 2},
            },
            "pipeline.activation_checkpoint_interval is 2, but activation_checkpointing.mode, which means",
        ),
        (
            {"pipeline": {"activation_checkpoint_interval": -1}},
            "pipeline.activation_checkpoint_interval is -1: expected the number of layers",
        ),
        (
            {"pipeline": {"stages": 2}, "parallel": {"pp": 4}},
            "pipeline.stages is 2, but parallel.pp, which means the same, is 4; give one",
        ),
    ],
)
def test_a_wrong_value_names_the_key(values: dict[str, Any], message: str) -> None:
    assert error_of(values).startswith(message)


def test_all_problems_are_reported_at_once() -> None:
    text = error_of({"seed": "x", "fp17": {}, "parallel": {"pp": 0.5, "device": "tpu"}})
    for part in ("seed is 'x'", "unknown key 'fp17'", "parallel.pp", "parallel.device is 'tpu'"):
        assert part in text


def test_each_problem_is_reported_once() -> None:
    params = {"lr": "auto", "weight_decy": 0}
    text = error_of({"optimizer": {"type": "AdamW", "params": params}, "sead": 1, "fp17": {}})
    assert text.count("optimizer.params.lr") == 1
    for key in ("optimizer.params.weight_decy", "sead", "fp17"):
        assert text.count(f"unknown key {key!r}") == 1


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match=r"config .*config\.json can't be read: No such file"):
        load_config(path)
    path.write_text('{"seed": 1 "fp16": {}}')
    with pytest.raises(
        ValueError, match=r"config .*config\.json is not valid JSON: expecting ',' delimiter in l"
    ):
        load_config(path)
    path.write_text('{"fp16": {},\n "train_batch_size": GLOBAL_BATCH}')
    with pytest.raises(
        ValueError, match=r"in line 2, column 22: GLOBAL_BATCH looks like a template's, which"
    ):
        load_config(path)
    path.write_text('{"seed": 1, "fp16": {"enabled": true, "enabled": false}}')
    with pytest.raises(ValueError, match="is not valid JSON: duplicate key 'enabled'"):
        load_config(path)
    path.write_text('{"sead": 1}')
    with pytest.raises(
        ValueError, match=r"^config .*config\.json: unknown key 'sead'; delete it, or did you mean 'se"
    ):
        load_config(path)
    with pytest.raises(ValueError, match=r"^config there\.json: unknown key 'sead'"):
        load_config({"sead": 1}, "there.json")
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"config .*: expected a JSON object, not \[1\]"):
        load_config(path)
    values = {"train_batch_size": 8, "seed": 3, "optimizer": ADAMW | {"params": {"betas": [0.8, 0.9]}}}
    path.write_text(json.dumps(values))
    assert load_config(path) == load_config(str(path)) == load_config(values)
    assert load_config(path).optimizer.params.betas == (0.8, 0.9)


COMMENTED = """{
    // a comment, "of": two,
    "seed": 3, # another
    /* and a
       longer, one */
    "wandb": {"project": "a//b # /* c */, ]", "team": "\\\\",},
    "optimizer": {"type": "AdamW", "params": {"betas": [0.8, 0.9,
    ]}},
}"""


def test_comments_and_last_commas_are_read_as_deepspeed_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(COMMENTED)
    read = load_config(path)
    assert (read.seed, read.wandb.project, read.wandb.team) == (3, "a//b # /* c */, ]", "\\")
    assert read.optimizer.params.betas == (0.8, 0.9)
    path.write_text(COMMENTED.replace("3", "three"))
    with pytest.raises(ValueError, match="in line 3, column 13: three"):
        load_config(path)
    path.write_text(COMMENTED.replace("0.9", "nine"))
    with pytest.raises(ValueError, match="in line 7, column 62: nine"):
        load_config(path)
    path.write_bytes(b'\xef\xbb\xbf{"seed": 4}')
    assert load_config(path).seed == 4, "a byte order mark isn't part of the JSON"


def test_micro_batches_are_the_nearest_that_multiply() -> None:
    assert nearest_batch(12, micro=4) == (4, 3)
    assert nearest_batch(12, micro=5) == (4, 3)
    assert nearest_batch(10, micro=3.5) == (2, 5), "the smaller of two that are equally near"
    assert nearest_batch(7, micro=3) == (1, 7)
    assert nearest_batch(10, micro=2, schedule="interleaved", pp=2) == (1, 10), "5 make no two rounds"
    assert nearest_batch(5, micro=5, schedule="interleaved", pp=2) == (5, 1)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_are_refused(mode: str) -> None:
    reason = f"compile.mode is '{mode}': it records CUDA graphs, for which parameters must stay where"
    with pytest.raises(ValueError, match=reason):
        load_config({"train_batch_size": 1, "compile": {"enabled": True, "mode": mode}})
    load_config({"train_batch_size": 1, "compile": {"mode": "max-autotune-no-cudagraphs"}})
