"""Report of `uni3d plan`, as JSON and as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from uni3d.estimate.job import Job
from uni3d.estimate.memory import Memory, memory
from uni3d.estimate.save import Figures, on_paper
from uni3d.estimate.search import Proposal, judge, propose
from uni3d.estimate.step import ERROR, Machine
from uni3d.units import format_bytes

SHOWN = 10
"""Maximum of proposals in the table; JSON has all."""


def row_of(
    job: Job,
    machine: Machine,
    states: Sequence[str],
    rates: Mapping[str, float],
    *,
    asked: int | None,
    limit: float | None,
) -> dict[str, Any]:
    """Return figures of a job: its training, its checkpoints, the topologies that fit in `limit` bytes."""
    nodes = machine.ranks_per_node
    row = {
        "shape": vars(job.shape),
        "parameters": job.shape.parameters,
        "asked": asked,
        "ranks": {**vars(job.ranks), "total": job.ranks.total, "per_node": nodes},
        "training": _training_row(judge(job, machine)),
        **_checkpoint_row(on_paper(job.shape, job.ranks, states), states, rates, nodes),
    }
    if limit is not None:
        proposals = propose(job, job.ranks.total, limit, machine)
        row["memory_limit"] = limit
        row["fits"] = proposals[0].need <= limit
        row["proposals"] = [_proposal_row(proposal) for proposal in proposals]
    return row


def lines_of(
    row: Mapping[str, Any], shape: str, bandwidth: str, memory_bandwidth: str, flops: str
) -> Iterator[str]:
    """Yield the model, training and save, one labelled line each, then a table of the proposals."""
    ranks = row["ranks"]
    asked = "" if row["asked"] is None else f" ({row['asked']:,} requested)"
    axes = ", ".join(f"{axis} {ranks[axis]}" for axis in ("pp", "dp", "tp"))
    labelled = {
        "model": shape,
        "parameters": f"{row['parameters']:,}{asked}",
        "ranks": f"{ranks['total']:,}: {axes}, ZeRO {ranks['zero']}",
        **_training_lines(row["training"], ranks, flops),
        **_checkpoint_lines(row, bandwidth, memory_bandwidth),
    }
    yield from (f"{label:<10} {text}" for label, text in labelled.items())
    if "proposals" in row:
        yield from _proposal_table(row["proposals"], row["memory_limit"])


def _training_row(planned: Proposal) -> dict[str, Any]:
    """Return the figures of training."""
    job = planned.job
    return {
        **_settings(planned),
        "sequence_length": job.seq_len,
        "tokens_per_step": job.batch * job.seq_len,
        "precision": job.precision,
        "schedule": job.order,
        "virtual_stages": job.virtual_stages,
        "device": job.device,
        "memory_by_stage": [
            {
                "stage": stage.rank,
                "links": list(stage.links),
                "micro_batches_in_flight": stage.in_flight,
                "bytes": stage.peak.total,
                **stage.peak._asdict(),
                "host": stage.host,
            }
            for stage in memory(job)
        ],
        "worst_stage": planned.memory.rank,
        **_costs(planned),
    }


def _proposal_row(proposal: Proposal) -> dict[str, Any]:
    ranks = proposal.job.ranks
    return {
        **vars(ranks),
        **_settings(proposal),
        "memory_bytes": proposal.need,
        "worst_stage": proposal.memory.rank,
        **_costs(proposal),
    }


def _settings(planned: Proposal) -> dict[str, Any]:
    job = planned.job
    return {"micro_batch": job.micro_batch, "accumulation": job.accumulation, "recompute": job.recompute}


def _costs(planned: Proposal) -> dict[str, Any]:
    return {
        "bubble": planned.cost.bubble,
        "bytes_sent_per_step": {**planned.cost.traffic._asdict(), "between_nodes": planned.cost.slow_bytes},
        "step_seconds": planned.cost.seconds,
        "seconds": planned.cost.parts._asdict(),
    }


def _checkpoint_row(
    figures: Figures, states: Sequence[str], rates: Mapping[str, float], ranks_per_node: int
) -> dict[str, Any]:
    """Return the figures of a save."""
    disk, memory_rate = rates["bandwidth_per_node"], rates["memory_bandwidth_per_rank"]
    save = figures.save_seconds(disk, ranks_per_node, rates["files_per_second"])
    return {
        "states": list(states),
        "arrays": figures.arrays,
        "files": figures.files + figures.documents,
        "documents": figures.documents,
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
        **rates,
        "save_seconds": save,
        "stall_seconds": figures.stall_seconds(memory_rate),
    }


def _spread(values: list[int]) -> dict[str, float]:
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}


def _training_lines(t: Mapping[str, Any], ranks: Mapping[str, Any], flops: str) -> dict[str, str]:
    by_stage = t["memory_by_stage"]
    stage = by_stage[t["worst_stage"]]
    parts = {k: v for k, v in stage.items() if k in Memory._fields and v}
    where = f", on stage {stage['stage']} of {len(by_stage)} ({' to '.join(stage['links'])})"
    least = min(other["bytes"] for other in by_stage)
    sent = t["bytes_sent_per_step"]
    host = f"; {format_bytes(stage['host'])} of host memory" if stage["host"] else ""
    return {
        "step": f"{t['tokens_per_step']:,} tokens: {t['accumulation']} micro batches of {t['micro_batch']} x "
        f"{t['sequence_length']:,} on each of {ranks['dp']} data-parallel ranks; {t['precision']}, recompute "
        f"{t['recompute']}",
        "memory": f"{format_bytes(stage['bytes'])} per rank at the peak of a step"
        + (f"{where}; smallest stage {format_bytes(least)}" if len(by_stage) > 1 else "")
        + host,
        "": ", ".join(f"{k} {format_bytes(v)}" for k, v in parts.items()),
        "bubble": f"{t['bubble']:.1%} of a step: {t['schedule']}, pp {ranks['pp']}, "
        f"{t['accumulation']} micro batches",
        "sent": ", ".join(f"{axis} {format_bytes(sent[axis])}" for axis in ("tp", "pp", "dp"))
        + f" per step by the rank that sends most; {format_bytes(sent['between_nodes'])} of it between nodes",
        "time": f"{_seconds(t['step_seconds'])} per step at {flops} per rank, give or take {ERROR:.0%}: "
        f"{', '.join(f'{part} {_seconds(s)}' for part, s in t['seconds'].items() if s)}",
    }


def _checkpoint_lines(row: Mapping[str, Any], bandwidth: str, memory_bandwidth: str) -> dict[str, str]:
    ranks, gathered = row["ranks"], row["gathered"]
    nodes = -(-ranks["total"] // ranks["per_node"])
    exchanged = "no data between ranks"
    if gathered["exchanges"]:
        exchanged = (
            f"{format_bytes(gathered['bytes_sent'])} between ranks in {gathered['exchanges']} collectives; "
            f"a rank receives at most {format_bytes(gathered['largest_received_bytes'])} at a time"
        )

    def spread(values: Mapping[str, float]) -> str:
        return f"{' / '.join(format_bytes(values[k]) for k in ('min', 'mean', 'max'))} (min / mean / max)"

    return {
        "arrays": f"{row['arrays']:,}, float32: {', '.join(row['states'])} for each parameter",
        "files": f"{row['files']:,}: {row['files'] - row['documents']:,} with {row['chunks']:,} chunks, "
        f"{row['documents']:,} of metadata",
        "bytes": f"{row['bytes']:,} ({format_bytes(row['bytes'])}); "
        f"plus a manifest of about {format_bytes(row['manifest_bytes'])}",
        "by rank": f"{spread(row['bytes_by_rank'])}; imbalance {row['balance']:.2f} (max / mean)",
        "gathered": exchanged,
        "snapshot": f"{spread(row['snapshot_bytes_by_rank'])} of host memory per rank",
        "save": f"{_seconds(row['save_seconds'])} with {nodes:,} nodes writing at {bandwidth} each and "
        f"{row['files_per_second']:,.0f} files made in a second: all files, the slowest node's bytes, then "
        "the manifest (without the collectives)",
        "stall": f"{_seconds(row['stall_seconds'])} with each rank copying at {memory_bandwidth}: the "
        "snapshot, the only part of an asynchronous save that training waits for",
    }


def _proposal_table(proposals: Sequence[Mapping[str, Any]], limit: float) -> Iterator[str]:
    """Yield the fastest proposals that fit, or by how much the smallest one exceeds the limit."""
    first, need = proposals[0], proposals[0]["memory_bytes"]
    if need > limit:
        yield (
            f"nothing fits in {format_bytes(limit)} per rank. The minimum is {format_bytes(need)}, "
            f"{format_bytes(need - limit)} too much: pp {first['pp']}, dp {first['dp']}, tp {first['tp']}, "
            f"ZeRO {first['zero']}, micro batch {first['micro_batch']}, recompute {first['recompute']}"
        )
        return
    yield f"\n{len(proposals)} topologies fit in {format_bytes(limit)} per rank, fastest first:"
    yield (
        "  pp    dp  tp ZeRO micro batch   recompute      memory  bubble        sent  between nodes     step"
    )
    for p in proposals[:SHOWN]:
        batches = f"{p['micro_batch']} x {p['accumulation']}"
        sent = p["bytes_sent_per_step"]
        total = format_bytes(sent["tp"] + sent["pp"] + sent["dp"])
        yield (
            f"{p['pp']:>4} {p['dp']:>5} {p['tp']:>3} {p['zero']:>4} {batches:>12} {p['recompute']:>11} "
            f"{format_bytes(p['memory_bytes']):>11} {p['bubble']:>7.1%} {total:>11} "
            f"{format_bytes(sent['between_nodes']):>14} {_seconds(p['step_seconds']):>8}"
        )


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
