"""Hugging Face models without memory of their own get their weights from files, each rank its parts."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from fresh_memory import fresh_memory_is_nan
from marks import slow
from models import save_and_wait
from ranks import Ranks
from torch import Tensor, nn

import parallel
import uni3d
from uni3d.checkpoint.file_weights import FileWeights

SHARDED = {"max_shard_size": "10KB"}
"""Options of `save_pretrained` that make several files and an index."""


def unfilled(kind: str) -> Any:
    with uni3d.meta_parameters():
        return hf_models.make(kind)


def pretrained(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Save a model with weights that none is initialized with; return it as transformers loads it."""
    model: Any = hf_models.make(kind).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.rand(parameter.shape).to(dtype) / 8
    hf_models.hf.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, **options)
    return type(model).from_pretrained(folder, dtype=dtype)


@contextmanager
def as_made(model: nn.Module) -> Iterator[None]:
    """Let `hf_models.make` return this model, to train it plainly."""
    make = hf_models.make
    hf_models.make = lambda *_, **__: model
    try:
        yield
    finally:
        hf_models.make = make


def filled_case(kind: str, zero: int, dp: int, tp: int, folder: Path, run: Path | None) -> Any:
    with fresh_memory_is_nan():
        engine = hf_models.make_engine(unfilled(kind), zero, dp=dp, tp=tp, weights=folder)
    weights = engine.module_state_dict()
    if run is not None:
        save_and_wait(engine, run, client_state={"at": 0})
        with fresh_memory_is_nan():
            engine = hf_models.make_engine(unfilled(kind), zero, dp=dp, tp=tp, weights="none", resume=run)
        assert engine.client_state == {"at": 0}, "it resumed, and read no weights"
    buffers = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    return hf_models.train(engine, kind), weights, buffers


@pytest.mark.parametrize(
    ("kind", "zero", "dp", "tp", "dtype", "options"),
    [
        ("llama", 3, 2, 1, torch.float32, SHARDED),
        ("llama", 1, 1, 2, torch.bfloat16, {}),
        ("bert", 3, 2, 1, torch.float16, {}),
        slow("gpt2", 3, 2, 1, torch.float32, {}),
        slow("qwen3", 3, 1, 2, torch.float32, {}),
    ],
)
def test_the_weights_are_those_that_transformers_loads(
    hf_ranks: Ranks,
    tmp_path: Path,
    kind: str,
    zero: int,
    dp: int,
    tp: int,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> None:
    model = pretrained(kind, tmp_path / "model", dtype, **options).float()
    assert bool(options) == (tmp_path / "model" / "model.safetensors.index.json").exists()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, buffer in hf_models.make(kind).named_buffers():  # computed in fp32
        model.get_buffer(name).copy_(buffer)
    buffers = dict(hf_models.make(kind).named_buffers())
    if kind == "bert":
        model.bert.embeddings.requires_grad_(False)
    with as_made(model):
        losses, norms, _ = hf_models.train_plainly(kind)
    run = tmp_path / "run" if kind == "llama" else None
    results = hf_ranks.run(2, filled_case, kind, zero, dp, tp, tmp_path / "model", run)
    for (found_losses, found_norms), weights, found_buffers in results:
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(weights[name], tensor), name
        for name, buffer in buffers.items():
            assert torch.equal(found_buffers[name], buffer), name
        assert found_losses == pytest.approx(losses, rel=1e-5)
        assert found_norms == pytest.approx(norms, rel=1e-5)


def bytes_case(folder: Path, zero: int, dp: int, tp: int) -> tuple[int, int]:
    """Return the bytes that this rank reads, and those of its parts."""
    topology = parallel.Topology(parallel.Degrees(pp=1, dp=dp, tp=tp), zero_stage=zero)
    model = unfilled("llama")
    files = FileWeights(parallel.HostComm(), folder, model)
    settings = parallel.Settings(zero_stage=zero)
    built = parallel.build(model, topology, settings, loaded_later=True)
    files.fill(built)
    parts: list[Tensor] = [getattr(p, "_local_tensor", p) for p in built.module.parameters()]
    return files.bytes_read, sum(part.nbytes for part in parts)


@pytest.mark.parametrize(("zero", "dp", "tp", "most"), [(3, 2, 1, 0.51), slow(1, 1, 2, 0.6), (0, 2, 1, 1.0)])
def test_a_rank_reads_its_parts_alone(
    hf_ranks: Ranks, tmp_path: Path, zero: int, dp: int, tp: int, most: float
) -> None:
    whole = sum(p.nbytes for p in pretrained("llama", tmp_path).parameters())
    for read, held in hf_ranks.run(2, bytes_case, tmp_path, zero, dp, tp):
        assert read == held
        assert read <= most * whole


def test_what_meta_devices_lose_is_refused(alone: None) -> None:
    with torch.device("meta"):
        model = hf_models.make("llama")
    message = r"buffers on the meta device \(model\.rotary_emb\.inv_freq, .*uni3d\.meta_parameters\(\)"
    with pytest.raises(ValueError, match=message):
        hf_models.make_engine(model, 0)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no init_parameter.*weights=FILE"):
        hf_models.make_engine(unfilled("llama"), 0)
