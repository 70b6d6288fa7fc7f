"""Training scripts as they are written for DeepSpeed, but for the import, take the steps of plain PyTorch.

A classifier of pictures with the engine's own data loader; a GAN, which is two engines; a policy that is
trained by a reward and kept near a frozen reference. `test_deepspeed_fine_tuning.py` has Hugging Face models.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from marks import slow
from models import seeded
from ranks import Ranks
from torch import Tensor, nn
from torch.utils.data import Dataset

import uni3d.deepspeed as deepspeed

Weights = dict[str, Tensor]


def weights_of(engine: Any) -> Weights:
    """Return copies of an engine's parameters, whole."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def check(found: Weights, model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-5, atol=1e-5, msg=name)


def mine(batch: Tensor) -> Tensor:
    """Return this rank's part of a global batch."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


# --- a classifier of pictures ---------------------------------------------------------------------------


class Pictures(Dataset[Any]):
    """Noise in three colours, its label, and its number, by which the test knows what a step has seen."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.pictures = torch.randn(36, 3, 8, 8, generator=generator)
        self.labels = torch.randint(0, 5, (36,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, int]:
        return self.pictures[number], self.labels[number], number


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 2)
        self.fc1, self.fc2 = nn.Linear(24, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.conv2(x)).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


PICTURES = {
    "train_batch_size": 12,
    "steps_per_print": 2000,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01, "betas": [0.8, 0.999], "eps": 1e-3}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 4}},
}


def pictures_case(zero: int, config: str) -> tuple[list[float], list[list[int]], Weights]:
    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", config])
    deepspeed.init_distributed()
    net = seeded(ConvNet)
    trained = filter(lambda p: p.requires_grad, net.parameters())
    engine, _, loader, _ = deepspeed.initialize(
        args=args, model=net, model_parameters=trained, training_data=Pictures()
    )
    device = deepspeed.get_accelerator().device_name(engine.local_rank)
    criterion = nn.CrossEntropyLoss()
    losses, numbers = [], []
    for _ in range(2):
        for pictures, labels, which in loader:
            outputs = engine(pictures.to(device))
            loss = criterion(outputs, labels.to(device))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
            numbers.append(which.tolist())
    return losses, numbers, weights_of(engine)


@pytest.mark.parametrize("zero", [slow(0), slow(1), slow(2), 3])
def test_a_classifier_of_pictures(ranks: Ranks, tmp_path: Path, zero: int) -> None:
    config = tmp_path / "ds_config.json"
    config.write_text(json.dumps(PICTURES | {"zero_optimization": {"stage": zero}}))
    (losses, numbers, found), (others, more, _) = ranks.run(2, pictures_case, zero, str(config))
    net, data = seeded(ConvNet), Pictures()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, betas=(0.8, 0.999), eps=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, math.log(step) / math.log(4)) if step else 0.0
    )
    assert len(numbers) == 6, "two epochs of three steps"
    for step, which in enumerate(map(list.__add__, numbers, more)):
        loss = F.cross_entropy(net(data.pictures[which]), data.labels[which])
        assert (losses[step] + others[step]) / 2 == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    check(found, net)


# --- a GAN ----------------------------------------------------------------------------------------------


def generator() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh())


def discriminator() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1), nn.Sigmoid())


def gan_data() -> Iterator[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(2)
    for _ in range(4):
        yield torch.randn(12, 6, generator=source), torch.randn(12, 4, generator=source)


def gan_case(zero: int) -> tuple[Weights, Weights]:
    config = {
        "train_batch_size": 12,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "betas": [0.5, 0.999], "eps": 1e-3}},
        "zero_optimization": {"stage": zero},
    }
    maker, judge = seeded(generator), seeded(discriminator)
    net_g, *_ = deepspeed.initialize(model=maker, model_parameters=maker.parameters(), config=config)
    net_d, *_ = deepspeed.initialize(model=judge, model_parameters=judge.parameters(), config=config)
    criterion = nn.BCELoss()
    for real, noise in gan_data():
        real, noise = mine(real), mine(noise)
        label = torch.ones(len(real), 1)
        net_d.zero_grad()  # of what the generator's loss left there
        net_d.backward(criterion(net_d(real), label))
        fake = net_g(noise)
        net_d.backward(criterion(net_d(fake.detach()), 0 * label))
        net_d.step()
        net_g.zero_grad()
        net_g.backward(criterion(net_d(fake), label))
        net_g.step()
    net_d.zero_grad()
    return weights_of(net_g), weights_of(net_d)


@pytest.mark.parametrize("zero", [slow(0), 1, slow(2), 3])
def test_a_gan_of_two_engines(ranks: Ranks, zero: int) -> None:
    net_g, net_d = seeded(generator), seeded(discriminator)
    of_g, of_d = (
        torch.optim.AdamW(net.parameters(), lr=0.01, betas=(0.5, 0.999), eps=1e-3, weight_decay=0.0)
        for net in (net_g, net_d)
    )
    for real, noise in gan_data():
        label = torch.ones(len(real), 1)
        net_d.zero_grad()
        F.binary_cross_entropy(net_d(real), label).backward()
        fake = net_g(noise)
        F.binary_cross_entropy(net_d(fake.detach()), 0 * label).backward()
        of_d.step()
        net_g.zero_grad()
        F.binary_cross_entropy(net_d(fake), label).backward()
        of_g.step()
    for found_g, found_d in ranks.run(2, gan_case, zero):
        check(found_g, net_g)
        check(found_d, net_d)


# --- a policy trained by a reward -----------------------------------------------------------------------

VOCABULARY = 11


class Policy(nn.Module):
    """Predicts each next token from a running mean of the tokens so far."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).cumsum(1) / torch.arange(1, ids.shape[1] + 1).view(1, -1, 1)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def policy() -> nn.Module:
    """Return a policy that is decided, so that rounding doesn't change what it generates."""
    model = Policy()
    with torch.no_grad():
        model.head.weight.mul_(8)
    return model


def prompts() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield global batches of prompts, and of texts for the unsupervised loss."""
    source = torch.Generator().manual_seed(4)
    for _ in range(3):
        prompt = torch.randint(0, VOCABULARY, (8, 3), generator=source)
        yield prompt, torch.randint(0, VOCABULARY, (8, 6), generator=source)


@torch.no_grad()
def generate(model: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    for _ in range(4):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def log_probabilities(model: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    return F.log_softmax(model(ids)[:, :-1], -1).gather(2, ids[:, 1:, None]).squeeze(2)


def policy_loss(now: Tensor, before: Tensor, reference: Tensor, ids: Tensor) -> Tensor:
    """Return PPO's clipped loss, of a reward for high tokens less the distance from the reference."""
    reward = ids[:, 1:] / VOCABULARY - 0.1 * (before - reference)
    ratio = (now - before).exp()
    return torch.maximum(-reward * ratio, -reward * ratio.clamp(0.8, 1.2)).mean()


def text_loss(logits: Tensor, text: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())


def policy_case(zero: int) -> tuple[Weights, Weights]:
    common = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": zero}}
    optimizer = {"type": "AdamW", "params": {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.1}}
    model = seeded(policy)
    actor, *_ = deepspeed.initialize(model=model, config=common | {"optimizer": optimizer})
    reference, *_ = deepspeed.initialize(model=seeded(policy), config=common)
    reference.eval()
    for prompt, text in prompts():
        prompt, text = mine(prompt), mine(text)
        actor.eval()
        ids = generate(actor.module, prompt)
        with torch.no_grad():
            before, fixed = log_probabilities(actor, ids), log_probabilities(reference, ids)
        actor.train()
        for _ in range(2):
            actor.backward(policy_loss(log_probabilities(actor, ids), before, fixed, ids))
            actor.backward(text_loss(actor(text), text))
            actor.step()
    return weights_of(actor), weights_of(reference)


@pytest.mark.parametrize("zero", [0, slow(1), slow(2), 3])
def test_a_policy_near_its_reference(ranks: Ranks, zero: int) -> None:
    actor = seeded(policy)
    reference = copy.deepcopy(actor)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=0.01, eps=1e-3, weight_decay=0.1)
    for prompt, text in prompts():
        ids = generate(actor, prompt)
        with torch.no_grad():
            before, fixed = log_probabilities(actor, ids), log_probabilities(reference, ids)
        for _ in range(2):
            optimizer.zero_grad()
            policy_loss(log_probabilities(actor, ids), before, fixed, ids).backward()
            text_loss(actor(text), text).backward()
            nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
            optimizer.step()
    for found, found_reference in ranks.run(2, policy_case, zero):
        check(found, actor)
        check(found_reference, reference)
