"""Fine-tuning scripts as written for DeepSpeed, but for the import, take the steps of plain PyTorch."""

import warnings
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
import torch.distributed as dist
from marks import slow
from ranks import Ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import uni3d.deepspeed as deepspeed

pytestmark = pytest.mark.slow

ADAM = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-3}
GLOBAL_BATCH, MICRO_BATCH, EPOCHS = 8, 2, 2

Sample = dict[str, Tensor]


def sentences(labels: int) -> list[Sample]:
    """Return sentences of several lengths, with a label each; with 0 labels, with a label per token."""
    source = torch.Generator().manual_seed(3)
    ids = torch.randint(3, hf_models.VOCABULARY, (16, 6), generator=source)
    mask = torch.ones_like(ids)
    classes = torch.randint(0, max(1, labels), (16,), generator=source)
    for number, row in enumerate(mask):
        row[6 - number % 3 :] = 0
    ids *= mask
    targets = classes if labels else ids.masked_fill(mask == 0, -100)
    columns = {"input_ids": ids, "attention_mask": mask, "labels": targets}
    return [{key: column[n] for key, column in columns.items()} for n in range(len(ids))]


def grouped(model: nn.Module) -> list[dict[str, Any]]:
    """Return groups of parameters with weight decay and without, as BERT is trained."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    without = [name for name, _ in named if "bias" in name or "LayerNorm" in name]
    return [
        {"params": [p for name, p in named if name not in without], "weight_decay": 0.1},
        {"params": [p for name, p in named if name in without], "weight_decay": 0.0},
    ]


def rows(data: list[Sample], numbers: Any) -> Sample:
    return {key: torch.stack([data[n][key] for n in numbers]) for key in data[0]}


# --- BERT -----------------------------------------------------------------------------------------------


def bert_case(zero: int, folder: str) -> tuple[list[float], float, dict[str, Tensor] | None]:
    config = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "optimizer": {"type": "AdamW", "params": ADAM},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": zero},
    }
    model = hf_models.make("bert")
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, model_parameters=grouped(model), config=config
    )
    data = sentences(3)
    sampler: Any = DistributedSampler(data, shuffle=False)
    loader = DataLoader(data, batch_size=MICRO_BATCH, sampler=sampler)
    losses = []
    for epoch in range(EPOCHS):
        engine.train()
        sampler.set_epoch(epoch)
        for batch in loader:
            loss = engine(**batch)[0]
            engine.backward(loss)
            if engine.is_gradient_accumulation_boundary():
                for group in optimizer.param_groups:
                    group["lr"] = ADAM["lr"] / (engine.global_steps + 1)
            engine.step()
            losses.append(loss.item())
        engine.save_checkpoint(folder, tag=f"epoch{epoch}", client_state={"epoch": epoch})
    engine.eval()
    with torch.no_grad():
        right = sum((engine(**batch).logits.argmax(-1) == batch["labels"]).sum() for batch in loader)
    dist.all_reduce(right)
    return losses, right.item(), engine.module_state_dict()


@pytest.mark.parametrize("zero", [slow(1), 2])
def test_bert(hf_ranks: Ranks, tmp_path: Path, zero: int) -> None:
    model, data, losses = hf_models.make("bert"), sentences(3), []
    optimizer = torch.optim.AdamW(grouped(model), **ADAM)
    for step in range(EPOCHS * len(data) // GLOBAL_BATCH):
        first = step * GLOBAL_BATCH % len(data)
        loss = model(**rows(data, range(first, first + GLOBAL_BATCH))).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = ADAM["lr"] / (step + 1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    right = model.eval()(**rows(data, range(len(data)))).logits.argmax(-1) == rows(data, range(16))["labels"]
    (one, correct, found), (two, *_) = hf_ranks.run(2, bert_case, zero, str(tmp_path))
    pairs = [(a + b) / 2 for a, b in zip(one, two, strict=True)]
    means = [sum(pairs[i : i + 2]) / 2 for i in range(0, len(pairs), 2)]
    assert means == pytest.approx(losses, rel=1e-5)
    assert correct == right.sum().item()
    restored = deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-5, atol=1e-5, msg=name)
        assert torch.equal(restored[name], found[name])


# --- LoRA -----------------------------------------------------------------------------------------------


def adapted() -> Any:
    import peft

    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    base: Any = hf_models.make("llama")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of packages that aren't ours
        torch.manual_seed(0)  # of the adapters
        return peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options))


def lora_case(zero: int, folder: str) -> list[float]:
    warnings.filterwarnings("ignore", module="peft")
    config = {
        "train_batch_size": GLOBAL_BATCH,
        "zero_optimization": {"stage": zero},
        "gradient_clipping": 0.0,
    }
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAM)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    data, size = sentences(0), engine.train_micro_batch_size_per_gpu()
    losses = []
    for start in range(0, len(data), GLOBAL_BATCH):
        first = start + dist.get_rank() * size
        loss = engine(**rows(data, range(first, first + size))).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    if dist.get_rank() == 0:
        engine.module.save_pretrained(folder, state_dict=state)
    return losses


@pytest.mark.parametrize("zero", [slow(1), 3])
def test_lora(hf_ranks: Ranks, tmp_path: Path, zero: int) -> None:
    peft = pytest.importorskip("peft")
    model, data, losses = adapted(), sentences(0), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAM)
    halves = GLOBAL_BATCH // 2
    for start in range(0, len(data), GLOBAL_BATCH):
        numbers = range(start, start + GLOBAL_BATCH)
        parts = [model(**rows(data, half)).loss for half in (numbers[:halves], numbers[halves:])]
        (sum(parts) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append([part.item() for part in parts])
    found = hf_ranks.run(2, lora_case, zero, str(tmp_path / "adapter"))
    for pair, expected in zip(zip(*found, strict=True), losses, strict=True):
        assert pair == pytest.approx(expected, rel=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(hf_models.make("llama"), tmp_path / "adapter")
    weights = peft.get_peft_model_state_dict(model)
    for name, weight in peft.get_peft_model_state_dict(loaded).items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-5, msg=name)
        assert "lora_B" not in name or weight.any(), "trained"
