"""`uni3d doctor`: whether a checkpoint would resume on so many ranks, and how; a dry run on paper."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from uni3d.cli.terminal import AsJson, Run, Tag, complain, say_json

if TYPE_CHECKING:
    from ckpt import CheckpointError
    from uni3d.doctor.topologies import Asked

Degree = Annotated[
    int | None, typer.Option(min=1, help="Only topologies with this degree.", show_default="any")
]


def doctor(
    run: Run,
    world_size: Annotated[int, typer.Option(min=1, help="Ranks that there are now.", show_default=False)],
    tag: Tag = None,
    config: Annotated[
        Path | None, typer.Option(help="The run's JSON config: batches, precision, what it would refuse.")
    ] = None,
    pp: Degree = None,
    dp: Degree = None,
    tp: Degree = None,
    zero: Annotated[
        int | None,
        typer.Option(min=0, max=3, help="Only this ZeRO stage.", show_default="the config's, else the run's"),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Of a rank, e.g. 80GB: only topologies that fit.", show_default="any")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="JSON as in examples/megatron_gpt/configs, to count activations too."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Would this checkpoint resume on so many ranks? With which topologies, batches and memory?

    Needs no ranks and reads no data. Of the topologies it recommends the one with fewest tensor-parallel
    ranks, then fewest pipeline stages, then the ZeRO stage of the run so far, that fits in --memory. Exit
    code 0 if it would resume (as asked for), 1 if it wouldn't, 2 if the checkpoint can't be read or the
    question can't be answered.
    """
    from ckpt import CheckpointError
    from uni3d.doctor import examine

    try:
        asked = _asked(world_size, pp, dp, tp, zero, memory)
        report = examine(run, tag, asked, config, model)
    except (CheckpointError, OSError, ValueError) as error:
        complain(f"{error}{_beside(run, error) if isinstance(error, CheckpointError) else ''}")
        raise typer.Exit(2) from None
    if as_json:
        say_json(report)
    else:
        from uni3d.cli.doctor_text import print_report

        print_report(report)
    if not report["would_resume"]:
        raise typer.Exit(1)


def _beside(run: str, error: CheckpointError) -> str:
    """What to know of a run whose checkpoint can't be opened: its others, and saves not committed."""
    import ckpt

    found = ""
    with contextlib.suppress(ckpt.CheckpointError, OSError):
        store = ckpt.open_store(run)
        tags, names = ckpt.committed_tags(store), store.leftovers()
        if tags and "tags there are" not in str(error):
            found += f" (its tags: {', '.join(tags)})"
        if names:
            found += f" (not committed, so nothing of it can be loaded: {', '.join(names)})"
    return found


def _asked(
    world: int, pp: int | None, dp: int | None, tp: int | None, zero: int | None, memory: str | None
) -> Asked:
    from parallel.degrees import check_world_size
    from uni3d.cli.plan import _BYTES, number
    from uni3d.doctor.topologies import Asked

    given = {axis: n for axis, n in {"pp": pp, "dp": dp, "tp": tp}.items() if n is not None}
    check_world_size(world, given)
    limit = None if memory is None else number(memory, _BYTES, "--memory", "80GiB or 80GB")
    return Asked(world=world, pp=pp, dp=dp, tp=tp, zero=zero, memory=limit)
