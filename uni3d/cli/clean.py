"""`uni3d clean`: remove leftovers of interrupted saves and deletions."""

from __future__ import annotations

from uni3d.cli.terminal import AsJson, DryRun, RunOnly, open_run, say, say_json


def clean(run: RunOnly, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Remove leftovers of interrupted saves and deletions.

    Don't run it while the run is saving: a save in progress looks like an interrupted one, and would be
    removed too.
    """
    store = open_run(run)
    names = store.leftovers() if dry_run else store.clean()
    if as_json:
        say_json({"removed": names, "dry_run": dry_run})
        return
    for name in names:
        say(f"{'would remove' if dry_run else 'removed'} {name}")
    if not names:
        say(f"{store.where('')}: nothing to remove")
