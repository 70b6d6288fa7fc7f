"""Every topology x ZeRO stage x precision takes the same ten steps as one process of plain PyTorch.

`python tests/support/parallelism_tables.py parity` writes what this measures into `docs/parallelism.md`.
"""

from typing import Any, NamedTuple

import oracle
import pytest
import torch
from marks import matrix, slow
from models import take_steps
from ranks import Ranks
from tied_gpt import gpt_engine
from torch import Tensor
from torch.distributed.tensor import DTensor

STEPS = 10
ACCUMULATION = 2
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE_POWER = 12
"""Initial loss scale of fp16, at which none of these steps overflows."""


class Topology(NamedTuple):
    pp: int
    dp: int
    tp: int

    def __str__(self) -> str:
        return f"pp{self.pp}dp{self.dp}tp{self.tp}"

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.tp


TOPOLOGIES = [
    Topology(pp, dp, tp) for pp in (1, 2, 4) for dp in (1, 2, 3) for tp in (1, 2) if pp * dp * tp <= 4
]
MODEL = oracle.MODEL | {"tied_head": True, "num_layers": 4}


class Errors(NamedTuple):
    """Largest errors relative to the oracle; for parameters, relative to the largest element of each."""

    loss: float
    norm: float
    parameters: float
    early: float
    """Error of the norms of the first steps, before any 16-bit rounding differs."""


EARLY = 3
LIMITS = {
    "fp32": Errors(1e-5, 1e-5, 1e-5, 1e-5),
    "bf16": Errors(5e-4, 2e-2, 1e-1, 1e-5),
    "fp16": Errors(5e-5, 2e-3, 1e-2, 1e-5),
}
"""Documented limits of each precision; `early` holds only if each sum is computed by one process."""


def cells_case(topology: Topology, cells: list[tuple[int, str]]) -> list[Any]:
    """Return losses, norms and this stage's whole parameters for each `(ZeRO stage, precision)`."""
    results = []
    for zero, precision in cells:
        sections = {
            "bf16": {"enabled": precision == "bf16"},
            "fp16": {"enabled": precision == "fp16", "initial_scale_power": SCALE_POWER},
        }
        engine = gpt_engine(*topology, zero, sizes=MODEL, groups=True, **sections)
        losses, norms = take_steps(engine, STEPS)
        parameters: dict[str, Tensor] = {}
        for name, parameter in engine.module.named_parameters():
            whole = parameter.detach()
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            parameters[engine.model.first_name(name)] = whole.clone()
        results.append((losses, norms, parameters, engine.skipped_steps))
    return results


def expected(topology: Topology, precision: str) -> oracle.Trace:
    if precision == "fp32":
        return oracle.train(MODEL, STEPS)
    terms = 128  # the power of two next to the 96 tokens of a batch
    factor = 2.0**SCALE_POWER / terms if precision == "fp16" else 1.0
    micro = oracle.BATCH // (topology.dp * ACCUMULATION)
    return oracle.train_mixed(MODEL, STEPS, PRECISIONS[precision], micro, factor)


def measure(ranks: Ranks, topology: Topology, cells: list[tuple[int, str]]) -> dict[tuple[int, str], Errors]:
    """Return the errors of each cell over all ranks."""
    everyone = ranks.run(topology.world, cells_case, topology, cells, timeout=600)
    traces = {precision: expected(topology, precision) for _, precision in cells}
    errors = {}
    for i, (zero, precision) in enumerate(cells):
        trace = traces[precision]
        final = {name: state["fp32"] for name, state in trace.states[-1].items()}
        losses, norms, early, tensors, seen = [0.0], [0.0], [0.0], [0.0], set()
        for result in everyone:
            found_losses, found_norms, parameters, skipped = result[i]
            assert skipped == 0
            losses += [abs(a - b) / b for a, b in zip(found_losses, trace.losses, strict=True)]
            norms += [abs(a - b) / b for a, b in zip(found_norms, trace.norms, strict=True)]
            early += norms[-STEPS:][:EARLY]
            for name, tensor in parameters.items():
                scale = final[name].abs().max().item()
                tensors.append((tensor - final[name]).abs().max().item() / scale)
            seen |= parameters.keys()
        assert seen == final.keys(), "every parameter is somewhere"
        errors[zero, precision] = Errors(max(losses), max(norms), max(tensors), max(early))
    return errors


def check(topology: Topology, zero: int, precision: str, errors: Errors) -> None:
    for what, error, limit in zip(Errors._fields, errors, LIMITS[precision], strict=True):
        if what == "early" and (topology.pp > 1 or topology.tp > 1):
            continue  # a tied weight's two gradients, or two ranks' products, were rounded before their sum
        assert error <= limit, f"{topology} ZeRO {zero} in {precision}: {what} differs by {error:.1e}"


ALL_CELLS = [(zero, precision) for precision in PRECISIONS for zero in range(4)]
SOME = [
    (Topology(1, 2, 1), [(0, "bf16"), (2, "bf16"), (3, "fp16")]),
    (Topology(2, 1, 1), [(1, "fp16")]),
    slow(Topology(1, 1, 2), [(2, "bf16")]),
    matrix(Topology(1, 2, 1), [(0, "fp16"), (1, "fp16")]),
    matrix(Topology(2, 1, 1), [(1, "bf16")]),
]


@pytest.mark.parametrize(("topology", "cells"), SOME, ids=str)
def test_some_cells(ranks: Ranks, topology: Topology, cells: list[tuple[int, str]]) -> None:
    for (zero, precision), errors in measure(ranks, topology, cells).items():
        check(topology, zero, precision, errors)


@pytest.mark.matrix
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_every_cell_of_a_topology(ranks: Ranks, topology: Topology) -> None:
    for (zero, precision), errors in measure(ranks, topology, ALL_CELLS).items():
        check(topology, zero, precision, errors)


@pytest.mark.matrix
def test_eight_processes() -> None:
    topology, cells = Topology(2, 2, 2), [(1, "fp32"), (3, "fp32"), (2, "bf16")]
    eight = Ranks(8)
    try:
        for (zero, precision), errors in measure(eight, topology, cells).items():
            check(topology, zero, precision, errors)
    finally:
        eight.stop()
