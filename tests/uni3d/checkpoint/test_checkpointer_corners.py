"""`uni3d.Checkpointer` when the model changes under it, and in states that few trainers are in."""

from pathlib import Path

import pytest
import torch
from torch import nn

import uni3d


def net(seed: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def check_equal(found: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = found.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.usefixtures("alone")
def test_a_model_that_is_cast_between_two_saves(tmp_path: Path) -> None:
    model, reader = net(), net(4)
    checkpointer = uni3d.Checkpointer(tmp_path, model=model)
    checkpointer.save(1)
    model.bfloat16()  # the parameters stay the objects that they are
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(uni3d.CheckpointError, match=r"is float32.* in .*, but the model.s is bfloat16"):
        checkpointer.load()
    check_equal(model, before)
    checkpointer.save(2).wait()
    uni3d.load(tmp_path, model=reader.bfloat16())
    check_equal(reader, before)


@pytest.mark.usefixtures("alone")
def test_a_parameter_that_grows_between_two_saves(tmp_path: Path) -> None:
    model, reader = net(), net(4)
    checkpointer = uni3d.Checkpointer(tmp_path, model=model)
    checkpointer.save(1)
    model[1].weight.data, model[1].bias.data = torch.randn(7, 4), torch.randn(7)
    checkpointer.save(2).wait()
    reader[1] = nn.Linear(4, 7)
    uni3d.load(tmp_path, model=reader)
    check_equal(reader, model.state_dict())


@pytest.mark.usefixtures("alone")
def test_weights_tied_and_untied_between_saves(tmp_path: Path) -> None:
    model, reader = net(), net(4)
    checkpointer = uni3d.Checkpointer(tmp_path, model=model)
    checkpointer.save(1)
    model[1].weight = model[0].weight
    checkpointer.save(2).wait()
    reader[1].weight = reader[0].weight
    uni3d.load(tmp_path, model=reader)
    check_equal(reader, model.state_dict())
    model[1].weight = nn.Parameter(torch.randn(4, 4))
    checkpointer.save(3).wait()
    reader = net(5)
    uni3d.load(tmp_path, model=reader)
    check_equal(reader, model.state_dict())
