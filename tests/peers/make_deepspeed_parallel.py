"""Make the fixtures of DeepSpeed with pipelines and tensor parallelism, and its universal checkpoints:

`python tests/peers/make_deepspeed_parallel.py [OUT [NAME ...]]`
"""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import constants as keys
from deepspeed.checkpoint.ds_to_universal import main as to_universal
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from make_deepspeed import ADAMW, BF16, WARMUP, facts, save, truth
from peers_common import destination, make, new_folder, wanted, write_expected
from split_model import (
    HIDDEN,
    PADDED,
    VOCABULARY,
    Block,
    Embedding,
    Model,
    Split,
    groups,
    logits,
    loss,
    merged,
)
from torch import Tensor, nn

STEPS = 4
MICRO = 3
CONFIG = {
    "train_micro_batch_size_per_gpu": MICRO,
    "gradient_clipping": 1.0,
    "optimizer": ADAMW,
    "scheduler": WARMUP,
    "zero_optimization": {"stage": 1},
}
BLOOM = {**CONFIG, "data_types": {"grad_accum_dtype": "fp32"}, **BF16}
"""Config of Megatron-DeepSpeed's bf16 training."""


def split_of(tp: int) -> Split:
    """Return this rank's tensor-parallel group, of consecutive ranks. Every rank creates every group."""
    mine = None
    for first in range(0, dist.get_world_size(), tp):
        ranks = list(range(first, first + tp))
        group = dist.new_group(ranks)
        mine = group if dist.get_rank() in ranks else mine
    return Split(group=mine, rank=dist.get_rank() % tp, size=tp)


def mpu(split: Split) -> SimpleNamespace:
    """The `mpu` that DeepSpeed expects for a user's tensor parallelism, like Megatron's."""
    rank, world = dist.get_rank(), dist.get_world_size()
    data = [dist.new_group(list(range(first, world, split.size))) for first in range(split.size)]
    found = {
        "data_parallel_group": data[split.rank],
        "data_parallel_rank": rank // split.size,
        "data_parallel_world_size": world // split.size,
    }
    for name in ("model_parallel", "tensor_model_parallel"):
        found |= {f"{name}_group": split.group, f"{name}_rank": split.rank, f"{name}_world_size": split.size}
    found |= {"pipeline_model_parallel_rank": 0, "pipeline_model_parallel_world_size": 1}
    return SimpleNamespace(**{f"get_{name}": lambda value=value: value for name, value in found.items()})


def patterns(prefix: str, embedding: str, norm: str) -> dict[str, Any]:
    """Return the merge rules that Megatron-DeepSpeed stores for `ds_to_universal`."""
    block = rf"{prefix}\d+\."
    return {
        keys.UNIVERSAL_CHECKPOINT_INFO: {
            keys.UNIVERSAL_CHECKPOINT_VERSION_KEY: 0.2,
            keys.ORIGINAL_VOCAB_SIZE: VOCABULARY,
            keys.PADDED_VOCAB_SIZE: PADDED,
            keys.VOCABULARY_PARAMETER_PATTERNS: [embedding],
            keys.PIPELINE_REPLICATED_PARAMETER_PATTERNS: [embedding] if "tied" in embedding else [],
            keys.TP_REPLICATED_PARAMETER_PATTERNS: [
                block + r"norm\.(weight|bias)",
                block + "down_bias",
                norm + r"\.(weight|bias)",
            ],
            keys.PARAMETER_TO_AVERAGE_PATTERNS: [],
            keys.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS: [block + "down$"],
            keys.PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0: [block + "gate_up(_bias)?$"],
        }
    }


def gather(folder: Path, engine: Any, names: list[list[str]], tp: int, more: dict[str, Any]) -> None:
    """Merge the facts of every rank and write them."""
    cuts = {name: getattr(p, "cut", (None, 1)) for name, p in engine.module.named_parameters()}
    mine = (truth(engine), facts(engine, names, {}), cuts)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    if dist.get_rank() != 0:
        return
    tensors, found = {}, dict(ranks[0][1])
    for first in range(0, len(ranks), tp):
        local = [tensors_of for tensors_of, _, _ in ranks[first : first + tp]]
        for name in local[0]:
            cut = ranks[first][2].get(name.split("/", 1)[1], (None, 1))
            whole = merged([of[name] for of in local], cut)
            assert torch.equal(tensors.setdefault(name, whole), whole), f"{name} differs between replicas"
        stage = ranks[first][1]
        for group, other in zip(found["groups"], stage["groups"], strict=True):
            group["names"] += [name for name in other["names"] if name not in group["names"]]
        found["parameter_steps"] |= stage["parameter_steps"]
        found["frozen"] = sorted({*found["frozen"], *stage["frozen"]})
        found["aliases"] |= stage["aliases"]
    found["cuts"] = {name: cut for _, _, of in ranks for name, cut in of.items()}
    write_expected(folder, tensors, found | more)


def named_groups(model: nn.Module) -> tuple[list[dict[str, Any]], list[list[str]]]:
    names = {id(p): name for name, p in model.named_parameters()}
    of = groups(model)
    return of, [[names[id(p)] for p in group["params"]] for group in of]


def tokens(step: int, dp_rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + dp_rank)
    return tuple(torch.randint(0, VOCABULARY, (2, MICRO, 5), generator=generator).flatten(1))


def tensor_parallel(folder: Path, tp: int, with_patterns: bool) -> None:
    """Save a model split by hand, with an `mpu`."""
    split = split_of(tp)
    model, parallel = Model(split), mpu(split)
    of, names = named_groups(model)
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=of, config=CONFIG, mpu=parallel)
    for step in range(STEPS):
        engine.backward(engine(*tokens(step, parallel.get_data_parallel_rank())))
        engine.step()
    save(engine, folder, patterns(r"blocks\.", r"embed\.weight", "norm") if with_patterns else {})
    gather(
        folder, engine, names, tp, {"vocabulary": {"size": VOCABULARY, "padded": {"embed.weight": PADDED}}}
    )


def pipeline(folder: Path, pp: int, tp: int, config: dict[str, Any]) -> None:
    """Save a pipeline with the embedding's weight on the first and last stage."""
    split = split_of(tp)
    deepspeed.init_distributed()
    dp = dist.get_world_size() // (pp * tp)
    layers = [
        TiedLayerSpec("embed", Embedding, split, 1),
        LayerSpec(Block, split, 10),
        LayerSpec(Block, split, 20),
        LayerSpec(nn.LayerNorm, HIDDEN),
        TiedLayerSpec("embed", Embedding, split, 1, forward_fn=logits),
    ]
    if tp == 1:  # a function leaves a gap in the numbers of the files, which DeepSpeed's conversion refuses
        layers.insert(1, torch.clone)
    topology = PipeModelDataParallelTopology(num_pp=pp, num_mp=tp, num_dp=dp)
    model = PipelineModule(layers, topology=topology, loss_fn=loss, partition_method="type:Block")
    of, names = named_groups(model)
    config = {**config, "gradient_accumulation_steps": 2}
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=of, config=config)
    dp_rank = topology.get_coord(dist.get_rank()).data
    for step in range(STEPS):
        engine.train_batch(iter([tokens(2 * step + micro, dp_rank) for micro in range(2)]))
    embedding = r"tied_modules\.embed\.weight"
    save(engine, folder, patterns("", embedding, "3") if tp > 1 else {})
    padded = {"tied_modules.embed.weight": PADDED}
    gather(folder, engine, names, tp, {"vocabulary": {"size": VOCABULARY, "padded": padded}})


def autotp(folder: Path) -> None:
    """Save a Llama split by DeepSpeed's AutoTP."""
    import transformers

    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=18,
        hidden_size=8,
        intermediate_size=14,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = {**CONFIG, "tensor_parallel": {"autotp_size": 2}}
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    for name, p in engine.module.named_parameters():
        unlike = [d for d in range(p.ndim) if p.shape[d] != before[name].shape[d]]
        p.cut = (unlike[0] if unlike else None, 1)
        parts = [torch.empty_like(p) for _ in range(2)]
        dist.all_gather(parts, p.detach().contiguous())
        assert torch.equal(merged(parts, p.cut), before[name]), f"{name} is cut in another way"
    for step in range(STEPS):
        ids = torch.randint(0, 18, (MICRO, 6), generator=torch.Generator().manual_seed(step))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    save(engine, folder, {})
    gather(folder, engine, [[name for name, p in engine.module.named_parameters()]], 2, {})


def universal(out: Path, source: str) -> None:
    """Convert another fixture to a universal checkpoint, with the same content."""
    folder = new_folder(out, f"{source}_universal")
    (tag,) = [path for path in (out / source / "checkpoint").iterdir() if path.is_dir()]
    arguments = SimpleNamespace(
        input_folder=str(tag),
        output_folder=str(folder / "checkpoint" / f"{tag.name}_universal"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    to_universal(arguments)
    for name in ("expected.json", "expected.safetensors"):
        shutil.copyfile(out / source / name, folder / name)


def main() -> None:
    out = destination()
    cases = {
        "deepspeed_pipeline": (4, pipeline, 2, 1, CONFIG),
        "deepspeed_3d": (4, pipeline, 2, 2, BLOOM),
        "deepspeed_tp": (4, tensor_parallel, 2, True),
        "deepspeed_tp_no_patterns": (2, tensor_parallel, 2, False),
        "deepspeed_autotp": (2, autotp),
    }
    for name, (ranks, case, *arguments) in cases.items():
        make(out, name, ranks, case, *arguments)
    for source in ("deepspeed_zero2_fp16", "deepspeed_zero3_fp32", "deepspeed_3d"):
        if wanted(f"{source}_universal"):
            universal(out, source)


if __name__ == "__main__":
    main()
