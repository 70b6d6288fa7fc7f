"""`deepspeed.utils.groups`: the process groups of the engine that was initialized last.

Before there is one, all ranks are data-parallel, as in DeepSpeed.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from uni3d.deepspeed.engines import newest


def _group(*axes: str) -> Any:
    """Return this rank's group along the axes of the newest engine's mesh."""
    engine = newest()
    if engine is None:
        return dist.group.WORLD
    mesh = engine.model.topology.mesh
    if all(mesh[axis].size() == 1 for axis in set(mesh.mesh_dim_names) - set(axes)):
        return dist.group.WORLD
    wide = [axis for axis in axes if mesh[axis].size() > 1]
    if len(wide) <= 1:
        return mesh.get_group(wide[0] if wide else axes[0])
    raise RuntimeError(
        f"there is no one process group over the axes {' and '.join(wide)} (a shard group that is smaller "
        "than dp splits the data-parallel ranks); use engine.model.topology.mesh"
    )


def get_data_parallel_group() -> Any:
    return _group("replicate", "shard")


def get_data_parallel_world_size() -> int:
    engine = newest()
    return dist.get_world_size() if engine is None else int(engine.model.topology.degrees.dp)


def get_data_parallel_rank() -> int:
    engine = newest()
    return dist.get_rank() if engine is None else int(engine.model.topology.dp_rank)


def get_tensor_model_parallel_group() -> Any:
    if newest() is None:
        raise RuntimeError("tensor-parallel groups are made by initialize(), which wasn't called yet")
    return newest().model.topology.mesh.get_group("tp")


def get_tensor_model_parallel_world_size() -> int:
    return 1 if newest() is None else int(newest().model.topology.degrees.tp)


def get_tensor_model_parallel_rank() -> int:
    return 0 if newest() is None else int(newest().model.topology.tp_rank)


def get_tensor_model_parallel_src_rank() -> int:
    """Return the first rank of this rank's tensor-parallel group."""
    return dist.get_rank() if newest() is None else dist.get_global_rank(get_tensor_model_parallel_group(), 0)
