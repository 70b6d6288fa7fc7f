"""Make the fixtures of weights alone: `python tests/peers/make_weights.py [OUT [NAME ...]]`."""

import json
from pathlib import Path

import safetensors.torch
import torch
import transformers
from peers_common import destination, new_folder, wanted, write_expected
from torch import Tensor, nn


class Small(nn.Module):
    """Model with a tied weight, a bf16, a non-contiguous and a scalar parameter, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.hidden = nn.Linear(7, 7)
        self.low = nn.Parameter(torch.randn(5, 3).bfloat16())
        self.turned = nn.Parameter(torch.randn(6, 4).t())
        self.gain = nn.Parameter(torch.tensor(1.25))
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("seen", torch.tensor(3))
        # One tensor's storage that two entries of the state dict see different parts of.
        table = torch.randn(4, 6)
        self.register_buffer("left", table[:, :2])
        self.register_buffer("right", table[:, 2:])


def expect(folder: Path, model: nn.Module, framework: str) -> None:
    """Return the model's tensors: parameters in fp32, buffers in their own types."""
    kept = model.state_dict()
    names = {p: name for name, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {f"fp32/{name}": p.float() for name, p in model.named_parameters()}
    tensors |= {f"value/{name}": b for name, b in model.named_buffers() if name in kept}
    every = model.named_parameters(remove_duplicate=False)
    facts = {
        "framework": framework,
        "aliases": {name: names[p] for name, p in every if names[p] != name},
        "dtypes": {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in kept.items()},
    }
    write_expected(folder, tensors, facts)


def llama(folder: Path, dtype: torch.dtype, tied: bool, size: str) -> None:
    """Save a tiny Llama with `save_pretrained`."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=33,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        dtype=dtype,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder / "checkpoint", max_shard_size=size)
    expect(folder, model, f"transformers {transformers.__version__}")


def pickled(folder: Path, legacy: bool) -> None:
    """Save a state_dict with `torch.save`; tied weights and views share storages in the file."""
    torch.manual_seed(5)
    model = Small()
    (folder / "checkpoint").mkdir()
    path = folder / "checkpoint" / "pytorch_model.bin"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    expect(folder, model, f"torch {torch.__version__}")


def pickled_shards(folder: Path) -> None:
    """Save a state_dict in two files with an index, like transformers before safetensors."""
    torch.manual_seed(5)
    model = Small()
    (folder / "checkpoint").mkdir()
    state, shards, where = model.state_dict(), [{}, {}], {}
    for place, (name, tensor) in enumerate(state.items()):
        shard = 0 if place < len(state) // 2 or name == "head.weight" else 1
        shards[shard][name] = tensor
        where[name] = f"pytorch_model-0000{shard + 1}-of-00002.bin"
    for number, shard in enumerate(shards, 1):
        torch.save(shard, folder / "checkpoint" / f"pytorch_model-0000{number}-of-00002.bin")
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "checkpoint" / "pytorch_model.bin.index.json").write_text(text)
    expect(folder, model, f"torch {torch.__version__}")


def saved_model(folder: Path) -> None:
    """Save with `safetensors.torch.save_model`, which lists further tied names as metadata."""
    torch.manual_seed(5)
    model = Small()
    model.left, model.right = model.left.clone(), model.right.clone()  # it refuses two parts of one storage
    model.turned = nn.Parameter(model.turned.detach().contiguous())
    (folder / "checkpoint").mkdir()
    safetensors.torch.save_model(model, str(folder / "checkpoint" / "model.safetensors"))
    expect(folder, model, f"safetensors {safetensors.__version__}")


def main() -> None:
    out = destination()
    if wanted("weights_llama_sharded"):
        llama(new_folder(out, "weights_llama_sharded"), torch.bfloat16, True, "1KB")
    if wanted("weights_llama"):
        llama(new_folder(out, "weights_llama"), torch.float32, False, "1GB")
    if wanted("weights_bin"):
        pickled(new_folder(out, "weights_bin"), legacy=False)
    if wanted("weights_bin_legacy"):
        pickled(new_folder(out, "weights_bin_legacy"), legacy=True)
    if wanted("weights_bin_sharded"):
        pickled_shards(new_folder(out, "weights_bin_sharded"))
    if wanted("weights_save_model"):
        saved_model(new_folder(out, "weights_save_model"))


if __name__ == "__main__":
    main()
