"""The command that plans a training job and its checkpoints on paper."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uni3d.cli.terminal import AsJson, say, say_json

if TYPE_CHECKING:
    from parallel.degrees import Ranks
    from uni3d.estimate.gpt import GPTShape
    from uni3d.estimate.job import Job

_COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_BYTES = {"": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12} | {
    f"{letter}iB": 2.0 ** (10 * power) for power, letter in enumerate("KMGT", start=1)
}
_RATES = _BYTES | {f"{unit}/s": size for unit, size in _BYTES.items() if unit}
_FLOPS = {"": 1.0} | {f"{unit}FLOP/s": 10.0**power for unit, power in {"G": 9, "T": 12, "P": 15}.items()}

DEFAULTS: dict[str, Any] = {"seq_len": 4096, "micro_batch": 1}
"""Of a job without a config."""

Size = Annotated[int | None, typer.Option(show_default="from --params")]
Degree = Annotated[int | None, typer.Option(show_default="the config's, else 1")]
Setting = Annotated[str | None, typer.Option(show_default="the config's")]


def plan(
    config: Annotated[
        Path | None,
        typer.Argument(help="JSON with model, seq_len and uni3d, as in examples/megatron_gpt/configs."),
    ] = None,
    world_size: Annotated[
        int | None, typer.Option(help="How many ranks there are.", show_default="pp x dp x tp")
    ] = None,
    params: Annotated[
        str | None, typer.Option(help="About how many parameters, e.g. 70e9 or 70B; the shape follows.")
    ] = None,
    pp: Degree = None,
    dp: Annotated[
        int | None, typer.Option(help="Data-parallel copies.", show_default="what --world-size leaves")
    ] = None,
    tp: Degree = None,
    zero: Annotated[
        int | None, typer.Option(help="ZeRO stage, 0 to 3.", show_default="the config's, else 1")
    ] = None,
    layers: Size = None,
    hidden: Size = None,
    heads: Size = None,
    kv_heads: Size = None,
    ffn: Size = None,
    vocab: Annotated[int | None, typer.Option(show_default="32000")] = None,
    seq_len: Annotated[int | None, typer.Option(show_default="the config's, else 4096")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Samples in one.", show_default="the config's, else 1")
    ] = None,
    accumulation: Annotated[
        int | None,
        typer.Option(help="Micro batches of a step on a rank.", show_default="the config's, else 4 x pp"),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16.", show_default="the config's, else bf16")
    ] = None,
    recompute: Annotated[
        str | None, typer.Option(help="none, full or selective.", show_default="the config's, else none")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Of a rank, e.g. 80GiB: propose topologies that fit it.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu, whose kernels keep different things.")] = "cuda",
    flops: Annotated[
        str, typer.Option(help="Of a rank, as the model gets them; for a step's time.")
    ] = "400TFLOP/s",
    fast_link: Annotated[str, typer.Option(help="Of a rank to others of its node.")] = "300GB/s",
    slow_link: Annotated[str, typer.Option(help="Of a rank to other nodes.")] = "50GB/s",
    states: Annotated[
        str, typer.Option(help="What a checkpoint has of each parameter, in its shape, as float32.")
    ] = "fp32,exp_avg,exp_avg_sq",
    bandwidth: Annotated[
        str, typer.Option(help="Of each node to the storage, all nodes writing at the same time.")
    ] = "2GB/s",
    ranks_per_node: Annotated[int, typer.Option(help="Ranks with consecutive numbers share a node.")] = 8,
    memory_bandwidth: Annotated[
        str, typer.Option(help="At which each rank copies its part to the host's memory.")
    ] = "10GB/s",
    as_json: AsJson = False,
) -> None:
    """What training a GPT takes and what its checkpoints write, on paper. Needs no ranks.

    Memory by rank, pipeline bubble, bytes sent in a step; files, bytes by rank, time of a save. The model is
    the config's; or, from --params or its sizes, a Llama-like GPT, by default with the proportions of Llama 2
    70B. With --memory, topologies for as many ranks that fit, quickest first.
    """
    from uni3d.cli.plan_report import checkpoint_row, lines, proposal_row, proposal_table, training_row
    from uni3d.estimate.save import on_paper
    from uni3d.estimate.search import Machine, judge, propose

    rates = {
        "bandwidth_per_node": number(bandwidth, _RATES, "--bandwidth", "2GB/s or 500MiB/s"),
        "memory_bandwidth_per_rank": number(
            memory_bandwidth, _RATES, "--memory-bandwidth", "10GB/s or 500MiB/s"
        ),
    }
    machine = Machine(
        flops=number(flops, _FLOPS, "--flops", "400TFLOP/s"),
        inside=number(fast_link, _RATES, "--fast-link", "300GB/s"),
        between=number(slow_link, _RATES, "--slow-link", "50GB/s"),
        ranks_per_node=ranks_per_node,
    )
    limit = None if memory is None else number(memory, _BYTES, "--memory", "80GiB or 80GB")
    if ranks_per_node < 1:
        raise ValueError(f"--ranks-per-node {ranks_per_node} must be at least 1")
    names = _names(states)
    asked = None if params is None else round(number(params, _COUNTS, "--params", "70e9 or 70B"))
    sizes = {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "ffn": ffn,
        "vocab": vocab,
    }
    settings = {
        "seq_len": seq_len,
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "precision": precision,
        "recompute": recompute,
        "device": device,
    }
    degrees = {"pp": pp, "dp": dp, "tp": tp, "zero": zero, "world_size": world_size}
    job = _job(config, asked, sizes, degrees, {k: v for k, v in settings.items() if v is not None})
    row = {
        "shape": vars(job.shape),
        "parameters": job.shape.parameters,
        "asked": asked,
        "ranks": {**vars(job.ranks), "total": job.ranks.total, "per_node": ranks_per_node},
        "training": training_row(judge(job, machine)),
        **checkpoint_row(on_paper(job.shape, job.ranks, names), names, rates, ranks_per_node),
    }
    proposals = None
    if limit is not None:
        proposals = propose(job, job.ranks.total, limit, machine)
        row["memory_limit"] = limit
        row["fits"] = proposals[0].need <= limit
        row["proposals"] = [proposal_row(proposal) for proposal in proposals]
    if as_json:
        say_json(row)
        return
    for label, text in lines(row, str(job.shape), bandwidth, memory_bandwidth, flops).items():
        say(f"{label:<10} {text}")
    if proposals is not None and limit is not None:
        proposal_table(proposals, limit)


def _job(
    path: Path | None,
    asked: int | None,
    sizes: Mapping[str, int | None],
    degrees: Mapping[str, int | None],
    given: Mapping[str, Any],
) -> Job:
    """The job that the options describe; what they leave out is the config's, if there is one."""
    from uni3d.estimate.gpt import derive
    from uni3d.estimate.job import Job, config_of, model_of, read_document, settings_of

    if path is None:
        shape: GPTShape = derive(asked, **sizes)
        ranks = _ranks({"pp": 1, "dp": "auto", "tp": 1}, degrees, zero=1)
        return Job(shape=shape, ranks=ranks, **{**DEFAULTS, "accumulation": 4 * ranks.pp, **given})
    doubled = [f"--{n.replace('_', '-')}" for n, v in {"params": asked, **sizes}.items() if v is not None]
    if doubled:
        raise ValueError(f"{doubled[0]} and {path} both say what the model is; leave one out")
    document = read_document(path)
    config = config_of(document)
    axes = config.parallel.model_dump(include={"pp", "dp", "tp"})
    ranks = _ranks(axes, degrees, zero=config.zero_optimization.stage)
    settings = {"seq_len": document["seq_len"], **settings_of(config, ranks.dp), **given}
    return Job(shape=model_of(document), ranks=ranks, **settings)


def _ranks(known: Mapping[str, Any], given: Mapping[str, int | None], zero: int) -> Ranks:
    """Return the options' degrees, or else the config's; "auto" takes what the world size leaves."""
    from parallel.degrees import Ranks, resolve_degrees

    wanted: dict[str, Any] = {axis: _or(given[axis], known[axis]) for axis in ("pp", "dp", "tp")}
    return Ranks(**vars(resolve_degrees(given["world_size"], **wanted)), zero=_or(given["zero"], zero))


def _or(value: int | None, default: Any) -> Any:
    return default if value is None else value


def _names(states: str) -> list[str]:
    names = states.split(",")
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"--states {states} must be different names with commas between, e.g. fp32,exp_avg")
    return names


def number(text: str, units: Mapping[str, float], option: str, examples: str) -> float:
    """What `text` says, in units of 1.

    Raises:
        ValueError: it isn't a number above 0 with one of `units`.
    """
    match = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?) ?([A-Za-z/]*)", text)
    try:
        value = float(match[1]) * units[match[2]] if match else 0.0
    except (ValueError, KeyError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{option} {text} isn't a number above 0 with a known unit; write {examples}")
    return value
