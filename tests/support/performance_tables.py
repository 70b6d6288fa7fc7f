"""Tables of `docs/performance.md` that are computed: memory and traffic by ZeRO stage and knob, bubbles.

python tests/support/performance_tables.py    # writes them into the page
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from parallel.degrees import Ranks
from uni3d.estimate.gpt import from_model_config
from uni3d.estimate.job import Job
from uni3d.estimate.memory import in_flight, memory, worst
from uni3d.estimate.traffic import bubble, traffic

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"
CONFIGS = ROOT / "examples" / "megatron_gpt" / "configs"


def job(config: str, **given: Any) -> Job:
    """Return the job of an example's config on 8 data-parallel ranks, with one sample in a micro batch."""
    document = json.loads((CONFIGS / f"{config}.json").read_text())
    shape = from_model_config(document["model"])
    base = {"ranks": Ranks(pp=1, dp=8, tp=1, zero=1), "micro_batch": 1, "accumulation": 16}
    return Job(shape=shape, seq_len=document["seq_len"], **(base | given))


def gib(n: int) -> str:
    return f"{n / 2**30:.1f}"


def zero_stages() -> str:
    rows = [
        "| model | ZeRO | weights | gradients | optimizer | activations, loss, buffers | in all | sent |\n",
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n",
    ]
    for config in ("1.3b", "7b"):
        for zero in range(4):
            one = job(config, ranks=Ranks(pp=1, dp=8, tp=1, zero=zero))
            peak = worst(memory(one)).peak
            rest = peak.activations + peak.loss + peak.communication + peak.pipeline
            parts = [peak.parameters + peak.gathered, peak.gradients, peak.optimizer, rest, peak.total]
            cells = " | ".join(map(gib, [*parts, traffic(one).total]))
            rows.append(f"| {config.upper()} | {zero} | {cells} |\n")
    return "".join(rows)


def knobs() -> str:
    base = job("7b")
    tp = replace(base, ranks=Ranks(pp=1, dp=2, tp=4, zero=1))
    three = replace(base, ranks=Ranks(pp=1, dp=8, tp=1, zero=3))
    changed = {
        "as it is": base,
        "ZeRO 2": replace(base, ranks=Ranks(pp=1, dp=8, tp=1, zero=2)),
        "ZeRO 3": three,
        "ZeRO 3, shard groups of 4": replace(three, shard_group=4),
        "offload": replace(base, offload=True),
        "ZeRO 3, offload": replace(three, offload=True),
        "recompute selective": replace(base, recompute="selective"),
        "recompute full": replace(base, recompute="full"),
        "recompute full, every 2": replace(base, recompute="full", every=2),
        "micro batch 4, accumulation 4": replace(base, micro_batch=4, accumulation=4),
        "fp32": replace(base, precision="fp32"),
        "communication_data_type bf16": replace(base, reduce="bf16"),
        "tp 4, dp 2": tp,
        "tp 4, dp 2, sequence_parallel": replace(tp, sequence_parallel=True),
        "pp 4, dp 2, accumulation 64": replace(base, ranks=Ranks(pp=4, dp=2, tp=1, zero=1), accumulation=64),
    }
    rows = [
        "| changed | memory of a GPU | of it activations and loss | host | sent: tp | pp | dp |\n",
        "| --- | --- | --- | --- | --- | --- | --- |\n",
    ]
    for name, one in changed.items():
        most, sent = worst(memory(one)), traffic(one)
        sizes = [most.peak.total, most.peak.activations + most.peak.loss, most.host, *sent]
        rows.append(f"| {name} | {' | '.join(gib(n) if n else '-' for n in sizes)} |\n")
    return "".join(rows)


SCHEDULES: list[tuple[Any, int]] = [
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved", 2),
    ("zero_bubble", 1),
    ("zero_bubble_v", 2),
]


def bubbles() -> str:
    counts = (4, 8, 16, 32)
    rows = [
        f"| schedule, pp 4 | virtual stages | {' | '.join(f'{m} batches' for m in counts)} | in flight |\n",
        "| --- | --- |" + " --- |" * (len(counts) + 1) + "\n",
    ]
    for schedule, v in SCHEDULES:
        ranks = Ranks(pp=4, dp=2, tp=1, zero=1)
        jobs = [job("7b", ranks=ranks, accumulation=m, schedule=schedule, virtual_stages=v) for m in counts]
        most = max(in_flight(jobs[-1], rank) for rank in range(4))
        cells = " | ".join(f"{bubble(one):.0%}" for one in jobs)
        rows.append(f"| `{schedule}` | {v} | {cells} | {most / v:g} |\n")
    return "".join(rows)


TABLES = {"zero": zero_stages, "knobs": knobs, "bubbles": bubbles}


if __name__ == "__main__":
    page = PAGE.read_text()
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        head, _, rest = page.partition(begin)
        page = head + begin + table() + end + rest.partition(end)[2]
    PAGE.write_text(page)
