"""`uni3d plan`: estimate the memory, traffic and checkpoints of a training job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from uni3d.cli.terminal import AsJson, answer
from uni3d.units import BYTES, COUNTS, FLOPS, RATES, parse

if TYPE_CHECKING:
    from parallel.degrees import Ranks
    from uni3d.estimate.gpt import GPTShape
    from uni3d.estimate.job import Job
    from uni3d.estimate.step import Machine

Size = Annotated[int | None, Option(help="Size of the model.", show_default="from --params")]


def plan(
    config: Annotated[
        Path | None, Argument(help="JSON with model, seq_len and uni3d, as in examples/megatron_gpt/configs.")
    ] = None,
    world_size: Annotated[int | None, Option(help="Number of ranks.", show_default="pp x dp x tp")] = None,
    params: Annotated[str | None, Option(help="Approximate number of parameters, e.g. 70e9 or 70B.")] = None,
    pp: Annotated[int | None, Option(help="Pipeline stages.", show_default="the config's, else 1")] = None,
    dp: Annotated[
        int | None, Option(help="Data-parallel ranks.", show_default="world size / (pp x tp)")
    ] = None,
    tp: Annotated[
        int | None, Option(help="Tensor-parallel ranks.", show_default="the config's, else 1")
    ] = None,
    zero: Annotated[
        int | None, Option(help="ZeRO stage, 0 to 3.", show_default="the config's, else 1")
    ] = None,
    layers: Size = None,
    hidden: Size = None,
    heads: Size = None,
    kv_heads: Size = None,
    ffn: Size = None,
    vocab: Annotated[int | None, Option(help="Size of the vocabulary.", show_default="32000")] = None,
    seq_len: Annotated[
        int | None, Option(help="Tokens per sample.", show_default="the config's, else 4096")
    ] = None,
    micro_batch: Annotated[
        int | None, Option(help="Samples per micro batch and rank.", show_default="the config's, else 1")
    ] = None,
    accumulation: Annotated[
        int | None, Option(help="Micro batches per step and rank.", show_default="the config's, else 4 x pp")
    ] = None,
    precision: Annotated[
        str | None, Option(help="fp32, bf16 or fp16.", show_default="the config's, else bf16")
    ] = None,
    recompute: Annotated[
        str | None,
        Option(
            help="Activation checkpointing: none, full or selective.", show_default="the config's, else none"
        ),
    ] = None,
    memory: Annotated[
        str | None, Option(help="Memory per rank, e.g. 80GiB: also list topologies that fit in it.")
    ] = None,
    device: Annotated[str, Option(help="cuda or cpu; their kernels save different activations.")] = "cuda",
    flops: Annotated[
        str, Option(help="Model FLOP/s that a rank achieves on one node, without recomputation.")
    ] = "460TFLOP/s",
    fast_link: Annotated[str, Option(help="Bandwidth of a rank within its node.")] = "360GB/s",
    slow_link: Annotated[str, Option(help="Bandwidth of a rank between nodes.")] = "40GB/s",
    states: Annotated[
        str, Option(help="Arrays in the checkpoint for each parameter, in its shape and float32.")
    ] = "fp32,exp_avg,exp_avg_sq",
    bandwidth: Annotated[
        str, Option(help="Write bandwidth of each node to storage, with all nodes writing.")
    ] = "2GB/s",
    file_rate: Annotated[
        float, Option(help="Files that the storage makes in a second, for all nodes together.")
    ] = 5000,
    ranks_per_node: Annotated[int, Option(help="Ranks per node; consecutive ranks share a node.")] = 8,
    memory_bandwidth: Annotated[str, Option(help="Copy bandwidth of each rank to host memory.")] = "10GB/s",
    as_json: AsJson = False,
) -> None:
    """Estimate the memory, traffic, speed and checkpoints of training a GPT.

    Starts no ranks. Reports memory per rank, pipeline bubble and bytes sent per step; and for a save its
    files, bytes per rank and time. The model is the one in CONFIG or, with --params or sizes, a Llama-like
    GPT whose proportions default to those of Llama 2 70B. --memory also lists the topologies that fit,
    fastest first. Default rates are those of H100s in published runs.
    """
    from uni3d.cli.plan_report import lines_of, row_of

    rates = {
        "bandwidth_per_node": parse(bandwidth, RATES, "--bandwidth", "2GB/s or 500MiB/s"),
        "memory_bandwidth_per_rank": parse(
            memory_bandwidth, RATES, "--memory-bandwidth", "2GB/s or 500MiB/s"
        ),
        "files_per_second": file_rate,
    }
    if not 0 < file_rate < float("inf"):
        raise ValueError(f"--file-rate {file_rate:g}: expected a positive number")
    machine = _machine(flops, fast_link, slow_link, ranks_per_node)
    limit = None if memory is None else parse(memory, BYTES, "--memory", "80GiB or 80GB")
    names = _names(states)
    asked = None if params is None else round(parse(params, COUNTS, "--params", "70e9 or 70B"))
    sizes = _given(layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn, vocab=vocab)
    degrees = {"pp": pp, "dp": dp, "tp": tp, "zero": zero, "world_size": world_size}
    batches = _given(seq_len=seq_len, micro_batch=micro_batch, accumulation=accumulation)
    settings = batches | _given(precision=precision, recompute=recompute, device=device)
    job = _job(config, asked, sizes, degrees, settings)
    row = row_of(job, machine, names, rates, asked=asked, limit=limit)
    answer(row, lines_of(row, str(job.shape), bandwidth, memory_bandwidth, flops), as_json)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _machine(flops: str, fast_link: str, slow_link: str, ranks_per_node: int) -> Machine:
    from uni3d.estimate.step import Machine

    if ranks_per_node < 1:
        raise ValueError(f"--ranks-per-node {ranks_per_node} must be at least 1")
    return Machine(
        flops=parse(flops, FLOPS, "--flops", "460TFLOP/s"),
        inside=parse(fast_link, RATES, "--fast-link", "360GB/s"),
        between=parse(slow_link, RATES, "--slow-link", "40GB/s"),
        ranks_per_node=ranks_per_node,
    )


def _job(
    path: Path | None,
    asked: int | None,
    sizes: Mapping[str, int],
    degrees: Mapping[str, int | None],
    given: Mapping[str, Any],
) -> Job:
    """Return the job that the options describe, with the config's settings for those left out."""
    from uni3d.config import load_config
    from uni3d.estimate.gpt import derive, from_model_config
    from uni3d.estimate.job import Job, read_document, settings_of

    if path is None:
        shape: GPTShape = derive(asked, **sizes)
        ranks = _ranks({"pp": 1, "dp": "auto", "tp": 1}, degrees, zero=1)
        settings = {"seq_len": 4096, "micro_batch": 1, "accumulation": 4 * ranks.pp, **given}
        return Job(shape=shape, ranks=ranks, **settings)
    doubled = [f"--{n.replace('_', '-')}" for n in _given(params=asked, **sizes)]
    if doubled:
        raise ValueError(f"{doubled[0]} and {path} both describe the model; leave one out")
    document = read_document(path)
    config = load_config(document["uni3d"])
    axes = config.parallel.model_dump(include={"pp", "dp", "tp"})
    ranks = _ranks(axes, degrees, zero=config.zero_optimization.stage)
    settings = {"seq_len": document["seq_len"], **settings_of(config, ranks.dp), **given}
    return Job(shape=from_model_config(document["model"]), ranks=ranks, **settings)


def _ranks(known: Mapping[str, Any], given: Mapping[str, int | None], zero: int) -> Ranks:
    """Return the degrees given as options, else the config's, resolving "auto" by the world size."""
    from parallel.degrees import Ranks, resolve_degrees

    wanted: dict[str, Any] = {axis: _or(given[axis], known[axis]) for axis in ("pp", "dp", "tp")}
    return Ranks(**vars(resolve_degrees(given["world_size"], **wanted)), zero=_or(given["zero"], zero))


def _or(value: int | None, default: Any) -> Any:
    return default if value is None else value


def _names(states: str) -> list[str]:
    names = states.split(",")
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"--states {states} must be distinct names separated by commas, e.g. fp32,exp_avg")
    return names
