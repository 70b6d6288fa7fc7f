"""Save on two ranks: durable, without fsync, and the stall of an asynchronous save."""

from __future__ import annotations

from functools import partial

from benchmarks.checkpoint import dcp, peers, subject, yardsticks
from benchmarks.checkpoint.bench import Bench, one_folder, take_turns
from benchmarks.checkpoint.peers import DeepSpeed
from benchmarks.checkpoint.ranks import Group, Pool, Rank
from benchmarks.checkpoint.subject import Place
from benchmarks.checkpoint.table import Bar, Row, Sample
from benchmarks.checkpoint.workspace import settle_disk

PLACE = Place(1, 2, 1, 1)


def figures(bench: Bench) -> list[Row]:
    """Measure durable saves and saves without fsync."""
    with Pool(2) as pool, pool.group(2) as ranks:
        prepare(bench, ranks)
        ranks.call(dcp.prepare, bench.options)
        saved = one_folder(bench.workspace, ranks, "first", subject.save, durable=False) / "bench"
        one_folder(bench.workspace, ranks, "first-dcp", dcp.save, durable=False)
        sizes, specs = yardsticks.file_sizes(saved), yardsticks.array_specs(saved)
        rows = _durable(bench, ranks, sizes)
        bench.workspace.make_room()
        return rows + _buffered(bench, ranks, sizes, specs)


def prepare(bench: Bench, ranks: Group, place: Place = PLACE) -> None:
    """Make an engine with moments, and a buffer of its shard's size, on each of two ranks."""
    ranks.call(subject.make_engine, place, bench.options, step=True)
    ranks.call(yardsticks.prepare, max(ranks.call(subject.bytes_held)))


def _durable(bench: Bench, ranks: Group, sizes: list[int]) -> list[Row]:
    arms = {
        "ours": bench.save_arm(ranks, "ours", subject.save, durable=True),
        "raw": bench.save_arm(ranks, "raw", yardsticks.write_files, sizes, durable=True),
        "dcp": bench.save_arm(ranks, "dcp", dcp.save, durable=True),
    }
    times = take_turns(arms, bench.repeats)
    what = f"{sum(sizes) / 2**30:.2f} GiB, {len(sizes)} files"
    return [
        Row(
            figure=f"durable save ({what}), 2 ranks",
            ours=times["ours"],
            yardstick="the same bytes in as many files, written, then each fsynced",
            theirs=times["raw"],
            bar=Bar("times_as_fast", 0.9),
        ),
        Row(
            figure="durable save, 2 ranks",
            ours=times["ours"],
            yardstick="DCP, sync_files=True",
            theirs=times["dcp"],
            bar=Bar("times_as_fast", 1.0),
        ),
    ]


def _buffered(bench: Bench, ranks: Group, sizes: list[int], specs: list[yardsticks.ArraySpec]) -> list[Row]:
    arms = {
        "ours": bench.save_arm(ranks, "ours", subject.save, durable=False),
        "raw": bench.save_arm(ranks, "raw", yardsticks.write_files, sizes, durable=False),
        "dcp": bench.save_arm(ranks, "dcp", dcp.save, durable=False),
        "zarr": bench.save_arm(ranks, "zarr", yardsticks.zarr_write, specs),
    }
    if bench.deepspeed:
        arms["deepspeed"] = partial(_deepspeed, bench, bench.deepspeed)
    times = take_turns(arms, bench.repeats)
    figure = "save with durable=False, 2 ranks"
    return [
        Row(
            figure=figure,
            ours=times["ours"],
            yardstick="the same bytes in as many files, write",
            theirs=times["raw"],
            bar=Bar("times_as_fast", 0.8),
        ),
        Row(
            figure=figure,
            ours=times["ours"],
            yardstick=f"zarr-python, {len(specs)} arrays in the same chunks",
            theirs=times["zarr"],
            bar=Bar("times_as_fast", 4.0),
        ),
        Row(figure=figure, ours=times["ours"], yardstick="DCP, sync_files=False", theirs=times["dcp"]),
        Row(
            figure=figure,
            ours=times["ours"],
            yardstick=peers.named(bench.deepspeed, "ZeRO 1, save_checkpoint"),
            theirs=times.get("deepspeed"),
        ),
    ]


def _deepspeed(bench: Bench, deepspeed: DeepSpeed) -> float:
    folder = bench.workspace.fresh("deepspeed")
    seconds = deepspeed.step("save", folder, PLACE.world)["seconds"]
    settle_disk(folder)
    return seconds


def stall_figures(bench: Bench) -> list[Row]:
    """Measure how long a background `save_checkpoint` takes to return, once its buffers exist."""
    with Pool(2) as pool, pool.group(2) as ranks:
        prepare(bench, ranks)
        ranks.call(dcp.prepare, bench.options)

        def ours() -> float:
            seconds = max(ranks.time(subject.begin_save, bench.workspace.fresh("ours")).each)
            ranks.call(subject.wait)
            settle_disk()
            return seconds

        def theirs(*, kept_stager: bool) -> float:
            folder = bench.workspace.fresh("dcp")
            seconds = max(ranks.time(dcp.begin_save, folder, kept_stager=kept_stager).each)
            ranks.call(dcp.wait)
            settle_disk(folder)
            return seconds

        arms = {
            "ours": ours,
            "memcpy": lambda: max(ranks.time(_copy_shard).each),
            "dcp": lambda: theirs(kept_stager=False),
            "dcp, kept stager": lambda: theirs(kept_stager=True),
        }
        for arm in arms.values():  # the first of each allocates its buffers
            arm()
        times = take_turns(arms, bench.repeats)
        shard = max(ranks.call(subject.bytes_held))
    return _stall_rows(times, f"{shard / 2**20:.0f} MiB a rank")


def _stall_rows(times: dict[str, Sample], shard: str) -> list[Row]:
    figure, ours = "stall of an asynchronous save, 2 ranks", times["ours"]
    return [
        Row(
            figure=f"{figure} ({shard})",
            ours=ours,
            yardstick="one memcpy of each rank's shard into warm memory, both at once",
            theirs=times["memcpy"],
            bar=Bar("times_as_much", 1.1),
        ),
        Row(
            figure=figure,
            ours=ours,
            yardstick="DCP async_save",
            theirs=times["dcp"],
            bar=Bar("times_as_fast", 5.0),
        ),
        Row(
            figure=figure,
            ours=ours,
            yardstick="DCP async_save with one DefaultStager for all saves",
            theirs=times["dcp, kept stager"],
        ),
    ]


def _copy_shard(rank: Rank) -> None:
    if "shard" not in rank.kept:
        rank.kept["shard"] = subject.local_arrays(rank)
    yardsticks.copy_memory(rank, rank.kept["shard"])
