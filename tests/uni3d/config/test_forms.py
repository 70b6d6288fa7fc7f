"""Short and old forms of values, and numbers as JSON writers put them, mean what they mean in DeepSpeed."""

import json
import math
from collections import UserDict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from uni3d.config import Config, load_config
from uni3d.config.forms import plain
from uni3d.config.optimizer import AdamParams, LionParams, MuonParams
from uni3d.config.scheduler import SCHEDULES
from uni3d.config.strict import sections_of

ZERO = "zero_optimization"


def zero(**values: Any) -> dict[str, Any]:
    return {ZERO: {"stage": 3, **values}}


def adam(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": params}}


CPU = {"device": "cpu"}
NONE = {"device": "none"}

SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # booleans for sections
    ({ZERO: True}, {ZERO: {"stage": 1}}),
    ({ZERO: False}, {ZERO: {"stage": 0}}),
    (zero(offload_optimizer=True), zero(offload_optimizer=CPU)),
    (zero(offload_optimizer=False), zero(offload_optimizer=NONE)),
    (zero(offload_param=True), zero(offload_param=CPU)),
    (zero(offload_param=False), zero(offload_param=NONE)),
    (zero(offload_param=False, cpu_offload_param=False), zero(offload_param=NONE)),
    (zero(cpu_offload=True, offload_optimizer=True), zero(offload_optimizer=CPU)),
    (zero(cpu_offload=1), zero(offload_optimizer=CPU)),
    (zero(cpu_offload="true"), zero(offload_optimizer=CPU)),
    (zero(cpu_offload_params="off"), zero(offload_param=NONE)),
    (zero(cpu_offload=None), zero()),
    # null for sections, and optimizers without a name
    *(({key: None}, {}) for key in (ZERO, "fp16", "bf16", "bfloat16", "checkpoint", "tensorboard")),
    *(({key: None}, {}) for key in ("tensor_parallel", "pipeline", "activation_checkpointing", "compile")),
    *(({"optimizer": nothing}, {}) for nothing in (None, {}, {"type": None}, {"type": None, "params": {}})),
    *(({"scheduler": nothing}, {}) for nothing in (None, {}, {"type": None}, {"type": None, "params": None})),
    (zero(offload_optimizer=None), zero()),
    (zero(offload_optimizer=None, cpu_offload=True), zero(offload_optimizer=CPU)),
    ({"bf16": None, "bfloat16": {"enabled": True}}, {"bf16": {"enabled": True}}),
    ({"bf16": {"enabled": True}, "bfloat16": None}, {"bf16": {"enabled": True}}),
    # text, where DeepSpeed's models convert it
    ({ZERO: {"stage": "2"}}, {ZERO: {"stage": 2}}),
    ({ZERO: {"stage": True}}, {ZERO: {"stage": 1}}),
    (zero(stage3_param_persistence_threshold=" 10 "), zero(stage3_param_persistence_threshold=10)),
    (zero(param_persistence_threshold="1e5"), zero(stage3_param_persistence_threshold=100_000)),
    (zero(param_persistence_threshold="auto"), zero()),
    (zero(mics_shard_size="2"), zero(mics_shard_size=2)),
    ({"fp16": {"enabled": "true"}}, {"fp16": {"enabled": True}}),
    ({"fp16": {"enabled": "False"}}, {"fp16": {"enabled": False}}),
    ({"fp16": {"enabled": 1, "loss_scale": "128"}}, {"fp16": {"enabled": True, "loss_scale": 128.0}}),
    ({"fp16": {"loss_scale_window": "1_000"}}, {"fp16": {"loss_scale_window": 1000}}),
    ({"fp16": {"hysteresis": "3.0"}}, {"fp16": {"hysteresis": 3}}),
    ({"bf16": {"enabled": "yes"}}, {"bf16": {"enabled": True}}),
    ({"bfloat16": {"enabled": 1}}, {"bf16": {"enabled": True}}),
    ({"wandb": {"enabled": "on", "team": None}}, {"wandb": {"enabled": True}}),
    ({"tensor_parallel": {"autotp_size": "2"}}, {"parallel": {"tp": 2}}),
    ({"tensor_parallel": {"autotp_size": 2.0}}, {"parallel": {"tp": 2}}),
    ({"tensor_parallel": {"autotp_size": "0"}}, {}),
    # numbers
    ({"train_batch_size": 8.0}, {"train_batch_size": 8}),
    ({"train_micro_batch_size_per_gpu": 4.0}, {"train_micro_batch_size_per_gpu": 4}),
    ({"parallel": {"pp": 2.0}}, {"parallel": {"pp": 2}}),
    ({"steps_per_print": 1e5}, {"steps_per_print": 100_000}),
    ({"steps_per_print": math.inf}, {"steps_per_print": None}),
    ({ZERO: {"stage": 2.0}}, {ZERO: {"stage": 2}}),
    ({"checkpoint": {"keep_last": 3.0}}, {"checkpoint": {"keep_last": 3}}),
    ({"flops_profiler": {"module_depth": -1.0}}, {"flops_profiler": {"module_depth": -1}}),
    (
        {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 1e5}}},
        {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 100_000}}},
    ),
    ({"wall_clock_breakdown": 0}, {"wall_clock_breakdown": False}),
    (adam(adam_w_mode=1, bias_correction=1), adam(adam_w_mode=True, bias_correction=True)),
    ({"optimizer": {"type": "Lion", "params": {"set_grad_none": True}}}, {"optimizer": {"type": "Lion"}}),
    # names
    ({"communication_data_type": "BF16"}, {"communication_data_type": "bf16"}),
    ({"data_types": {"grad_accum_dtype": "torch.float32"}}, {"data_types": {"grad_accum_dtype": "fp32"}}),
    (
        {"data_types": {"grad_accum_dtype": "bfloat16"}, "communication_data_type": "bf16"},
        {"communication_data_type": "bf16"},
    ),
    # pipelines
    ({"pipeline": {"stages": 2}}, {"parallel": {"pp": 2}}),
    ({"pipeline": {"activation_checkpoint_interval": 1}}, {"activation_checkpointing": {"mode": "full"}}),
    ({"pipeline": {"activation_checkpoint_interval": 0, "seed_layers": False, "partition": "best"}}, {}),
    # values that DeepSpeed doesn't use, and so doesn't check
    (zero(zero_hpz_partition_size=0, mics_shard_size=0), zero()),
]
"""Pairs of configs that mean the same."""


def resolved(values: dict[str, Any]) -> dict[str, Any]:
    config = load_config(values)
    shard_group = config.shard_group
    printed: dict[str, Any] = config.model_dump()
    for key in ("mics_shard_size", "zero_hpz_partition_size"):
        del printed[ZERO][key]
    return {**printed, "shard_group": shard_group}


@pytest.mark.parametrize(("given", "meant"), SAME, ids=[json.dumps(given) for given, _ in SAME])
def test_a_form_means_what_it_means_in_deepspeed(given: dict[str, Any], meant: dict[str, Any]) -> None:
    assert resolved(given) == resolved(meant)
    assert not load_config(given).without_meaning


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            zero(offload_optimizer="cpu"),
            "zero_optimization.offload_optimizer is 'cpu': expected an object",
        ),
        (
            zero(cpu_offload=True, offload_optimizer=False),
            "zero_optimization.cpu_offload is {'device': 'cpu'}, but",
        ),
        ({"train_batch_size": "8"}, "train_batch_size is '8': "),
        ({"train_batch_size": 8.5}, "train_batch_size is 8.5: "),
        ({"steps_per_print": 10.5}, "steps_per_print is 10.5: "),
        ({"gradient_clipping": "1.0"}, "gradient_clipping is '1.0': "),
        ({"fp16": {"hysteresis": "2.5"}}, "fp16.hysteresis is 2.5: "),
        ({"fp16": {"hysteresis": True}}, "fp16.hysteresis is True: "),
        ({"fp16": {"loss_scale": "nan"}}, "fp16.loss_scale is 'nan': "),
        ({"fp16": {"enabled": "perhaps"}}, "fp16.enabled is 'perhaps': "),
        ({"fp16": {"enabled": 2}}, "fp16.enabled is 2: "),
        ({"bf16": {"enabled": "auto"}}, '"auto" is left in bf16.enabled, which Hugging Face'),
        ({"flops_profiler": {"enabled": "false"}}, "flops_profiler.enabled is 'false': "),
        ({"scheduler": {"type": "StepLR"}}, "scheduler.type: unknown schedule 'StepLR'; "),
        (adam(bias_correction=0), "optimizer.params.bias_correction is False: torch's Adam and AdamW always"),
        ({"amp": {"enabled": "false"}}, "amp is refused"),
        (zero(zero_quantized_weights="true"), "zero_optimization.zero_quantized_weights is refused"),
    ],
)
def test_a_form_whose_meaning_cant_be_had_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^config: ") as caught:
        load_config(values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        zero(zero_quantized_weights="false"),
        zero(zero_quantized_gradients=0),
        zero(offload_optimizer={"device": "none", "ratio": "1.0"}),
        {"fp16": {"fp16_master_weights_and_grads": "no"}},
        {"bf16": {"check_grad_overflow": "true"}},
        {"hybrid_engine": {"max_out_tokens": 512}},
        {"amp": {"opt_level": "O1"}},
        {"amp": {"enabled": 0}},
        {"comms_logger": {"verbose": True, "enabled": "false"}},
        {"dump_state": 0},
        {"gradient_allreduce_op": "MEAN"},
        {"compile": {"deepcompile": "false"}},
        {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}}}},
    ],
    ids=json.dumps,
)
def test_what_deepspeed_takes_as_off_is_off(values: dict[str, Any]) -> None:
    load_config(values)


def test_a_config_made_in_python() -> None:
    """Mappings other than dicts, tuples, and numbers of numpy and torch, are as good as JSON's."""
    zero = MappingProxyType({"stage": np.int64(2), "offload_optimizer": MappingProxyType({"device": "cpu"})})
    params = UserDict({"lr": np.float32(0.5), "betas": (np.float64(0.5), 0.25), "eps": torch.tensor(0.125)})
    given = {
        "train_batch_size": np.int32(8),
        "wall_clock_breakdown": np.bool_(True),
        ZERO: zero,
        "optimizer": UserDict({"type": "Adam", "params": params}),
    }
    meant = {
        "train_batch_size": 8,
        "wall_clock_breakdown": True,
        ZERO: {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {"type": "Adam", "params": {"lr": 0.5, "betas": [0.5, 0.25], "eps": 0.125}},
    }
    assert load_config(UserDict(given)) == load_config(given) == load_config(meant)


def test_scaling_that_isnt_used_isnt_checked() -> None:
    unused = {"loss_scale_window": 0, "min_loss_scale": 0, "hysteresis": 0}
    assert load_config({"fp16": {"enabled": False, **unused}}).precision == "fp32"
    assert load_config({"fp16": {"enabled": True, "loss_scale": 64, **unused}}).fp16.loss_scale == 64


def integers(section: type[BaseModel], *within: str) -> list[tuple[str, ...]]:
    """Return the keys of a section that take integers but no other numbers."""
    found: list[tuple[str, ...]] = []
    for name, field in section.model_fields.items():
        inner = sections_of(field.annotation)
        if inner and name not in ("optimizer", "scheduler"):
            found += integers(inner[0], *within, name)
        elif not inner and plain(7.0, field.annotation, text=False) == 7:
            kind = type(plain(7.0, field.annotation, text=False))
            found += [(*within, name)] if kind is int else []
    return found


SECTIONS: dict[str, type[BaseModel]] = {"config": Config, **SCHEDULES}


@pytest.mark.parametrize("name", SECTIONS)
def test_every_integer_may_be_a_whole_float(name: str) -> None:
    keys = integers(SECTIONS[name])
    assert keys
    for *within, last in keys:
        section = SECTIONS[name]
        for part in within:
            (section,) = sections_of(section.model_fields[part].annotation)
        field = section.model_fields[last]
        for value in (field.default, 2, 3):
            if isinstance(value, int) and _accepts(section, {last: value}):
                whole = section.model_validate({**_required(section), last: float(value)})
                assert type(getattr(whole, last)) is int, last
                assert getattr(whole, last) == value
        assert not _accepts(section, {last: 2.5}), last


def _required(section: type[BaseModel]) -> dict[str, Any]:
    return {name: 5 for name, field in section.model_fields.items() if field.is_required()}


def _accepts(section: type[BaseModel], values: dict[str, Any]) -> bool:
    try:
        section.model_validate(_required(section) | values)
    except ValueError:
        return False
    return True


def test_defaults_of_the_optimizers_are_deepspeeds() -> None:
    assert AdamParams().betas == LionParams().betas == (0.9, 0.999)
    assert MuonParams().betas == (0.9, 0.95)


def test_the_config_of_getting_started_and_of_accelerate(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(
        '{"train_batch_size": 8, "gradient_accumulation_steps": 1, "fp16": {"enabled": true}, '
        '"optimizer": {"type": "Adam", "params": {"lr": 0.00015}}, "zero_optimization": true}'
    )
    assert load_config(path).zero_optimization.stage == 1
    path.write_text(
        '{"train_batch_size": 8, "steps_per_print": Infinity, "zero_allow_untested_optimizer": true, '
        '"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none", "nvme_path": null}, '
        '"offload_param": {"device": "none", "nvme_path": null}, "reduce_bucket_size": 5e8}}'
    )
    config = load_config(path)
    assert (config.zero_optimization.stage, config.steps_per_print, config.offload) == (2, None, False)
