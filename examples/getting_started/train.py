"""Train a Hugging Face BERT classifier with a DeepSpeed script. Only the import differs.

The model is small and randomly initialized, and the data is generated, so it runs anywhere in seconds.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import BertConfig, BertForSequenceClassification

import uni3d as deepspeed

VOCABULARY = 100
LENGTH = 16


class FirstToken(Dataset[dict[str, Tensor]]):
    """Sequences of random tokens. The label is 1 if the first is in the upper half of the vocabulary."""

    def __init__(self, samples: int) -> None:
        self.tokens = torch.randint(
            0, VOCABULARY, (samples, LENGTH), generator=torch.Generator().manual_seed(0)
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index]
        label = (tokens[0] >= VOCABULARY // 2).long()
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": label}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--local_rank", type=int, default=-1, help="passed by some launchers; unused")
    deepspeed.add_config_arguments(parser)
    cmd_args = parser.parse_args()

    deepspeed.init_distributed()
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            num_labels=2,
        )
    )
    params = [p for p in model.parameters() if p.requires_grad]
    model_engine, _optimizer, _, _ = deepspeed.initialize(args=cmd_args, model=model, model_parameters=params)

    data = FirstToken(512)
    sampler: DistributedSampler[dict[str, Tensor]] = DistributedSampler(data)  # each rank reads its part
    loader = DataLoader(data, batch_size=model_engine.train_micro_batch_size_per_gpu(), sampler=sampler)
    for epoch in range(cmd_args.epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros((), device=model_engine.device)
        for batch in loader:
            batch = {key: value.to(model_engine.device) for key, value in batch.items()}
            loss = model_engine(**batch).loss
            model_engine.backward(loss)
            model_engine.step()
            total += loss.detach()
        torch.distributed.all_reduce(total)
        if model_engine.global_rank == 0:
            mean = total.item() / len(loader) / model_engine.world_size
            print(f"epoch {epoch + 1}: mean loss {mean:.4f}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
