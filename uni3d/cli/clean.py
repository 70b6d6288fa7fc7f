"""`uni3d clean`: remove leftovers of interrupted saves and deletions."""

from __future__ import annotations

from uni3d.cli.terminal import AsJson, DryRun, RunOnly, answer, open_run


def clean(run: RunOnly, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Remove leftovers of interrupted saves and deletions.

    While a process is saving into the run, this is refused.
    """
    import ckpt

    store = open_run(run)
    names = store.leftovers() if dry_run else ckpt.clean(store)
    lines = [f"{'would remove' if dry_run else 'removed'} {name}" for name in names]
    row = {"removed": names, "dry_run": dry_run}
    answer(row, lines or [f"{store.where('')}: nothing to remove"], as_json)
