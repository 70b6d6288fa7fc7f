"""Small random Hugging Face models, their batches, and their training in plain PyTorch."""

import multiprocessing
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import uni3d
import uni3d.deepspeed

if multiprocessing.parent_process() is not None:
    uni3d.deepspeed.install()  # in ranks, for Trainers; pytest's own process has the real one

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a package that isn't ours
    import transformers as hf

hf.logging.set_verbosity_error()

VOCABULARY = 61
BATCH, LENGTH = 8, 6
STEPS = 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MOE = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("Cohere", ENDS),
    "gpt_neox": ("GPTNeoX", ENDS),
    "nemotron_h": ("NemotronH", ENDS),
    "phi3": ("Phi3", ENDS),
    "qwen2_moe": ("Qwen2Moe", MOE | {"num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", MOE | {"num_experts_per_tok": 2, "head_dim": 4}),
}
"""Prefix of the library's classes, and options besides `SIZES`, of further causal models."""
ADAM = {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.01}


def make(kind: str, **options: Any) -> nn.Module:
    """Return the model, with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if kind == "bert":
            no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            bert = hf.BertForSequenceClassification(hf.BertConfig(**SIZES, **no_dropout, num_labels=3))
            bert.bert.embeddings.requires_grad_(False)  # as in fine-tuning
            return bert
        if kind == "gpt2":
            no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
            ends = {"bos_token_id": 0, "eos_token_id": 0}
            return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCABULARY, **sizes, **no_dropout, **ends))
        if kind == "llama":
            options = {"num_key_value_heads": 2, "tie_word_embeddings": True} | options
            return hf.LlamaForCausalLM(hf.LlamaConfig(**(SIZES | options)))
        if kind == "qwen3":
            return hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=4))
        if kind in OTHERS:
            family, given = OTHERS[kind]
            config = getattr(hf, f"{family}Config")(**(SIZES | given | options))
            other: nn.Module = getattr(hf, f"{family}ForCausalLM")(config)
            return other
        assert kind == "mixtral", kind
        experts = {"num_local_experts": 4, "num_key_value_heads": 2, "sliding_window": None}
        return hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, **experts))


def batches(kind: str) -> list[dict[str, Tensor]]:
    """Return global batches, one for each step."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(STEPS):
        ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
        mask = torch.ones_like(ids)
        labels = ids
        if kind == "bert":
            mask[::2, 4:] = 0
            labels = torch.randint(0, 3, (BATCH,), generator=generator)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def rows(batch: dict[str, Tensor], start: int, count: int) -> dict[str, Tensor]:
    return {key: value[start : start + count] for key, value in batch.items()}


def train_plainly(kind: str, **options: Any) -> tuple[list[float], list[float], nn.Module]:
    model = make(kind, **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=False, **ADAM)
    losses, norms = [], []
    for batch in batches(kind):
        loss = model(**batch).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, model


def make_engine(
    model: nn.Module,
    zero: int,
    *,
    dp: int = 1,
    tp: int = 1,
    weights: Any = None,
    resume: Any = None,
    **config: Any,
) -> uni3d.Engine:
    given = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // dp // 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": ADAM},
        "zero_optimization": {"stage": zero},
        "parallel": {"dp": dp, "tp": tp, "device": "cpu"},
    }
    params = [p for p in model.parameters() if p.requires_grad]
    return uni3d.initialize(
        model=model, model_parameters=params, config=given | config, weights=weights, resume=resume
    )[0]


def train(engine: uni3d.Engine, kind: str) -> tuple[list[float], list[float]]:
    """Train, alternating between forward, backward, step and train_batch."""
    losses, norms = [], []
    size = engine.train_micro_batch_size_per_gpu()
    first = engine.model.topology.dp_rank * size * 2
    for step, batch in enumerate(batches(kind)):
        micro = [rows(batch, first + i * size, size) for i in range(2)]
        if step % 2:
            losses.append(engine.train_batch(iter(micro)).item())
        else:
            values = []
            for part in micro:
                loss = engine(**part).loss
                engine.backward(loss)
                engine.step()
                values.append(loss.item())
            total = torch.tensor(sum(values) / len(values))
            torch.distributed.all_reduce(total)
            losses.append(total.item() / engine.world_size)
        norms.append(engine.get_global_grad_norm() or 0.0)
    engine.model.zero.reshard()
    return losses, norms


def whole(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the whole parameters, gathered by torch itself."""
    tensors = {name: p.detach() for name, p in module.named_parameters()}
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in tensors.items()}
