"""`uni3d config`: print a config with its defaults filled in, and its differences from DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from uni3d.cli.terminal import AsJson, out, say_json


def config(
    file: Annotated[Path, typer.Argument(help="JSON config, DeepSpeed's or uni3d's.", show_default=False)],
    world_size: Annotated[int, typer.Option(help="Number of processes.")] = 1,
    pp: Annotated[int | None, typer.Option(help="Pipeline stages.", show_default="the config's")] = None,
    tp: Annotated[
        int | None, typer.Option(help="Tensor-parallel ranks.", show_default="the config's")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a config with all defaults, and where training differs from DeepSpeed."""
    from uni3d.config import batch_triad, load_config
    from uni3d.config.deepspeed_differences import differences

    settings = load_config(file)
    asked = settings.parallel
    degrees = degrees_of(
        world_size, pp=asked.pp if pp is None else pp, dp=asked.dp, tp=asked.tp if tp is None else tp
    )
    triad = batch_triad(settings, degrees["dp"])
    _check_shard_group(settings.shard_group, degrees["dp"])
    resolved = {
        "world_size": world_size,
        **degrees,
        **triad.model_dump(),
        "precision": settings.precision,
        **_sections(settings),
    }
    found = differences(settings, degrees["pp"])
    if as_json:
        pairs = [{"key": key, "difference": text} for key, text in found]
        say_json({"config": resolved, "differences": pairs})
        return
    _print(resolved, found)


def degrees_of(world_size: int, *, pp: int | str, dp: int | str, tp: int | str) -> dict[str, int]:
    """What `parallel.resolve_degrees` gives, which needs torch.

    Raises:
        ValueError: as there.
    """
    given = {"pp": pp, "dp": dp, "tp": tp}
    known = {axis: degree for axis, degree in given.items() if isinstance(degree, int)}
    open_axes = [axis for axis in given if axis not in known]
    if len(open_axes) > 1:
        raise ValueError(
            f"{' and '.join(open_axes)} are both 'auto'; give at least two of pp, dp, tp as numbers"
        )
    for axis, degree in known.items():
        if degree < 1:
            raise ValueError(f"{axis}({degree}) must be at least 1")
    product = 1
    for degree in known.values():
        product *= degree
    equation = " * ".join(f"{axis}({degree})" for axis, degree in given.items())
    if open_axes and world_size % product:
        raise ValueError(
            f"{equation} can't be {world_size}: {world_size} processes were started, "
            f"which {product} doesn't divide"
        )
    if not open_axes and product != world_size:
        raise ValueError(f"{equation} = {product}, but {world_size} processes were started")
    return {axis: known.get(axis, world_size // product) for axis in given}


def _check_shard_group(size: int | None, dp: int) -> None:
    if size is not None and dp % size:
        raise ValueError(f"config: the shard group size {size} must divide dp({dp})")


def _sections(settings: Any) -> dict[str, Any]:
    """Return the config's keys with their defaults, except those that `config` resolves itself."""
    dump: dict[str, Any] = settings.model_dump(mode="json")
    for key in (
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        *("fp16", "bf16"),
    ):
        del dump[key]
    for axis in ("pp", "dp", "tp"):
        del dump["parallel"][axis]
    del dump["data_types"]
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
