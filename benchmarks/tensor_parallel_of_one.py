"""Measure the cost of tensor parallelism's wrappers on one rank, where they have nothing to do.

    OMP_NUM_THREADS=1 python benchmarks/tensor_parallel_of_one.py

There are two copies of the tiny GPT in one process, one with its plan applied over a mesh of one rank. Their
forward and backward passes are timed in turns. The medians and the median of the ratios are printed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import loss_parallel, parallelize_module

EXAMPLE = Path(__file__).parent.parent / "examples" / "megatron_gpt"
sys.path.insert(0, str(EXAMPLE))

from model import GPT, GPTConfig  # noqa: E402

import parallel  # noqa: E402
from parallel.loss import Loss  # noqa: E402
from parallel.tensor import DTENSOR_STYLES, expand_plan  # noqa: E402

REPEATS = 15


def main() -> None:
    parallel.start_process_group("cpu")
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    config = json.loads((EXAMPLE / "configs" / "tiny.json").read_text())
    tokens = torch.randint(0, 256, (24, config["seq_len"] + 1))

    def make() -> GPT:
        torch.manual_seed(0)
        return GPT(GPTConfig(**config["model"] | {"tied_head": False}))

    plain, wrapped = make(), make()
    plan = expand_plan(wrapped, wrapped.tp_plan)
    parallelize_module(
        wrapped, mesh, {name: DTENSOR_STYLES[style](Replicate()) for name, style in plan.items()}
    )

    def step(model: GPT) -> float:
        loss = Loss.of(model.loss_fn(model(tokens[:, :-1]), tokens[:, 1:]))
        loss.total.backward()  # type: ignore[no-untyped-call]
        return loss.total.item()

    with loss_parallel():
        assert abs(step(plain) - step(wrapped)) < 1.0, "the same work"
        pairs = [(seconds(step, plain), seconds(step, wrapped)) for _ in range(REPEATS)]
    a, b = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
    ratio = statistics.median(w / p for p, w in pairs)
    print(f"plain {a:.1f} ms, wrapped on one rank {b:.1f} ms, ratio {ratio:.2f} (medians of {REPEATS} pairs)")


def seconds(step: Callable[[GPT], float], model: GPT) -> float:
    start = time.perf_counter()
    step(model)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
