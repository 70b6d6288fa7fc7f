"""The command that plans a checkpoint on paper."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uni3d.terminal import AsJson, in_bytes, say, say_json

if TYPE_CHECKING:
    from uni3d.paper import Figures

_COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_BYTES = {"": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12} | {
    f"{letter}iB": 2.0 ** (10 * power) for power, letter in enumerate("KMGT", start=1)
}
_RATES = _BYTES | {f"{unit}/s": size for unit, size in _BYTES.items() if unit}

Size = Annotated[int | None, typer.Option(show_default="from --params")]


def plan(
    params: Annotated[
        str | None, typer.Option(help="About how many parameters, e.g. 70e9 or 70B; the shape follows.")
    ] = None,
    pp: Annotated[int, typer.Option(help="Pipeline stages.")] = 1,
    dp: Annotated[int, typer.Option(help="Data-parallel copies.")] = 1,
    tp: Annotated[int, typer.Option(help="Tensor-parallel parts.")] = 1,
    zero: Annotated[int, typer.Option(help="ZeRO stage, 0 to 3.")] = 1,
    layers: Size = None,
    hidden: Size = None,
    heads: Size = None,
    kv_heads: Size = None,
    ffn: Size = None,
    vocab: Annotated[int | None, typer.Option(show_default="32000")] = None,
    states: Annotated[
        str, typer.Option(help="What is kept of each parameter, in its shape, as float32.")
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
    """What a save of a GPT would write, on paper: files, bytes by rank, time. Needs no ranks.

    The model is a Llama-like GPT, by default with the proportions of Llama 2 70B.
    """
    from uni3d.paper import Ranks, on_paper
    from uni3d.shape import derive

    asked = None if params is None else round(_number(params, _COUNTS, "--params", "70e9 or 70B"))
    rate = _number(bandwidth, _RATES, "--bandwidth", "2GB/s or 500MiB/s")
    memory_rate = _number(memory_bandwidth, _RATES, "--memory-bandwidth", "10GB/s or 500MiB/s")
    if ranks_per_node < 1:
        raise ValueError(f"--ranks-per-node {ranks_per_node} must be at least 1")
    names = _names(states)
    shape = derive(asked, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn, vocab=vocab)
    ranks = Ranks(pp=pp, dp=dp, tp=tp, zero=zero)
    figures = on_paper(shape, ranks, names)
    row = {
        "shape": vars(shape),
        "parameters": figures.parameters,
        "asked": asked,
        "ranks": {**vars(ranks), "total": ranks.total, "per_node": ranks_per_node},
        "states": names,
        **_figures(figures),
        "bandwidth_per_node": rate,
        "save_seconds": figures.save_seconds(rate, ranks_per_node),
        "memory_bandwidth_per_rank": memory_rate,
        "stall_seconds": figures.stall_seconds(memory_rate),
    }
    if as_json:
        say_json(row)
        return
    for label, text in _lines(row, str(shape), bandwidth, memory_bandwidth).items():
        say(f"{label:<10} {text}")


def _names(states: str) -> list[str]:
    names = states.split(",")
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"--states {states} must be different names with commas between, e.g. fp32,exp_avg")
    return names


def _figures(figures: Figures) -> dict[str, Any]:
    return {
        "arrays": figures.arrays,
        "files": figures.chunks + figures.documents,
        "chunks": figures.chunks,
        "bytes": sum(figures.written),
        "bytes_by_rank": _spread(figures.written),
        "balance": figures.balance,
        "gathered": {
            "bytes_sent": figures.sent,
            "exchanges": figures.exchanges,
            "largest_received_bytes": figures.largest_received,
        },
        "manifest_bytes": figures.manifest,
        "snapshot_bytes_by_rank": _spread(figures.snapshot),
    }


def _spread(values: list[int]) -> dict[str, float]:
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}


def _lines(row: Mapping[str, Any], shape: str, bandwidth: str, memory_bandwidth: str) -> dict[str, str]:
    ranks, gathered = row["ranks"], row["gathered"]
    asked = f" ({row['asked']:,} were asked for)" if row["asked"] is not None else ""
    axes = ", ".join(f"{axis} {ranks[axis]}" for axis in ("pp", "dp", "tp"))
    nodes = -(-ranks["total"] // ranks["per_node"])
    exchanged = "nothing has to be sent between ranks"
    if gathered["exchanges"]:
        exchanged = (
            f"{in_bytes(gathered['bytes_sent'])} sent between ranks in {gathered['exchanges']} exchanges; "
            f"at most {in_bytes(gathered['largest_received_bytes'])} to one rank at a time"
        )

    def spread(values: Mapping[str, float]) -> str:
        return f"{' / '.join(in_bytes(values[k]) for k in ('min', 'mean', 'max'))} (min / mean / max)"

    return {
        "model": shape,
        "parameters": f"{row['parameters']:,}{asked}",
        "ranks": f"{ranks['total']:,}: {axes}, ZeRO {ranks['zero']}",
        "arrays": f"{row['arrays']:,}, float32: {', '.join(row['states'])} of each parameter",
        "files": f"{row['files']:,}: {row['chunks']:,} chunks, {row['files'] - row['chunks']:,} of metadata",
        "bytes": f"{row['bytes']:,} ({in_bytes(row['bytes'])}); "
        f"the manifest about {in_bytes(row['manifest_bytes'])} more",
        "by rank": f"{spread(row['bytes_by_rank'])}; balance {row['balance']:.2f} (max / mean)",
        "gathered": exchanged,
        "snapshot": f"{spread(row['snapshot_bytes_by_rank'])} of each rank's host memory",
        "save": f"{_seconds(row['save_seconds'])} if each of {nodes:,} nodes writes {bandwidth} at once: "
        "the slowest node's files, then the manifest (without the exchanges)",
        "stall": f"{_seconds(row['stall_seconds'])} if each rank copies {memory_bandwidth}: the snapshot, "
        "all that training waits for in an asynchronous save",
    }


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _number(text: str, units: Mapping[str, float], option: str, examples: str) -> float:
    match = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?) ?([A-Za-z/]*)", text)
    try:
        value = float(match[1]) * units[match[2]] if match else 0.0
    except (ValueError, KeyError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{option} {text} isn't a number above 0 with a known unit; write {examples}")
    return value
