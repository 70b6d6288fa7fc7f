"""`uni3d prune`: delete old checkpoints of a run."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from uni3d.cli.terminal import AsJson, DryRun, RunOnly, answer, open_run


def prune(
    run: RunOnly,
    keep_last: Annotated[int, Option(min=1, help="Keep the newest N checkpoints.")],
    keep_every: Annotated[
        int | None, Option(min=1, help="Also keep checkpoints whose step is a multiple of N.")
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Delete old checkpoints.

    Each deletion is atomic. The checkpoint that `latest` names is always kept.
    """
    import ckpt

    retention = ckpt.Retention(keep_last=keep_last, keep_every=keep_every)
    store = open_run(run)
    tags = ckpt.committed_tags(store)
    if not tags:
        raise ckpt.CheckpointError(
            f"{store.where('')} holds no committed checkpoint; give the folder of a run"
        )
    deleted = ckpt.prune(store, retention, dry_run=dry_run)
    kept = [tag for tag in tags if tag not in deleted]
    lines = [f"{'would delete' if dry_run else 'deleted'} {tag}" for tag in deleted]
    lines.append(f"{'would keep' if dry_run else 'kept'} {', '.join(kept)}")
    answer({"deleted": deleted, "kept": kept, "dry_run": dry_run}, lines, as_json)
