"""Data, tensor and pipeline parallelism with ZeRO sharding, on torch.distributed.

    Topology          the ranks on a mesh (pp, replicate, shard, tp); made once and handed on
    settings          what `build` is told beside the model and the topology
    stages, placement, pipeline, torch_stage  a model that is a chain of layers, cut into stages, which are
                      placed on ranks and run by torch's schedules
    combinations      what can't be combined, and why
    blocks            the layers that repeat: gathered one by one, recomputed, compiled
    tensor, replicas  a model's `tp_plan` applied as DTensor styles; whether it left out what it shouldn't
    zero, records     ZeRO stages 0-3 as settings of `fully_shard`; what is used of its private records
    masters           fp32 parameters, of whatever type a model came with
    experts           stacked experts under tensor parallelism
    weights           initial values that don't depend on the topology
    gradients         tied weights, the global norm
    layout            which part of a tensor this rank and the others of its stage hold
    names             a module's parameters and buffers by name
    failures          what the others are told when a rank fails
    whole             a sharded module's tensors as wholes
    comm              values between the ranks' CPUs, apart from training's collectives

This package knows nothing of files, configs or engines.
"""

from parallel.combinations import check_micro_batches
from parallel.failures import Failures, RankFailedError
from parallel.host_comm import HostComm
from parallel.parallelize import ParallelModel, build
from parallel.settings import Compile, Precision, Recompute, Settings
from parallel.topology import Degrees, Topology, resolve_degrees, start_process_group

__all__ = [
    "Compile",
    "Degrees",
    "Failures",
    "HostComm",
    "ParallelModel",
    "Precision",
    "RankFailedError",
    "Recompute",
    "Settings",
    "Topology",
    "build",
    "check_micro_batches",
    "resolve_degrees",
    "start_process_group",
]
