"""The short trainings of `same_bits.py`: what is trained, on what data, and how.

They use the public API of `uni3d` alone, and the GPT of `examples/megatron_gpt`. Both are imported inside
functions, because `same_bits.py` decides at run time which tree they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Json = dict[str, Any]

STEPS, FURTHER = 4, 2
"""Steps of a run, and of each resume of it."""
BATCH, SAMPLES, LENGTH, VOCABULARY, WIDTH = 16, 40, 8, 61, 6


class Split(NamedTuple):
    """Layout of a run over ranks."""

    pp: int = 1
    dp: int = 1
    tp: int = 1
    zero: int = 0
    schedule: str = "1f1b"
    virtual: int = 1

    def interleaved(self) -> Split:
        return self._replace(schedule="interleaved", virtual=2)

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.tp

    def __str__(self) -> str:
        return f"{self.pp} x {self.dp} x {self.tp}, ZeRO {self.zero}"


@dataclass(frozen=True)
class Run:
    """A short training; by default of the GPT, in fp32, by `train_batch`."""

    name: str
    split: Split
    other: Split
    """Layout for the second resume."""
    config: Json = field(default_factory=dict)
    model: str = "gpt"
    """Key of `MODELS`."""
    options: Json = field(default_factory=dict)
    """Arguments for the model."""
    groups: bool = False
    """Put vectors into a second parameter group, without weight decay."""
    how: str = "train_batch"
    """Way to take a step: "train_batch", "calls" (forward, backward, step), "no_sync" (calls, some in it)."""


ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1}}
LION = {"type": "Lion", "params": {"lr": 0.002, "betas": [0.9, 0.99], "weight_decay": 0.1}}
MUON = {"type": "Muon", "params": {"muon_lr": 0.02, "adam_lr": 0.01, "weight_decay": 0.1}}
WARMUP = {"warmup_num_steps": 3, "warmup_min_ratio": 0.2, "warmup_type": "linear"}
COSINE = {"type": "WarmupCosineLR", "params": WARMUP | {"total_num_steps": 20, "cos_min_ratio": 0.1}}
CYCLE = {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 2, "decay_lr_rate": 0.5}
ONE_CYCLE = {"scheduler": {"type": "OneCycle", "params": CYCLE | {"decay_step_size": 1}}}
MICRO_4 = {"gradient_accumulation_steps": 4}
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 2, "hysteresis": 1}}
"""Loss scale that overflows in some steps, which are skipped, and moves both ways."""
SEQUENCE_PARALLEL = {"parallel": {"sequence_parallel": True}}
RECOMPUTE = {"activation_checkpointing": {"mode": "full"}}
SHARD_GROUPS = {"zero_optimization": {"mics_shard_size": 2}, "communication_data_type": "bf16"}
SYNCHRONOUS_SAVE = {"checkpoint": {"async_save": False}}
TIED = {"tied_head": True}
GPT_2 = {"norm": "layernorm", "positions": "learned", "activation": "gelu"}

RUNS = [
    Run("alone", Split(), Split(dp=2, zero=2), groups=True),
    Run("alone_lion_fp16", Split(), Split(tp=2, zero=1), FP16 | {"optimizer": LION}),
    Run("dp2_zero1_bf16", Split(dp=2, zero=1), Split(tp=2, zero=1), BF16, groups=True),
    Run("tp2", Split(tp=2), Split(pp=2), options=TIED, groups=True),
    Run("tp2_sequence_parallel", Split(tp=2, zero=3), Split(dp=2, zero=3), BF16 | SEQUENCE_PARALLEL),
    Run("pp2_1f1b", Split(pp=2, zero=1), Split(), MICRO_4 | ONE_CYCLE, options=TIED),
    Run("pp2_dp2_bf16", Split(pp=2, dp=2, zero=2), Split(dp=2, tp=2, zero=1), MICRO_4 | BF16, options=TIED),
    Run("dp2_tp2_zero3", Split(dp=2, tp=2, zero=3), Split(dp=4, zero=3), options=TIED, groups=True),
    Run("pp4_gpipe", Split(pp=4, schedule="gpipe"), Split(pp=2).interleaved(), MICRO_4),
    Run("dp4_zero3_fp16", Split(dp=4, zero=3), Split(pp=2, dp=2, zero=1), FP16),
    Run("pp2_interleaved", Split(pp=2, zero=1).interleaved(), Split(pp=4), MICRO_4 | ONE_CYCLE, options=TIED),
    Run("pp2_zero_bubble_v", Split(pp=2, zero=2, schedule="zero_bubble_v", virtual=2), Split(pp=2), MICRO_4),
    Run("pipeline_module", Split(pp=2, zero=1), Split(dp=2, zero=3), MICRO_4, model="pipeline_module"),
    Run("dp2_muon", Split(dp=2, zero=2), Split(tp=2, zero=1), {"optimizer": MUON}, options=GPT_2),
    Run("dp2_recompute", Split(dp=2, zero=3), Split(dp=2, zero=2), RECOMPUTE),
    Run("dp4_shard_groups", Split(dp=4, zero=3), Split(dp=2, zero=1), SHARD_GROUPS),
    Run("calls", Split(dp=2, zero=1), Split(zero=1), how="calls"),
    Run("calls_fp16", Split(dp=2, zero=3), Split(tp=2), FP16, how="calls"),
    Run("no_sync", Split(dp=2), Split(dp=4, zero=1), how="no_sync", groups=True),
    Run("own_loss", Split(dp=2, zero=3), Split(), model="own_loss"),
    Run("bert", Split(dp=2, zero=2), Split(), SYNCHRONOUS_SAVE, model="bert", how="calls"),
]


# --- models and data ---------------------------------------------------------------------------------------


def as_logits(embedding: nn.Module, x: Tensor) -> Tensor:
    return x @ embedding.weight.T


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_gpt(**options: Any) -> nn.Module:
    from model import GPT, GPTConfig

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 20, "num_layers": 4, "num_heads": 2, "ffn_size": 26}
    with torch.device("meta"):
        return GPT(GPTConfig(**sizes, max_seq_len=LENGTH, **options))


def make_pipeline_module() -> nn.Module:
    from uni3d import LayerSpec, PipelineModule, TiedLayerSpec

    sizes = (VOCABULARY, WIDTH)
    layers = [LayerSpec(nn.Linear, WIDTH, WIDTH), torch.tanh, LayerSpec(nn.LayerNorm, WIDTH)]
    first = TiedLayerSpec("embed", nn.Embedding, *sizes)
    last = TiedLayerSpec("embed", nn.Embedding, *sizes, forward_fn=as_logits)
    with torch.device("meta"):
        return PipelineModule([first, *layers, *layers, last], loss_fn=token_loss)


def make_bert() -> nn.Module:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(5)
    config = transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes)
    return transformers.BertForMaskedLM(config)


def make_own_loss() -> nn.Module:
    from models import OwnLoss, seeded

    return seeded(OwnLoss, 0.25)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "gpt": make_gpt,
    "pipeline_module": make_pipeline_module,
    "bert": make_bert,
    "own_loss": make_own_loss,
}


def make_data(kind: str) -> list[Any]:
    """Make a model's samples; of tokens, each has another number of targets to predict."""
    generator = torch.Generator().manual_seed(0)
    if kind == "own_loss":
        inputs = torch.randn(SAMPLES, WIDTH, generator=generator)
        return list(zip(inputs, inputs.square().mean(1, keepdim=True), strict=True))
    tokens = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH + 1), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    for i in range(SAMPLES):
        targets[i, : i % LENGTH] = -100
    if kind == "bert":
        return [{"input_ids": x, "labels": y} for x, y in zip(inputs, targets, strict=True)]
    return list(zip(inputs, targets, strict=True))


# --- training ----------------------------------------------------------------------------------------------


def make_engine(run: Run, split: Split) -> Any:
    import uni3d

    config = {
        "train_batch_size": BATCH,
        "gradient_clipping": 0.5,
        "seed": 7,
        "optimizer": ADAMW,
        "scheduler": COSINE,
        "checkpoint": {"durable": False},
        "gradient_accumulation_steps": 2,
        **run.config,
    }
    degrees = {"pp": split.pp, "dp": split.dp, "tp": split.tp, "device": "cpu"}
    pipeline = {"schedule": split.schedule, "virtual_stages": split.virtual}
    config["parallel"] = run.config.get("parallel", {}) | degrees | pipeline
    config["zero_optimization"] = run.config.get("zero_optimization", {}) | {"stage": split.zero}
    model, groups = MODELS[run.model](**run.options), None
    if run.groups:
        vectors = [p for p in model.parameters() if p.ndim < 2]
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    data = make_data(run.model)
    return uni3d.initialize(model=model, model_parameters=groups, training_data=data, config=config)[0]


def learn(engine: Any, batch: Any) -> float:
    """Forward and backward pass of one micro batch; returns this rank's loss."""
    if isinstance(batch, dict):
        return engine.backward(engine(**batch).loss).item()
    from model import next_token_loss

    return engine.backward(next_token_loss(engine(batch[0]), batch[1])).item()


def take_step(run: Run, engine: Any, batches: Iterator[Any]) -> Json:
    """Take one optimizer step; returns its numbers to the last bit."""
    rates = engine.get_lr()
    if run.how == "train_batch":
        loss = engine.train_batch(batches).item()
    else:
        loss = 0.0
        for _ in range(engine.gradient_accumulation_steps()):
            if run.how == "no_sync":
                with engine.no_sync():
                    loss += learn(engine, next(batches))
            loss += learn(engine, next(batches))
            engine.step()
    return {
        "loss": loss.hex(),
        "norm": engine.get_global_grad_norm().hex(),
        "rates": [rate.hex() for rate in rates],
        "scale": engine.get_loss_scale().hex(),
        "applied": engine.was_step_applied(),
    }


def over_epochs(engine: Any) -> Iterator[Any]:
    """Yield the engine's micro batches without end, also in trees whose loader is endless itself."""
    while True:
        yield from engine.training_dataloader


def train(run: Run, folder: Path) -> Json:
    """Train, evaluate once and save."""
    engine = make_engine(run, run.split)
    batches = over_epochs(engine)
    steps = [take_step(run, engine, batches) for _ in range(STEPS)]
    evaluation = engine.eval_batch(batches).item()
    engine.save_checkpoint(folder, client_state={"run": run.name})
    engine.wait_for_checkpoint()
    return {"steps": steps, "evaluation": evaluation.hex()}


def resume(run: Run, split: Split, folder: Path) -> list[Json]:
    """Go on from the checkpoint in `folder`."""
    engine = make_engine(run, split)
    engine.load_checkpoint(folder)
    batches = over_epochs(engine)
    return [take_step(run, engine, batches) for _ in range(FURTHER)]
