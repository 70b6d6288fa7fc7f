"""FLOPs by module, counted in a forward pass of a global batch on any topology. See `uni3d.observe.flops`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf, prod
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from parallel import HostComm, ParallelModel
from parallel.tensors import named_parameters
from uni3d.config.sections import FlopsProfilerConfig
from uni3d.observe.flops import TRAINING

aten = torch.ops.aten


@dataclass(frozen=True)
class Profile:
    """FLOPs and parameters by module, over all ranks."""

    flops: dict[str, float]
    """Forward FLOPs of a global batch by module, with its submodules'; "" is the whole model."""
    parameters: dict[str, int]
    """Number of parameters by module, likewise."""

    @property
    def forward(self) -> float:
        """Forward FLOPs of the whole model."""
        return self.flops[""]


def measure(model: ParallelModel, comm: HostComm, forward: Callable[[], Any], times: int = 1) -> Profile:
    """Collective: run `forward`, this rank's forward passes, and count; a step runs it `times` times.

    Each tensor-parallel rank computes the modules that aren't split, and they are counted on each.
    """
    counter = _Counter(display=False, custom_mapping=_ON_CPU)
    known = {module: name for name, module in model.module.named_modules() if name}
    # The tracker's own names start at the module that is run; a pipeline's stages would all start at 0.
    counter.mod_tracker._get_mod_name = lambda m: known.get(m, "around")  # type: ignore[method-assign]
    with counter:
        forward()
    paths = {"Global": "", **{name: name for name in known.values()}}
    counts = {
        paths[name]: times * float(sum(by_operation.values()))
        for name, by_operation in counter.get_flop_counts().items()
        if name in paths
    }
    owned = {n: p.numel() for n, p in named_parameters(model.module) if n not in model.tied.copies}
    speaks = model.topology.speaks_for_stage
    parameters: dict[str, int] = defaultdict(int)
    for name, size in owned.items() if speaks else ():
        for path in _above(name):
            parameters[path] += size
    return comm.all_reduce(Profile(counts, dict(parameters)), _added)


def _added(parts: list[Profile]) -> Profile:
    flops: dict[str, float] = defaultdict(float)
    parameters: dict[str, int] = defaultdict(int)
    for part in parts:
        for path, count in part.flops.items():
            flops[path] += count
        for path, size in part.parameters.items():
            parameters[path] += size
    return Profile(dict(flops), dict(parameters))


class _Counter(FlopCounterMode):
    """Counter that divides the FLOPs of DTensors by their ranks: torch's counts the whole product on each."""

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        whole = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, DTensor)), None)
        if whole is None or func_packet not in self.flop_registry:
            return super()._count_flops(func_packet, out, args, kwargs)  # type: ignore[no-untyped-call]
        flops = self.flop_registry[func_packet](*args, **kwargs, out_val=out)
        for parent in set(self.mod_tracker.parents):
            self.flop_counts[parent][func_packet] += flops / whole.device_mesh.size()
        return out


def table(profile: Profile, config: FlopsProfilerConfig) -> list[str]:
    """Return the profile as printed lines."""
    total = profile.forward
    hardware = total * (TRAINING + config.recompute_fwd_factor)
    lines = [
        f"model FLOPs of a step: {_short(TRAINING * total)} (forward {_short(total)} x {TRAINING}); "
        f"computed with recomputation: {_short(hardware)}",
        f"{'parameters':>14} {'forward FLOPs':>14} {'share':>6}  module",
    ]
    for path in _shown(profile, config):
        flops = profile.flops.get(path, 0.0)
        share = flops / total if total else 0.0
        indent = "  " * _depth(path)
        name = path or "the whole"
        lines.append(
            f"{profile.parameters.get(path, 0):>14,} {_short(flops):>14} {share:>6.1%}  {indent}{name}"
        )
    return lines


def _shown(profile: Profile, config: FlopsProfilerConfig) -> Iterable[str]:
    deepest = inf if config.module_depth < 0 else config.module_depth
    paths = [path for path in sorted(profile.flops, key=_natural) if _depth(path) <= deepest]
    if config.detailed:
        return paths
    best: dict[int, list[str]] = defaultdict(list)
    for path in sorted(paths, key=lambda p: -profile.flops[p]):
        best[_depth(path)].append(path)
    return [path for depth in sorted(best) for path in best[depth][: config.top_modules]]


def _above(name: str) -> list[str]:
    """Return the paths of the modules that contain the parameter `name`."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:n]) for n in range(len(parts) + 1)]


def _depth(path: str) -> int:
    return len(path.split(".")) if path else 0


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".") if part]


def _short(flops: float) -> str:
    for unit in ("", "K", "M", "G", "T", "P"):
        if flops < 1000:
            return f"{flops:.3g} {unit}"
        flops /= 1000
    return f"{flops:.3g} E"


def _attention(query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    """Return the FLOPs of two full products; shapes are (batch, heads, positions, width)."""
    return 2 * prod(query[:3]) * key[2] * (query[3] + value[3])


_ON_CPU = {aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""Operators that torch's counter has no formula for."""
