"""What `uni3d plan` says: a plan's figures as JSON, and as lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uni3d.cli.terminal import in_bytes, say
from uni3d.estimate.memory import Memory, memory
from uni3d.estimate.save import Figures
from uni3d.estimate.search import Proposal

SHOWN = 10
"""Proposals that the table has; JSON has all."""


def training_row(planned: Proposal) -> dict[str, Any]:
    """Figures of a training job."""
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


def proposal_row(proposal: Proposal) -> dict[str, Any]:
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
    return {
        "micro_batch": job.micro_batch,
        "accumulation": job.accumulation,
        "recompute": job.recompute,
    }


def _costs(planned: Proposal) -> dict[str, Any]:
    return {
        "bubble": planned.cost.bubble,
        "bytes_sent_per_step": {**planned.cost.traffic._asdict(), "between_nodes": planned.cost.slow_bytes},
        "step_seconds": planned.cost.seconds,
    }


def checkpoint_row(
    figures: Figures, states: Sequence[str], rates: Mapping[str, float], ranks_per_node: int
) -> dict[str, Any]:
    """Figures of a save."""
    disk, memory_rate = rates["bandwidth_per_node"], rates["memory_bandwidth_per_rank"]
    return {
        "states": list(states),
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
        **rates,
        "save_seconds": figures.save_seconds(disk, ranks_per_node),
        "stall_seconds": figures.stall_seconds(memory_rate),
    }


def _spread(values: list[int]) -> dict[str, float]:
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}


def lines(
    row: Mapping[str, Any], shape: str, bandwidth: str, memory_bandwidth: str, flops: str
) -> dict[str, str]:
    """The figures by label: the model, then training, then a save."""
    ranks = row["ranks"]
    asked = f" ({row['asked']:,} were asked for)" if row["asked"] is not None else ""
    axes = ", ".join(f"{axis} {ranks[axis]}" for axis in ("pp", "dp", "tp"))
    return {
        "model": shape,
        "parameters": f"{row['parameters']:,}{asked}",
        "ranks": f"{ranks['total']:,}: {axes}, ZeRO {ranks['zero']}",
        **_training_lines(row["training"], ranks, flops),
        **_checkpoint_lines(row, bandwidth, memory_bandwidth),
    }


def _training_lines(t: Mapping[str, Any], ranks: Mapping[str, Any], flops: str) -> dict[str, str]:
    by_stage = t["memory_by_stage"]
    stage = by_stage[t["worst_stage"]]
    parts = {k: v for k, v in stage.items() if k in Memory._fields and v}
    where = f" on stage {stage['stage']} of {len(by_stage)} ({' to '.join(stage['links'])})"
    least = min(other["bytes"] for other in by_stage)
    sent = t["bytes_sent_per_step"]
    host = f"; {in_bytes(stage['host'])} of host memory" if stage["host"] else ""
    return {
        "step": f"{t['tokens_per_step']:,} tokens: {t['accumulation']} micro batches of {t['micro_batch']} x "
        f"{t['sequence_length']:,} on each of {ranks['dp']} data-parallel ranks; {t['precision']}, recompute "
        f"{t['recompute']}",
        "memory": f"{in_bytes(stage['bytes'])} a rank at the fullest moment of a step"
        + (f",{where}; the least on a stage is {in_bytes(least)}" if len(by_stage) > 1 else "")
        + host,
        "of it": ", ".join(f"{k} {in_bytes(v)}" for k, v in parts.items()),
        "bubble": f"{t['bubble']:.1%} of a step: {t['schedule']}, pp {ranks['pp']}, "
        f"{t['accumulation']} micro batches",
        "sent": ", ".join(f"{axis} {in_bytes(sent[axis])}" for axis in ("tp", "pp", "dp"))
        + f" a step by the rank that sends most; {in_bytes(sent['between_nodes'])} of it between nodes",
        "time": f"{_seconds(t['step_seconds'])} a step at {flops} a rank, if nothing that is sent is hidden",
    }


def _checkpoint_lines(row: Mapping[str, Any], bandwidth: str, memory_bandwidth: str) -> dict[str, str]:
    ranks, gathered = row["ranks"], row["gathered"]
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


def proposal_table(proposals: Sequence[Proposal], limit: float) -> None:
    """Print the quickest of those that fit; or by how much the nearest one misses."""
    first = proposals[0]
    if first.need > limit:
        r, job = first.job.ranks, first.job
        say(
            f"nothing fits {in_bytes(limit)} a rank. {in_bytes(first.need)} is the least, "
            f"{in_bytes(first.need - limit)} too much: pp {r.pp}, dp {r.dp}, tp {r.tp}, ZeRO {r.zero}, "
            f"micro batches of {job.micro_batch}, recompute {job.recompute}"
        )
        return
    say(f"\n{len(proposals)} ways to split the ranks fit {in_bytes(limit)} a rank; quickest first:")
    say("  pp    dp  tp ZeRO micro batch   recompute      memory  bubble        sent  between nodes     step")
    for p in proposals[:SHOWN]:
        job, r = p.job, p.job.ranks
        batches = f"{job.micro_batch} x {job.accumulation}"
        sent, slow = in_bytes(p.cost.traffic.total), in_bytes(p.cost.slow_bytes)
        say(
            f"{r.pp:>4} {r.dp:>5} {r.tp:>3} {r.zero:>4} {batches:>12} {job.recompute:>11} "
            f"{in_bytes(p.need):>11} {p.cost.bubble:>7.1%} {sent:>11} {slow:>14} "
            f"{_seconds(p.cost.seconds):>8}"
        )


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
