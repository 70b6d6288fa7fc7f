"""Folders in the layout of Megatron-core's `torch_dist`, written without Megatron."""

import argparse
import json
import pickle
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

Chunks = list[tuple[tuple[int, ...], Tensor]]
LAYERS, WIDTH = 3, 4
DECAYED = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "wd_mult": 1.0, "lr_mult": 1.0}
SPARED = {**DECAYED, "weight_decay": 0.0, "wd_mult": 0.0}


def write_dist(folder: Path, tensors: dict[str, Chunks], common: dict[str, Any], *objects: str) -> Path:
    """Write a folder with these chunks; each is saved as a tensor, then renamed to a chunk of one."""
    parts = {f"{name}@{i}": data for name, chunks in tensors.items() for i, (_, data) in enumerate(chunks)}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is one process
        dcp.save({**parts, **{name: [None] for name in objects}}, checkpoint_id=folder, no_dist=True)
    metadata = FileSystemReader(folder).read_metadata()
    places = {index.fqn: place for index, place in metadata.storage_data.items()}
    metadata.planner_data = None
    for name, chunks in tensors.items():
        entries = [metadata.state_dict_metadata.pop(f"{name}@{i}") for i in range(len(chunks))]
        whole, ends = entries[0], []
        whole.chunks = []
        for i, (offset, data) in enumerate(chunks):
            whole.chunks.append(ChunkStorageMetadata(torch.Size(offset), data.shape))
            ends.append([begin + size for begin, size in zip(offset, data.shape, strict=True)])
            metadata.storage_data.pop(MetadataIndex(f"{name}@{i}", torch.Size([0] * data.ndim)))
            metadata.storage_data[MetadataIndex(name, torch.Size(offset), i)] = places[f"{name}@{i}"]
        whole.size = torch.Size(map(max, zip(*ends, strict=True)))
        metadata.state_dict_metadata[name] = whole
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    torch.save(common, folder / "common.pt")
    return folder


def cut(tensor: Tensor, dim: int, parts: int, row: int | None = None) -> Chunks:
    """Return the ranks' shards as chunks; `row` adds a leading dim for a layer."""
    chunks, begin = [], 0
    for part in tensor.chunk(parts, dim):
        offset = [begin if d == dim else 0 for d in range(tensor.ndim)]
        begin += part.shape[dim]
        part = part.contiguous()
        chunks.append((tuple(offset), part) if row is None else ((row, *offset), part[None]))
    return chunks


def stack(layers: list[Tensor], dim: int, parts: int) -> Chunks:
    return [chunk for row, tensor in enumerate(layers) for chunk in cut(tensor, dim, parts, row)]


def numbers(*shape: int, n: int = LAYERS) -> list[Tensor]:
    return [torch.randn(shape) for _ in range(n)]


def common(**more: Any) -> dict[str, Any]:
    args = argparse.Namespace(
        tensor_model_parallel_size=2,
        consumed_train_samples=48,
        global_batch_size=16,
        optimizer="adam",
        params_dtype=torch.bfloat16,
        exit_signal=signal.SIGTERM,
    )
    groups = {"state": {"common_step": torch.tensor(3.0)}, "param_groups": [DECAYED, SPARED]}
    return {
        "args": args,
        "iteration": 3,
        "checkpoint_version": 3.0,
        "optimizer": {"optimizer": groups},
        **more,
    }


class Run:
    """A bf16 model with fp32 masters and moments, split over two tensor-parallel ranks."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.layers = {  # each layer's, and the dim that is cut
            "mlp.linear_fc1.weight": (0, numbers(6, WIDTH)),
            "mlp.linear_fc2.weight": (1, numbers(WIDTH, 6)),
            "mlp.linear_fc1.bias": (0, numbers(6)),
        }
        (self.embedding,), (self.norm,) = numbers(8, WIDTH, n=1), numbers(WIDTH, n=1)
        self.states = ("fp32_param", "exp_avg", "exp_avg_sq")

    def value(self, tensor: Tensor, state: str) -> Tensor:
        """Return the tensor's values in a state; they differ between states."""
        return tensor * {"": 1, "fp32_param": 1, "exp_avg": 0.5, "exp_avg_sq": 0.25}[state]

    def tensors(self, *, by_number: bool = False) -> dict[str, Chunks]:
        out: dict[str, Chunks] = {}
        for state in ("", *self.states):
            prefix = f"optimizer.state.{state}." if state else ""

            def cast(tensor: Tensor, state: str = state) -> Tensor:
                return self.value(tensor, state) if state else tensor.bfloat16()

            out[f"{prefix}embedding.word_embeddings.weight"] = cut(cast(self.embedding), 0, 2)
            out[f"{prefix}decoder.final_layernorm.weight"] = [((0,), cast(self.norm))]
            for name, (dim, layers) in self.layers.items():
                each = [cast(tensor) for tensor in layers]
                if by_number:
                    for i, tensor in enumerate(each):
                        out[f"{prefix}decoder.layers.{i}.{name}"] = cut(tensor, dim, 2)
                else:
                    out[f"{prefix}decoder.layers.{name}"] = stack(each, dim, 2)
        return out

    def held(self) -> dict[str, Any]:
        """Return the run's expected arrays."""
        whole = {
            "embedding.word_embeddings.weight": self.embedding,
            "decoder.final_layernorm.weight": self.norm,
        }
        for name, (_, layers) in self.layers.items():
            whole |= {f"decoder.layers.{i}.{name}": tensor for i, tensor in enumerate(layers)}
        return {
            f"{'fp32' if state == 'fp32_param' else state}/{name}": self.value(tensor, state).numpy()
            for name, tensor in whole.items()
            for state in self.states
        }
