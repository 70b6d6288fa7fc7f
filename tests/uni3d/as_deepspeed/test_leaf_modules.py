"""Modules that are marked to be gathered as one: by class, by name. Models without experts."""

from typing import Any

import pytest
from torch import nn
from uni3d.deepspeed.moe.utils import (
    has_moe_layers,
    is_moe_param,
    split_params_into_different_moe_groups_for_optimizer,
)

import uni3d.deepspeed as deepspeed
from uni3d.deepspeed import utils


class Expert(nn.Linear):
    """A part that only some ranks may run."""


class Narrow(Expert):
    pass


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(Expert(2, 2), Narrow(2, 2)), nn.Tanh())


def test_marks_by_class() -> None:
    m: Any = model()
    assert utils.get_z3_leaf_modules(m) == []
    assert utils.set_z3_leaf_modules(m, [Expert]) == [m[1][0], m[1][1]]
    assert utils.get_z3_leaf_modules(m) == [m[1][0], m[1][1]]
    assert utils.z3_leaf_module(m[1][1])
    assert not utils.z3_leaf_module(m[0])
    assert utils.unset_z3_leaf_modules(m, ["Narrow"]) == [m[1][1]]
    assert utils.get_z3_leaf_modules(m) == [m[1][0]]
    utils.set_z3_leaf_module(m[0], True)
    utils.set_z3_leaf_module(m[1][0], False)
    assert utils.get_z3_leaf_modules(m) == [m[0]]
    assert utils.get_z3_leaf_modules(model()) == []


def test_marks_by_name() -> None:
    m: Any = model()
    assert utils.set_z3_leaf_modules_by_name(m, ["1.0", "none"]) == ([m[1][0]], ["none"])
    assert utils.set_z3_leaf_modules_by_suffix(m, [".1", "none"]) == ([m[1][1]], ["none"])
    assert utils.get_z3_leaf_modules(m) == [m[1][0], m[1][1]]
    assert utils.set_z3_leaf_modules_by_name(m, ["none"], raise_if_not_found=False) == ([], ["none"])
    with pytest.raises(ValueError, match="Sequential has no modules named none"):
        utils.set_z3_leaf_modules_by_suffix(m, ["none"])
    with pytest.raises(ValueError, match=r"no modules of the classes \['Experts'\]"):
        utils.set_z3_leaf_modules(m, ["Experts"])


def test_a_module_that_is_gathered_in_parts() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Expert(2, 2) for _ in range(2))

    m = Model()
    with pytest.raises(ValueError, match="Model is in no list of layers"):
        utils.set_z3_leaf_modules(m, [Model])
    assert utils.get_z3_leaf_modules(m) == []


def test_there_are_no_experts() -> None:
    m = model()
    group = {"params": list(m.parameters()), "name": "all"}
    assert split_params_into_different_moe_groups_for_optimizer(group) == [group]
    assert split_params_into_different_moe_groups_for_optimizer([group, group]) == [group, group]
    assert has_moe_layers(m) == (False, 0)
    assert not any(is_moe_param(p) for p in m.parameters())
    with pytest.raises(NotImplementedError, match="expert parallelism isn't supported"):
        deepspeed.moe.layer.MoE(2)
