"""Arguments of `initialize` that DeepSpeed's scripts give besides the model, the data and the config."""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch.distributed as dist

from parallel import Topology
from uni3d.config import Config
from uni3d.config.strict import unique_keys
from uni3d.engine.grid import Grid

Given = str | Path | Mapping[str, Any]
"""A config: the path of a JSON file, its content, or the base64 of JSON."""


class FurtherArguments(TypedDict, total=False):
    """Arguments of `initialize` that few scripts give."""

    mpu: Any
    """Object with degrees and ranks, as Megatron's. Where the config has no degrees, they are these."""
    mesh_param: tuple[int, int] | None
    """`(dp, 1)`, likewise."""
    dist_init_required: bool | None
    """False if the process group must be there already."""
    distributed_port: int | None
    """Port of DeepSpeed's rendezvous. Without effect, as torchrun has its own."""


def decoded(config: Given) -> Given:
    """Return the content of a config that is the base64 of JSON, as launchers hand it on; others as given."""
    if not isinstance(config, str) or os.path.exists(config):  # pathlib raises for texts too long for a name
        return config
    try:
        text = base64.b64decode(config, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return config  # a path, which load_config will say can't be read
    if not text.lstrip().startswith("{"):
        return config
    try:
        content: dict[str, Any] = json.loads(text, object_pairs_hook=unique_keys)
    except ValueError as error:
        raise ValueError(f"the config in base64 is not valid JSON: {error}") from None
    return content


def check_further(given: FurtherArguments) -> None:
    """Check the names, and that there is a process group if the script says so.

    Raises:
        TypeError: a name is unknown.
        ValueError: there is no process group.
    """
    if unknown := sorted(given.keys() - FurtherArguments.__annotations__.keys()):
        raise TypeError(f"initialize() got unexpected arguments: {', '.join(unknown)}")
    if given.get("dist_init_required") is False and not dist.is_initialized():
        raise ValueError(
            "dist_init_required is False, but there is no process group; start it before initialize(), or "
            "leave dist_init_required out"
        )


def with_degrees(settings: Config, given: FurtherArguments, topology: Any = None) -> Config:
    """Return the config with the degrees of a topology, an `mpu` or a mesh, where it has none itself.

    Raises:
        ValueError: they contradict the config, or the mesh splits sequences.
    """
    degrees = {
        **_of_topology(topology),
        **_of_mesh(given.get("mesh_param")),
        **_of_mpu(given.get("mpu")),
    }
    section = settings.parallel
    for axis, (degree, source) in degrees.items():
        ours = getattr(section, axis)
        if axis in section.model_fields_set and ours not in (degree, "auto"):
            raise ValueError(
                f"{source} is {degree}, but the config has parallel.{axis} {ours}; leave one of them out, or "
                "let them agree"
            )
    if not degrees:
        return settings
    update = {axis: degree for axis, (degree, _) in degrees.items()}
    return settings.model_copy(update={"parallel": section.model_copy(update=update)})


def _of_topology(topology: Any) -> dict[str, tuple[int, str]]:
    if topology is None:
        return {}
    axes = {"pp": "pipe", "dp": "data", "tp": "model"}
    return {
        axis: (int(topology.get_dim(theirs)), f"the topology's {theirs}")
        for axis, theirs in axes.items()
        if theirs in topology.get_axis_names()
    }


def _of_mesh(mesh: Sequence[int] | None) -> dict[str, tuple[int, str]]:
    if mesh is None:
        return {}
    if len(mesh) != 2 or mesh[1] != 1:
        raise ValueError(
            f"mesh_param is {tuple(mesh)}; expected (data_parallel_size, 1): sequences aren't split over "
            "ranks of their own (see parallel.sequence_parallel)"
        )
    return {"dp": (int(mesh[0]), "mesh_param[0]")}


def _of_mpu(mpu: Any) -> dict[str, tuple[int, str]]:
    """Return the degrees that an `mpu` tells. Old ones know no pipeline: their model parallelism is tp."""
    if mpu is None:
        return {}
    names = {
        "pp": ("get_pipeline_model_parallel_world_size", "get_pipe_parallel_world_size"),
        "dp": ("get_data_parallel_world_size",),
        "tp": (
            "get_tensor_model_parallel_world_size",
            "get_slice_parallel_world_size",
            "get_model_parallel_world_size",
        ),
    }
    found: dict[str, tuple[int, str]] = {}
    for axis, methods in names.items():
        name = next((name for name in methods if hasattr(mpu, name)), None)
        if name is not None:
            found[axis] = int(getattr(mpu, name)()), f"mpu.{name}()"
    if "tp" not in found or "dp" not in found:
        raise ValueError(
            f"mpu is a {type(mpu).__name__} without get_model_parallel_world_size() or "
            "get_data_parallel_world_size(); leave it out, and set parallel.tp and parallel.pp in the config"
        )
    return found


def check_mpu(mpu: Any, topology: Topology) -> None:
    """Check that an `mpu` numbers the ranks as the topology does. Collective if there is one.

    Raises:
        ValueError: it doesn't; the same on all ranks.
    """
    if mpu is None:
        return
    grid, reason = Grid(topology), None
    for axis in ("pipeline_model", "pipe", "data", "tensor_model", "slice"):
        name = f"get_{axis}_parallel_rank"
        if hasattr(mpu, name) and (given := getattr(mpu, name)()) != (ours := getattr(grid, name)()):
            reason = f"mpu.{name}() is {given} on rank {topology.rank}, which has place {ours}"
    reasons: list[str | None] = [None] * topology.world_size
    dist.all_gather_object(reasons, reason)
    if first := next(filter(None, reasons), None):
        raise ValueError(f"{first}: ranks are numbered tp first, then dp, then pp; let the mpu do so too")
