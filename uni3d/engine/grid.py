"""Places of ranks by the names that DeepSpeed and Megatron give them."""

from __future__ import annotations

import torch.distributed as dist

from parallel import Topology


class Grid:
    """This rank's places and groups, as an `mpu` has them, and DeepSpeed's grid of a pipeline.

    "Slice" and "tensor model parallel" are tensor parallelism; "model parallel" is all that shares a copy of
    the model, so tensor and pipeline parallelism together. The first call that asks for the group of several
    mesh axes makes it, on all ranks.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        degrees = topology.degrees
        self.global_rank, self.world_size = topology.rank, topology.world_size
        self.stage_id, self.data_parallel_id = topology.pp_rank, topology.dp_rank
        self.pipe_parallel_size, self.data_parallel_size = degrees.pp, degrees.dp
        self.model_parallel_size = self.slice_parallel_size = degrees.tp  # of DeepSpeed's axis "model"
        self.is_first_stage = topology.pp_rank == 0
        self.is_last_stage = topology.pp_rank == degrees.pp - 1

    def get_global_rank(self) -> int:
        return self.global_rank

    # --- data parallelism ------------------------------------------------------------------------------

    def get_data_parallel_rank(self) -> int:
        return self._topology.dp_rank

    get_data_parallel_id = get_data_parallel_rank

    def get_data_parallel_world_size(self) -> int:
        return self._topology.degrees.dp

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._topology.group("replicate", "shard")

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_data_parallel_src_rank(self) -> int:
        return self.get_data_parallel_group_ranks()[0]

    # --- pipeline --------------------------------------------------------------------------------------

    def get_pipe_parallel_rank(self) -> int:
        return self._topology.pp_rank

    get_stage_id = get_pipeline_model_parallel_rank = get_pipe_parallel_rank

    def get_pipe_parallel_world_size(self) -> int:
        return self._topology.degrees.pp

    get_pipeline_model_parallel_world_size = get_pipe_parallel_world_size

    def get_pipe_parallel_group(self) -> dist.ProcessGroup:
        return self._topology.pp_group

    get_pipeline_model_parallel_group = get_pipe_parallel_group

    def stage_to_global(self, stage_id: int, data: int | None = None, model: int | None = None) -> int:
        """Return the global rank at a place of the pipeline, by default beside this rank."""
        topology = self._topology
        places = topology.mesh.mesh.reshape(topology.degrees.pp, topology.degrees.dp, topology.degrees.tp)
        at = (
            stage_id,
            topology.dp_rank if data is None else data,
            topology.tp_rank if model is None else model,
        )
        return int(places[at])

    # --- tensor parallelism ----------------------------------------------------------------------------

    def get_tensor_model_parallel_rank(self) -> int:
        return self._topology.tp_rank

    get_slice_parallel_rank = get_tensor_model_parallel_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._topology.degrees.tp

    get_slice_parallel_world_size = get_tensor_model_parallel_world_size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._topology.group("tp")

    get_slice_parallel_group = get_tensor_model_parallel_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_process_group_ranks(self.get_tensor_model_parallel_group())[0]

    # --- both ------------------------------------------------------------------------------------------

    def get_model_parallel_rank(self) -> int:
        return self._topology.pp_rank * self._topology.degrees.tp + self._topology.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._topology.degrees.pp * self._topology.degrees.tp

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._topology.group("pp", "tp")

    def get_model_parallel_src_rank(self) -> int:
        return dist.get_process_group_ranks(self.get_model_parallel_group())[0]
