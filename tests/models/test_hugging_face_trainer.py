"""Hugging Face's Trainer takes uni3d for DeepSpeed: its steps are those of the Trainer without it."""

import os
import warnings
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
import torch.distributed as dist
from hf_models import ADAM, hf
from marks import matrix
from ranks import Ranks
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import uni3d

pytestmark = pytest.mark.slow

GLOBAL_BATCH, MICRO_BATCH, STEPS, SAVED = 12, 1, 4, 2
AUTO = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
OPTIMIZER = {"optimizer": {"type": "AdamW", "params": AUTO}}
RATES = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
SCHEDULER = {"scheduler": {"type": "WarmupLR", "params": RATES | {"warmup_type": "linear"}}}


def samples(count: int, masked: int = 1) -> list[dict[str, Tensor]]:
    """Return token ids with labels, of which each sample lacks up to `masked - 1`."""
    ids = torch.randint(0, hf_models.VOCABULARY, (count, 6), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for number, row in enumerate(labels):
        row[: number % masked] = -100
    return [{"input_ids": i, "labels": row} for i, row in zip(ids, labels, strict=True)]


def trainer(folder: str, ranks: int, deepspeed: dict[str, Any] | None, **options: Any) -> Any:
    """Return the Trainer of a small Llama, with the same global batch on any number of ranks."""
    hf.utils.logging.disable_progress_bar()
    given: dict[str, Any] = {
        "per_device_train_batch_size": MICRO_BATCH,
        "per_device_eval_batch_size": GLOBAL_BATCH // ranks,
        "gradient_accumulation_steps": GLOBAL_BATCH // MICRO_BATCH // ranks,
        "max_steps": STEPS,
        "save_steps": SAVED,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": SAVED,
        "learning_rate": ADAM["lr"],
        "adam_epsilon": ADAM["eps"],
        "weight_decay": ADAM["weight_decay"],
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    args = hf.TrainingArguments(folder, deepspeed=deepspeed, **(given | options))
    data = samples(30, masked=3)  # the third step of an epoch has half as many samples
    made = hf.Trainer(hf_models.make("llama"), args, train_dataset=data, eval_dataset=samples(GLOBAL_BATCH))
    made.remove_callback(hf.PrinterCallback)
    return made


def history(made: Any) -> dict[str, list[float]]:
    keys = ("loss", "grad_norm", "learning_rate", "eval_loss")
    return {key: [entry[key] for entry in made.state.log_history if key in entry] for key in keys}


def trainer_case(
    folder: str, zero: int, config: dict[str, Any], options: dict[str, Any], resume: str | None = None
) -> dict[str, list[float]]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    clipping = {"gradient_clipping": "auto", "bf16": {"enabled": "auto"}}
    deepspeed = dict.fromkeys(sizes, "auto") | clipping | {"zero_optimization": {"stage": zero}} | config
    warnings.filterwarnings("ignore", "keys of the config that have no effect: zero_allow_untested_optimizer")
    try:
        made = trainer(folder, ranks, deepspeed, **options)
        made.train(resume_from_checkpoint=resume)
        made.save_model(f"{folder}/final")
        return history(made)
    finally:
        unset_hf_deepspeed_config()  # else the library builds other tests' models under zero.Init


CASES: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {
    0: ({}, {}),
    1: (OPTIMIZER | SCHEDULER, {}),
    2: ({}, {"lr_scheduler_type": "cosine", "label_smoothing_factor": 0.1, "max_grad_norm": 0.0}),
    3: (OPTIMIZER, {}),
}
"""Sections of the config in place of the Trainer's own, and the Trainer's options, for each ZeRO stage."""


@pytest.mark.parametrize("zero", [matrix(0), matrix(1), 2, 3])
def test_the_steps_are_those_of_one_process(hf_ranks: Ranks, tmp_path: Path, zero: int) -> None:
    """Train on two ranks; then, from a checkpoint half-way, on three and at another stage of ZeRO."""
    config, options = CASES[zero]
    alone = trainer(str(tmp_path / "alone"), 1, None, **options)
    if "optimizer" in config:  # which makes no exceptions from weight decay
        alone.optimizer = torch.optim.AdamW(alone.model.parameters(), **ADAM)
    if "scheduler" in config:  # whose rate stays 0 for a step longer
        alone.lr_scheduler = LambdaLR(alone.optimizer, lambda step: min(1.0, max(0, step - 1) / 2))
    alone.train()
    alone.save_model(str(tmp_path / "alone" / "final"))
    expected = history(alone)
    if config:
        del expected["learning_rate"]  # the engine steps the schedule before the Trainer looks
    two, three = str(tmp_path / "two"), str(tmp_path / "three")
    resume = f"{two}/checkpoint-{SAVED}"
    weights = load_file(tmp_path / "alone" / "final" / "model.safetensors")
    for folder, ranks, stage, start in ((two, 2, zero, None), (three, 3, 3 - zero, resume)):
        for found in hf_ranks.run(ranks, trainer_case, folder, stage, config, options, start):
            for key, values in expected.items():
                assert found[key] == pytest.approx(values, rel=1e-5), key
        found_weights = load_file(f"{folder}/final/model.safetensors")
        assert found_weights.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(found_weights[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_in_bf16(hf_ranks: Ranks, tmp_path: Path) -> None:
    alone = trainer(str(tmp_path / "alone"), 1, None)
    alone.train()
    expected, folder = history(alone), str(tmp_path / "two")
    for found in hf_ranks.run(2, trainer_case, folder, 3, {}, {"bf16": True}):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-2)
    saved = load_file(f"{folder}/final/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    model = hf.LlamaForCausalLM.from_pretrained(f"{folder}/final", dtype="auto")
    whole = uni3d.get_fp32_state_dict_from_zero_checkpoint(f"{folder}/checkpoint-{STEPS}")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), whole[name].bfloat16()), name


def test_its_adafactor_is_refused(alone: None) -> None:
    model = hf_models.make("llama")
    optimizer = hf.Adafactor(model.parameters())
    with pytest.raises(ValueError, match="the optimizer Adafactor of transformers is refused: its means by"):
        uni3d.initialize(model=model, optimizer=optimizer, config={"train_batch_size": 1})
