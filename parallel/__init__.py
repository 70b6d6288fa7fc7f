"""Data, tensor and pipeline parallelism with ZeRO sharding, on torch.distributed.

Rules, which load no torch:

    degrees           parallel degrees and the number of ranks
    settings          settings of `build`
    combinations      settings that can't be combined, and why
    placement         where a chain of layers is cut into stages, and which rank runs which
    tp_styles         tensor-parallel styles: what they cut, which degrees they take

The parallel model:

    parallelize       `build`: from a plain model to this rank's part of it
    found_model       a model that another trainer has sharded, read off its tensors
    flat_parameters   FSDP1's slices of flat tensors, and their parts by rows
    topology          the ranks on a mesh (pp, replicate, shard, tp)
    tensor            a model's `tp_plan` applied as DTensor styles
    plan_checks       what a plan would compute wrongly without an error
    packed, experts   fused projections, rows for each head; stacked experts
    replica_check     parameters outside the `tp_plan`: whether their gradients agree
    stages            a model's layers, split into pipeline stages
    pipeline, pipeline_stage  torch's pipeline schedules and stages, told about ZeRO
    loss              losses that add up over micro batches and ranks
    spans             parts of a step, for those who time them
    zero              ZeRO stages 0-3 as settings of `fully_shard`
    mixed_precision   types of computing and of sums, as `fully_shard` takes them
    reducer, gatherer  gradients reduced in one order (stages 0-2); layers gathered one by one (stage 3)
    part_hooks        layers gathered also when their parts are called without them
    fsdp_internals    the private parts of `fully_shard` in use
    agreement         whether the ranks ran what they must run alike
    parameter_hooks   hooks and attributes that a script has put on parameters
    parameter_watch   changes of parameters that sharding would lose
    state_dicts       `state_dict` of a sharded module, with whole tensors
    layers            repeated layers, the units of sharding
    activation_checkpointing  recomputing activations; compilation
    meta              models on the meta device, with buffers that have values
    values            values of a model that was built whole, handed out in parts
    weights           initial weights and fp32 masters, the same on every topology
    initial_weights, recorded_init  initial weights in tiles; what `init_parameter` does to one
    ties              tied weights and the sum of their gradients
    gradients         the global norm, clipping
    sums              sums of gradients that `fully_shard` would make in more steps
    dtensor_layout    which part of a tensor each rank of a stage holds
    tensors           a sharded module's tensors by name, and gathered
    gathered          sharded parameters made whole for a while, the same objects
    failures          errors of other ranks
    host_comm, routes  collectives between CPUs, apart from training's; who talks to whom
    arrivals           ranks that agree on a part of a store that others may have used
    gloo_calls         its thread's calls, and the end of its connections
    parcels            bytes on their way there
    liveness           signs of life, by which a slow rank is told apart from one that is gone
    store_calls        calls of the rendezvous store that don't wait for ever

This package knows nothing of files, configs or engines. Importing it loads no torch: each public name is
imported from its module when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel.combinations import check_micro_batches
    from parallel.degrees import Degrees, Ranks, resolve_degrees
    from parallel.failures import Failures, RankFailedError
    from parallel.host_comm import HostComm
    from parallel.meta import meta_parameters
    from parallel.parallelize import ParallelModel, build
    from parallel.settings import Compile, Precision, Recompute, Settings
    from parallel.topology import Topology, start_process_group

__all__ = [
    "Compile",
    "Degrees",
    "Failures",
    "HostComm",
    "ParallelModel",
    "Precision",
    "RankFailedError",
    "Ranks",
    "Recompute",
    "Settings",
    "Topology",
    "build",
    "check_micro_batches",
    "meta_parameters",
    "resolve_degrees",
    "start_process_group",
]

_NAMES = {
    "combinations": ["check_micro_batches"],
    "degrees": ["Degrees", "Ranks", "resolve_degrees"],
    "failures": ["Failures", "RankFailedError"],
    "host_comm": ["HostComm"],
    "meta": ["meta_parameters"],
    "parallelize": ["ParallelModel", "build"],
    "settings": ["Compile", "Precision", "Recompute", "Settings"],
    "topology": ["Topology", "start_process_group"],
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'parallel' has no attribute {name!r}")
    value = getattr(import_module(f"parallel.{_HOME[name]}"), name)
    globals()[name] = value
    return value
