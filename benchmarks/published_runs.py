"""Published times of training runs, as jobs of the planner: model, topology, and seconds of a step.

Sources, each row read there (not from memory):

    titan   github.com/pytorch/torchtitan (b5bcd76), benchmarks/llama3_h100_202412_torchtitan.md and
            asyncTP_llama3_h100_2025-06_torchtitan.md. H100 at 500 W with HBM2e. The bf16 rows
    mpt     github.com/mosaicml/llm-foundry (8c8dd48), scripts/train/benchmarking/README.md, with the sizes of
            scripts/train/yamls/pretrain. FSDP. All bf16 rows of H100 and A100 80 GB with at least 1B
            parameters and sequences of 2,048 to 8,192 tokens
    nemo    github.com/NVIDIA/dgxc-benchmarking: READMEs and configs of nemo_megatron and nemotron at tag
            v25.02; nemotron's 15B at v25.04.02 (tp 2). bf16 rows without context parallelism, which the
            planner doesn't know
    sc21    github.com/NVIDIA/Megatron-LM (841f789), images/cases_april2021.png, with the topologies of
            examples/academic_paper_scripts/sc21/run_table_1.sh; README, "GPT-3 Example" (175B)

Left out: float8 runs; Megatron-LM's table of H100 runs (images/model_table.png), which names neither micro
batch nor schedule; Llama 3.1 405B, in bf16 published with context parallelism alone; Nemotron 340B at
v25.04.02, whose virtual stages its README does not name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from parallel.degrees import Ranks
from uni3d.estimate.gpt import GPTShape
from uni3d.estimate.job import Job
from uni3d.estimate.step import Cost, Machine, cost

MACHINES = {
    # FLOP/s: of one run on one node each, MPT-7B of 2,048 tokens without recomputation (CALIBRATION).
    # Inside: bandwidth of rings, measured on 8 H200s (which have the H100's NVLink) and 8 A100s. Between: 80%
    # of the link (400 and 200 Gbit/s for each GPU), a rule of thumb for what collectives reach. Both from
    # github.com/stas00/ml-engineering (744d01e), network/README.md.
    "H100": Machine(flops=459e12, inside=361e9, between=0.8 * 50e9, ranks_per_node=8),
    "A100": Machine(flops=200e12, inside=235e9, between=0.8 * 25e9, ranks_per_node=8),
}
CALIBRATION = ("mpt 7b, 8 H100", "mpt 7b, 8 A100")
HBM_A100 = 2.039e12
"""Bytes per second of an A100 80 GB's memory (NVIDIA's data sheet)."""

NAMED = {
    "nemo 15B, tp 2": "Transformer Engine reaches a higher rate",
    "nemo 340B": "Transformer Engine reaches a higher rate",
}
"""Beginnings of the names of runs that the estimate misses by more than the error, and why."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A published run. The flags tell what it does otherwise than uni3d's engine."""

    name: str
    machine: str
    job: Job
    seconds: float
    overlaps_tp: bool = False
    """True if tensor parallelism's communication runs beside matrix products."""
    recomputes_whole_layers: bool = False
    """True if recomputation includes a layer's last product."""
    flash: bool = True
    """False if attention writes its S x S matrices to memory."""

    @property
    def estimate(self) -> float:
        """Seconds of a step as estimated, with what this run does otherwise."""
        return self.estimate_at(MACHINES[self.machine].flops)

    def estimate_at(self, flops: float) -> float:
        """Return the estimate with this rate of compute."""
        found = cost(self.job, replace(MACHINES[self.machine], flops=flops))
        if self.recomputes_whole_layers:
            found = _slower(found, self._last_products / flops)
        if not self.flash:
            found = _slower(found, self._score_bytes / HBM_A100)
        return found.seconds - (found.parts.tp / (1 - found.bubble) if self.overlaps_tp else 0)

    @property
    def ratio(self) -> float:
        return self.estimate / self.seconds

    @property
    def why(self) -> str | None:
        """Reason why the estimate may miss, if this run is one of `NAMED`."""
        return next((why for start, why in NAMED.items() if self.name.startswith(start)), None)

    @property
    def _layer_tokens(self) -> float:
        """Tokens of a step on a rank, times the layers on it, divided by tp."""
        job = self.job
        layers = max(stage.layers for stage in job.kinds)
        return layers * job.tokens * job.accumulation / job.ranks.tp

    @property
    def _last_products(self) -> float:
        return 2 * self.job.shape.ffn * self.job.shape.hidden * self._layer_tokens

    @property
    def _score_bytes(self) -> float:
        """Bytes that operations on 16-bit S x S matrices of scores read and write.

        Forward, for each score: the product writes 2, softmax reads and writes 4, dropout 5 with its mask,
        the product with the values reads 2. Backward: products 4 and 4, dropout 5, softmax 6.
        """
        forward, backward = 2 + 4 + 5 + 2, 4 + 5 + 6 + 4
        passes = forward * (2 if self.job.recompute == "full" else 1) + backward
        return passes * self.job.shape.heads * self.job.seq_len * self._layer_tokens


def _slower(found: Cost, seconds: float) -> Cost:
    """Return the cost with more compute."""
    stretched = seconds * found.bubble / (1 - found.bubble)
    parts = found.parts
    return replace(
        found, parts=parts._replace(compute=parts.compute + seconds, bubble=parts.bubble + stretched)
    )


def published_runs() -> list[Run]:
    return [*_titan(), *_mpt("H100", MPT_H100), *_mpt("A100", MPT_A100), *_nemo(), *_sc21()]


def _job(
    shape: GPTShape, place: tuple[int, int, int, int], batch: tuple[int, int, int], **settings: Any
) -> Job:
    """Return a job of (pp, dp, tp, ZeRO stage) and (sequence, micro batch, accumulation)."""
    pp, dp, tp, zero = place
    seq_len, micro_batch, accumulation = batch
    sizes = {"seq_len": seq_len, "micro_batch": micro_batch, "accumulation": accumulation}
    return Job(shape=shape, ranks=Ranks(pp=pp, dp=dp, tp=tp, zero=zero), **sizes, **settings)


def _gpt(layers: int, hidden: int, heads: int, vocab: int, seq_len: int, **other: Any) -> GPTShape:
    kinds = {"norm": "layernorm", "positions": "learned", "activation": "gelu", "tied_head": True} | other
    sizes = {"kv_heads": heads, "ffn": 4 * hidden, "max_seq_len": seq_len} | kinds
    return GPTShape(layers=layers, hidden=hidden, heads=heads, vocab=vocab, **sizes)


def _llama(layers: int, hidden: int, heads: int, ffn: int) -> GPTShape:
    return GPTShape(layers=layers, hidden=hidden, heads=heads, kv_heads=8, ffn=ffn, vocab=128256)


def _titan() -> Iterator[Run]:
    """Yield torchtitan's runs. Its selective recomputation repeats every second product: half of a layer."""
    small, large = _llama(32, 4096, 32, 14336), _llama(80, 8192, 64, 28672)
    half: dict[str, Any] = {"recompute": "full", "every": 2}
    full: dict[str, Any] = {"recompute": "full", "sequence_parallel": True}
    rows: list[tuple[str, Job, float]] = [
        ("8B, 8, eager", _job(small, (1, 8, 1, 3), (8192, 2, 1), **half), 5762),
        ("8B, 8, compiled", _job(small, (1, 8, 1, 3), (8192, 2, 1), **half), 6667),
        ("8B, 128, eager", _job(small, (1, 128, 1, 3), (8192, 2, 1), **half), 5605),
        ("8B, 128, compiled", _job(small, (1, 128, 1, 3), (8192, 2, 1), **half), 6514),
        (
            "8B, 64, tp 8",
            _job(small, (1, 8, 8, 3), (8192, 12, 1), sequence_parallel=True, **half),
            4378,
        ),
        ("70B, 256, tp 8", _job(large, (1, 32, 8, 3), (8192, 16, 1), **full), 597.3),
    ]
    for name, job, rate in rows:
        yield Run(name=f"titan {name}", machine="H100", job=job, seconds=_seconds(job, rate))
    job = rows[-1][1]
    name = "titan 70B, 256, tp 8, asynchronous"
    yield Run(name=name, machine="H100", job=job, seconds=_seconds(job, 652.4), overlaps_tp=True)


def _seconds(job: Job, tokens_per_second_of_rank: float) -> float:
    return job.batch * job.seq_len / job.ranks.total / tokens_per_second_of_rank


MPT = {
    "70b": (80, 8192, 64),
    "30b": (48, 7168, 56),
    "13b": (40, 5120, 40),
    "7b": (32, 4096, 32),
    "3b": (32, 2560, 20),
    "1b": (24, 2048, 16),
}
"""Layers, hidden size, heads."""

# Model, sequence, GPUs, micro batch, accumulation, tokens/s/GPU; then r: recomputed layers, z: ZeRO stage 2.
MPT_H100 = """
70b 2048 512 8 1 1007 r | 70b 2048 256 8 1 1035 r | 70b 2048 128 8 1 1058 r | 70b 2048 64 8 4 1039 r
70b 2048 32 2 16 882 r | 30b 2048 512 8 1 2115 r | 30b 2048 256 8 1 2148 r | 30b 2048 128 8 1 2199 r
30b 8192 8 1 21 1384 r | 30b 4096 8 1 21 1802 r | 30b 2048 32 14 3 2308 r | 30b 2048 16 10 3 2263 r
30b 2048 8 3 21 2002 r | 13b 2048 512 16 1 4952 r | 13b 2048 256 16 1 4989 r | 13b 2048 128 16 1 5080 r
13b 4096 8 10 3 4717 r | 13b 2048 64 2 1 4800 | 13b 2048 32 2 1 4811 | 13b 2048 16 2 1 4767
13b 2048 8 2 1 4792 | 7b 2048 512 6 1 9670 | 7b 2048 256 6 1 10119 | 7b 2048 128 6 1 10475
7b 8192 8 8 2 6935 r | 7b 4096 8 16 2 8611 r | 7b 2048 8 6 1 10643 | 3b 2048 512 8 1 21664 z
3b 2048 256 8 1 22772 z | 3b 2048 128 8 1 23422 z | 3b 8192 8 3 6 16578 | 3b 4096 8 5 6 20964
3b 2048 64 6 3 22525 | 3b 2048 32 6 3 23021 | 3b 2048 16 10 3 24142 | 1b 2048 512 12 1 39837 z
1b 2048 256 12 1 42555 z | 1b 2048 128 12 1 44123 z | 1b 8192 8 3 4 29157 | 1b 4096 8 7 4 38535
1b 2048 64 20 1 44402 | 1b 2048 32 20 1 45130 | 1b 2048 16 20 1 46037 | 1b 2048 8 14 1 45455
"""
MPT_A100 = """
70b 2048 64 8 4 410 r | 70b 2048 32 2 16 373 r | 30b 8192 8 1 21 574 r | 30b 4096 8 1 21 814 r
30b 2048 8 3 21 916 r | 13b 8192 8 5 3 1795 r | 13b 4096 8 10 3 2060 r | 13b 2048 8 2 3 2262
7b 8192 8 8 2 3206 r | 7b 4096 8 16 2 3684 r | 7b 2048 8 6 2 4641 | 3b 8192 8 3 6 7695
3b 4096 8 5 6 9457 | 3b 2048 8 10 2 10811 | 1b 8192 8 3 4 13814 | 1b 4096 8 7 4 17807
1b 2048 8 14 4 20513
"""


def _mpt(machine: str, table: str) -> Iterator[Run]:
    for row in table.replace("\n", "|").split("|"):
        if not (words := row.split()):
            continue
        model, (seq_len, ranks, micro, steps), rate = words[0], map(int, words[1:5]), float(words[5])
        recompute: Any = "full" if "r" in words[6:] else "none"
        place = (1, ranks, 1, 2 if "z" in words[6:] else 3)
        shape = _gpt(*MPT[model], 50368, seq_len)
        job = _job(shape, place, (seq_len, micro, steps), recompute=recompute)
        name = f"mpt {model}, {ranks} {machine}" + (f", {seq_len:,} tokens" if seq_len > 2048 else "")
        yield Run(name=name, machine=machine, job=job, seconds=_seconds(job, rate))


def _nemo() -> Iterator[Run]:
    """Yield the runs of NVIDIA's recipes, by ranks."""
    other: dict[str, Any] = {"kv_heads": 8, "positions": "rotary", "tied_head": False}
    small, large = _gpt(32, 6144, 48, 256000, 4096, **other), _gpt(96, 18432, 96, 256000, 4096, **other)
    common: dict[str, Any] = {"reduce": "bf16", "sequence_parallel": True}
    staged: dict[str, Any] = common | {"schedule": "interleaved"}
    for n, seconds in zip(range(7, 12), [8.309, 8.408, 8.42, 8.453, 8.49], strict=True):
        job = _job(
            _gpt(96, 12288, 96, 51200, 2048),
            (8, 2**n // 32, 4, 1),
            (2048, 1, 64),
            **staged,
            virtual_stages=6,
        )
        yield Run(name=f"nemo 175B, {2**n}", machine="H100", job=job, seconds=seconds, overlaps_tp=True)
    times = [2.812, 2.824, 2.845, 2.859, 2.852, 2.875, 2.895, 2.887]
    for n, seconds in zip(range(4, 12), times, strict=True):
        job = _job(small, (1, 2**n // 4, 4, 1), (4096, 4, 4), **common)
        name = f"nemo 15B, tp 4, {2**n}"
        yield Run(name=name, machine="H100", job=job, seconds=seconds, overlaps_tp=True)
    for n, seconds in zip(range(4, 12), [2.66, 2.66, 2.67, 2.67, 2.68, 2.71, 2.74, 2.78], strict=True):
        job = _job(small, (1, 2**n // 2, 2, 1), (4096, 2, 4), **common)
        yield Run(name=f"nemo 15B, tp 2, {2**n}", machine="H100", job=job, seconds=seconds)
    for n, seconds in zip(range(7, 12), [4.61, 4.67, 4.7, 4.73, 4.84], strict=True):
        place = (8, 2**n // 64, 8, 1)
        job = _job(large, place, (4096, 1, 16), **staged, virtual_stages=12, recompute="selective")
        yield Run(name=f"nemo 340B, {2**n}", machine="H100", job=job, seconds=seconds)


# Name, layers, hidden size, heads, tp, pp, virtual stages, micro batch, batch, GPUs, TFLOP/s of a GPU.
SC21 = """
1.7B 24 2304 24 1 1 1 16 512 32 137 | 3.6B 30 3072 32 2 1 1 16 512 64 138
7.5B 36 4096 32 4 1 1 16 512 128 142 | 18B 40 6144 48 8 1 1 8 1024 256 135
39B 48 8192 64 8 2 1 4 1536 512 138 | 76B 60 10240 80 8 4 3 2 1792 1024 140
145B 80 12288 96 8 8 2 2 2304 1536 148 | 310B 96 16384 128 8 16 2 1 2160 1920 155
530B 105 20480 128 8 35 3 1 2520 2520 163 | 1T 128 25600 160 8 64 1 1 3072 3072 163
175B 96 12288 96 8 16 1 1 1536 1024 138
"""


def _sc21() -> Iterator[Run]:
    """Yield Megatron's runs of 2021 on A100s.

    TFLOP/s become seconds by the paper's count (Narayanan et al. 2021, section 5.1), with recomputation:
    96 B S L D^2 (1 + S / 6 D + V / 16 L D). It gives 31.9 s for 175B, and the README says "around 32".
    """
    seq_len, vocab = 2048, 51200
    for row in SC21.replace("\n", "|").split("|"):
        if not (words := row.split()):
            continue
        layers, hidden, heads, tp, pp, virtual, micro, batch, ranks, rate = map(int, words[1:])
        count = 1 + seq_len / (6 * hidden) + vocab / (16 * layers * hidden)
        operations = 96 * batch * seq_len * layers * hidden**2 * count
        dp = ranks // tp // pp
        job = _job(
            _gpt(layers, hidden, heads, vocab, seq_len),
            (pp, dp, tp, 0),
            (seq_len, micro, batch // dp // micro),
            precision="fp16",
            reduce="fp16",
            recompute="full",
            schedule="interleaved" if virtual > 1 else "1f1b",
            virtual_stages=virtual,
        )
        yield Run(
            name=f"sc21 {words[0]}, {ranks}",
            machine="A100",
            job=job,
            seconds=operations / (ranks * rate * 1e12),
            recomputes_whole_layers=True,
            flash=False,
        )
