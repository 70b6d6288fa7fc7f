"""Loads of tied weights into a model with untied ones, and the reverse."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW

import uni3d

pytestmark = pytest.mark.usefixtures("alone")


class Lookup(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def saved(run: Path, tied: bool) -> Lookup:
    model = Lookup(tied)
    optimizer = AdamW(model.parameters())
    model.head(model.embed(torch.tensor([1]))).sum().backward()
    optimizer.step()
    uni3d.save(run, model=model, optimizer=optimizer, step=1, async_save=False)
    return model


TEXTS = {
    True: "embed.weight and head.weight are one tied weight in the checkpoint, but two in this run: tie",
    False: "embed.weight and head.weight are one tied weight in this run, but two in the checkpoint: untie",
}


@pytest.mark.parametrize("tied", [True, False])
def test_other_ties_are_refused(tmp_path: Path, tied: bool) -> None:
    saved(tmp_path, tied)
    model = Lookup(not tied)
    before = [p.detach().clone() for p in model.parameters()]
    for optimizer, strict in (
        (None, True),
        (AdamW(model.parameters()), True),
        (AdamW(model.parameters()), False),
    ):
        with pytest.raises(uni3d.CheckpointError, match=TEXTS[tied]):
            uni3d.load(tmp_path, model=model, optimizer=optimizer, strict=strict)
    assert all(map(torch.equal, model.parameters(), before))


def test_a_tied_value_goes_to_both(tmp_path: Path) -> None:
    there, model = saved(tmp_path, True), Lookup(False)
    report = uni3d.load(tmp_path, model=model, strict=False).report
    assert torch.equal(model.embed.weight, there.embed.weight)
    assert torch.equal(model.head.weight, there.embed.weight)
    assert not report.defaulted


def test_the_first_of_two_values_is_taken(tmp_path: Path) -> None:
    there, model = saved(tmp_path, False), Lookup(True)
    report = uni3d.load(tmp_path, model=model, strict=False).report
    assert torch.equal(model.head.weight, there.embed.weight)
    assert "head.weight/fp32" in map(str, report.dropped)
