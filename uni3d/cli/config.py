"""`uni3d config`: print a config with its defaults filled in, and its differences from DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from uni3d.cli.terminal import AsJson, out, say_json


def config(
    file: Annotated[Path, Argument(help="JSON config, DeepSpeed's or uni3d's.", show_default=False)],
    world_size: Annotated[int, Option(help="Number of processes.")] = 1,
    pp: Annotated[int | None, Option(help="Pipeline stages.", show_default="the config's")] = None,
    tp: Annotated[int | None, Option(help="Tensor-parallel ranks.", show_default="the config's")] = None,
    as_json: AsJson = False,
) -> None:
    """Print a config with all defaults, and where training differs from DeepSpeed."""
    from parallel.degrees import check_shard_group, resolve_degrees
    from uni3d.config import batch_triad, load_config
    from uni3d.config.deepspeed_differences import differences

    settings = load_config(file)
    asked = settings.parallel
    degrees = resolve_degrees(
        world_size, pp=asked.pp if pp is None else pp, dp=asked.dp, tp=asked.tp if tp is None else tp
    )
    triad = batch_triad(settings, degrees.dp)
    check_shard_group(degrees.dp, settings.zero_optimization.stage, settings.shard_group)
    resolved = {
        "world_size": world_size,
        **vars(degrees),
        **triad.model_dump(),
        "precision": settings.precision,
        **_sections(settings),
    }
    found = differences(settings, degrees.pp)
    if as_json:
        pairs = [{"key": key, "difference": text} for key, text in found]
        say_json({"config": resolved, "differences": pairs})
        return
    _print(resolved, found)


def _sections(settings: Any) -> dict[str, Any]:
    """Return the config's keys with their defaults, except those that `config` resolves itself."""
    batches = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    known = dict.fromkeys((*batches, "fp16", "bf16", "data_types"), True)
    dump: dict[str, Any] = settings.model_dump(mode="json", exclude={**known, "parallel": {"pp", "dp", "tp"}})
    dump["communication_data_type"] = settings.communication_data_type or "fp32"
    if settings.optimizer is not None:
        dump["optimizer"] = {"is": settings.optimizer.implementation, **settings.optimizer.hyperparameters}
    if settings.precision == "fp16":
        dump["fp16"] = settings.fp16.model_dump(mode="json", exclude={"enabled"})
    for key, section in dump.items():
        if isinstance(section, dict) and section.get("enabled") is False:  # the rest has no effect
            dump[key] = {"enabled": False}
    zero = settings.zero_optimization
    dump["zero_optimization"] = {
        "stage": zero.stage,
        "offload": zero.offload,
        "shard_group": zero.shard_group,
        "stage3_param_persistence_threshold": zero.stage3_param_persistence_threshold,
    }
    return {key: dump[key] for key in sorted(dump, key=lambda k: isinstance(dump[k], dict))}


def _print(resolved: dict[str, Any], found: list[tuple[str, str]]) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    def rows(values: dict[str, Any], within: str = "") -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                rows(value, f"{within}{key}.")
            else:
                table.add_row(Text(f"{within}{key}"), Text("-" if value is None else _plain(value)))

    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    rows(resolved)
    out.print(table)
    out.print()
    out.print(Text("Differences from DeepSpeed, and what is easily misread:"))
    for key, text in found:
        out.print(Padding(Text.assemble((key, "bold"), f": {text}"), (0, 0, 0, 2), expand=False))


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
