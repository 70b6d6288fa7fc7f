"""DeepSpeed's getting-started script runs with only its import changed."""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import uni3d as deepspeed

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "getting_started"
sys.path.insert(0, str(Path(__file__).parent))  # on the ranks

DS_CONFIG = """
{
  "train_batch_size": 8,
  "gradient_accumulation_steps": 1,
  "optimizer": {
    "type": "Adam",
    "params": {
      "lr": 0.00015
    }
  },
  "fp16": {
    "enabled": false
  },
  "zero_optimization": {
    "stage": 0,
    "offload_optimizer": false,
    "offload_param": false,
    "overlap_comm": true
  }
}
"""
WORDS = ["the", "a", "film", "was", "good", "bad", "great", "awful", "plot", "actors"]
STEPS = 4


def make_tokenizer() -> Any:
    from hf_models import hf

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return hf.BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})


def make_bert(tokenizer: Any) -> nn.Module:
    from hf_models import SIZES, hf

    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = hf.BertConfig(**SIZES | {"vocab_size": len(tokenizer)}, **no_dropout, num_labels=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return hf.BertForSequenceClassification(config)


def make_batches() -> list[tuple[list[str], Tensor]]:
    """Return a batch of sentences and labels for each step, the lengths of the sentences uneven."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(STEPS):
        drawn = torch.randint(0, len(WORDS), (8, 6), generator=generator)
        texts = [" ".join(WORDS[i] for i in row[: 3 + n % 4]) for n, row in enumerate(drawn.tolist())]
        batches.append((texts, torch.randint(0, 2, (8,), generator=generator)))
    return batches


def getting_started_case(
    zero: dict[str, Any], masked: bool, **more: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Run the page's loop; return the mean losses and the weights."""
    config = json.loads(DS_CONFIG)
    config["zero_optimization"].update(zero)
    if torch.cuda.is_available():
        config["parallel"] = {"device": "cpu"}  # as the ranks' process group is
    tokenizer = make_tokenizer()
    model = make_bert(tokenizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="keys of the config that have no effect: .*overlap_comm")
        model_engine, _optimizer, _, _ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=config | more
        )
    size, rank = model_engine.train_micro_batch_size_per_gpu(), model_engine.global_rank
    losses = []
    for texts, labels in make_batches():
        texts, labels = texts[rank * size :][:size], labels[rank * size :][:size]
        inputs = tokenizer(texts, padding="max_length", max_length=8, return_tensors="pt")
        if masked:
            outputs = model_engine(
                inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels
            )
            losses.append(model_engine.backward(outputs))
        else:
            loss = model_engine(inputs["input_ids"], labels=labels)
            losses.append(model_engine.backward(loss))
        model_engine.step()
    means = torch.stack(losses)
    torch.distributed.all_reduce(means)
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model_engine.module.named_parameters()
    }
    return (means / model_engine.world_size).tolist(), weights


def every_stage_case(masked: bool) -> list[tuple[list[float], dict[str, Tensor]]]:
    return [getting_started_case({"stage": stage}, masked) for stage in range(4)]


def train_plainly(masked: bool) -> tuple[list[float], dict[str, Tensor]]:
    tokenizer = make_tokenizer()
    model = make_bert(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.00015, weight_decay=0.0, foreach=False)
    losses = []
    for texts, labels in make_batches():
        inputs = tokenizer(texts, padding="max_length", max_length=8, return_tensors="pt")
        mask = inputs["attention_mask"] if masked else None
        loss = model(inputs["input_ids"], attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("masked", "world_size"), [(False, 1), slow(False, 2), slow(True, 1), (True, 2)])
def test_the_loop_of_getting_started_takes_the_steps_of_plain_pytorch(
    hf_ranks: Ranks, masked: bool, world_size: int
) -> None:
    expected_losses, expected = train_plainly(masked)
    for stages in hf_ranks.run(world_size, every_stage_case, masked):
        assert len(stages) == 4
        for stage, (losses, weights) in enumerate(stages):
            assert losses == pytest.approx(expected_losses, rel=1e-5), f"stage {stage}"
            assert weights.keys() == expected.keys()
            for name, weight in expected.items():
                torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=2e-6, msg=f"{stage} {name}")


def short_forms_case() -> list[tuple[list[float], dict[str, Tensor]]]:
    offload = {"offload_optimizer": True, "offload_param": True}
    return [
        getting_started_case({}, True, zero_optimization=True),
        getting_started_case({"stage": "3", **offload}, True),
        getting_started_case({"stage": 2.0}, True, steps_per_print=math.inf, train_batch_size=8.0),
    ]


def test_the_loop_with_other_short_forms(hf_ranks: Ranks) -> None:
    expected, weights = train_plainly(True)
    for runs in hf_ranks.run(2, short_forms_case):
        for losses, found in runs:
            assert losses == pytest.approx(expected, rel=1e-5)
            for name, weight in weights.items():
                torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=2e-6, msg=name)


def half_precision_case() -> list[float]:
    return getting_started_case({"stage": 1}, True, fp16={"enabled": True, "initial_scale_power": 8})[0]


def test_the_loop_of_getting_started_in_fp16(hf_ranks: Ranks) -> None:
    """Losses agree to the precision of fp16; nothing is skipped at this scale."""
    expected, _ = train_plainly(True)
    for losses in hf_ranks.run(2, half_precision_case):
        assert losses == pytest.approx(expected, rel=1e-2)


@pytest.mark.slow
def test_the_readmes_command_learns(tmp_path: Path) -> None:
    readme = (EXAMPLE / "README.md").read_text()
    command = re.search(r"```sh\n(.*?)```", readme, re.DOTALL)
    line = command[1].replace("torchrun", str(Path(sys.executable).parent / "torchrun"))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        ["bash", "-c", line],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    losses = [float(x) for x in re.findall(r"^epoch \d: mean loss (\S+)$", result.stdout, re.MULTILINE)]
    assert len(losses) == 4, "one line an epoch, from one rank"
    assert losses[0] > 0.3
    assert losses[-1] < 0.1
    config = json.loads((EXAMPLE / "ds_config.json").read_text())
    assert config["zero_optimization"] == {"stage": 2}


def test_the_arguments_that_deepspeed_adds() -> None:
    parser = argparse.ArgumentParser()
    assert deepspeed.add_config_arguments(parser) is parser
    given = parser.parse_args(["--deepspeed", "--deepspeed_config", "ds.json"])
    assert (given.deepspeed, given.deepspeed_config) == (True, "ds.json")
    assert vars(parser.parse_args([])) == {"deepspeed": False, "deepspeed_config": None}


def test_arguments_of_init_distributed_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^dist_backend is 'mpi'; expected 'nccl', 'gloo' or None$"):
        deepspeed.init_distributed("mpi")
    with pytest.raises(ValueError, match=r"rank 0 and world_size 1 need an init_method"):
        deepspeed.init_distributed(rank=0, world_size=1)
