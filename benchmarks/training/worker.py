"""The process of one rank: `python -m benchmarks.training.worker TASK`, with torchrun's variables.

It takes an arm's steps, and writes what it measured to `<rank>.json` in the task's folder.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.checkpoint.procfs import memory
from benchmarks.training.task import SAVE_EVERY, Task
from benchmarks.training.trainer import Trainer

BUILDERS = {
    "uni3d": ("ours", "build"),
    "deepspeed": ("with_deepspeed", "build"),
    "ddp": ("with_torch", "ddp"),
    "fsdp2": ("with_torch", "fsdp2"),
    "tensor_parallel": ("with_torch", "tensor_parallel"),
}
"""Module and function that make each library's `Trainer`."""


def main() -> None:
    task, rank = Task.from_json(sys.argv[1]), int(os.environ["RANK"])
    if task.device == "cpu":
        bind(rank, task.ranks)
    torch.set_num_threads(task.threads)
    module, function = BUILDERS[task.library]
    build = getattr(import_module(f"benchmarks.training.{module}"), function)
    if task.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM is VmRSS again (proc(5)): imports don't count
    before, imported = memory("VmRSS"), time.time()
    trainer: Trainer = build(task)
    figures: dict[str, Any] = {"imports": imported - task.began, "initialize": time.time() - imported}
    figures |= train(task, rank, trainer)
    on_cuda = task.device == "cuda"
    figures["peak"] = torch.cuda.max_memory_allocated() if on_cuda else memory("VmHWM") - before
    figures["parameters"] = trainer.parameters
    (Path(task.folder) / f"{rank}.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def bind(rank: int, ranks: int) -> None:
    """Keep this rank's threads, gloo's too, on its own share of the cores, if there are as many cores.

    Otherwise the scheduler has two ranks take turns on one core in some runs, which then take twice as long.
    """
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // ranks
    for thread in Path("/proc/self/task").iterdir() if share else ():
        os.sched_setaffinity(int(thread.name), cores[rank * share : (rank + 1) * share])


def train(task: Task, rank: int, trainer: Trainer) -> dict[str, Any]:
    """Take all steps; return their seconds, losses and norms."""
    losses: list[Any] = []
    norms: list[Any] = []

    def take(step: int) -> float:
        batch = task.samples(step, rank)
        began = time.perf_counter()
        losses.append(trainer.step(batch))
        synchronize(task)
        seconds = time.perf_counter() - began
        norms.append(trainer.norm())
        return seconds

    take(0)
    first = time.time() - task.began
    for step in range(1, task.warm_up):
        take(step)
    if task.saves:
        save(trainer, task.warm_up)  # the first one also allocates its buffers
        wait(trainer)
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    seconds = []
    for i in range(task.steps):
        seconds.append(take(task.warm_up + i))
        if task.saves and i % SAVE_EVERY == SAVE_EVERY // 2 - 1:
            save(trainer, task.warm_up + i + 1)
    wait(trainer)
    return {
        "first_step": first,
        "seconds": seconds,
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "losses": averaged(losses, task.device),
        "saved": len(list(Path(task.folder).glob("run/*/manifest.json"))),
        "norms": [None if norm is None else float(norm) for norm in norms],
    }


def save(trainer: Trainer, step: int) -> None:
    if trainer.save is None:
        raise RuntimeError("this library's arm has no saves")
    trainer.save(step)


def wait(trainer: Trainer) -> None:
    if trainer.wait is not None:
        trainer.wait()


def averaged(losses: list[Any], device: str) -> list[float]:
    """Return the losses averaged over the ranks, in fp64. Collective."""
    mine: Tensor = torch.tensor([float(loss) for loss in losses], dtype=torch.float64, device=device)
    dist.all_reduce(mine)
    return (mine / dist.get_world_size()).tolist()


def synchronize(task: Task) -> None:
    if task.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
