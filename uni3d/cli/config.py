"""`uni3d config`: print a config with its defaults filled in, and its differences from DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from uni3d.cli.terminal import AsJson, out, say, say_json

if TYPE_CHECKING:
    from uni3d.config import Config
    from uni3d.config.trainer import Filled


def config(
    file: Annotated[Path, Argument(help="JSON config, DeepSpeed's or uni3d's.", show_default=False)],
    world_size: Annotated[int, Option(help="Number of processes.")] = 1,
    pp: Annotated[int | None, Option(help="Pipeline stages.", show_default="the config's")] = None,
    tp: Annotated[int | None, Option(help="Tensor-parallel ranks.", show_default="the config's")] = None,
    fill: Annotated[
        bool, Option("--fill", help='Fill in "auto" values, as Hugging Face\'s Trainer does.')
    ] = False,
    training_args: Annotated[
        Path | None,
        Option(help="JSON of TrainingArguments to fill in from.", show_default="the Trainer's defaults"),
    ] = None,
    model_config: Annotated[
        Path | None, Option(help="config.json of the model, for its hidden size.", show_default=False)
    ] = None,
    save: Annotated[Path | None, Option(help="Write the filled config here.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Print a config with all defaults, and where training differs from DeepSpeed."""
    from parallel.degrees import check_shard_group, resolve_degrees
    from uni3d.config import load_config, read_config
    from uni3d.config.deepspeed_differences import differences
    from uni3d.config.trainer import standing_in

    if not fill and (training_args or model_config or save):
        raise ValueError("--training-args, --model-config and --save are for --fill; add it")
    values = read_config(file)
    settings = load_config(standing_in(values), file)
    asked = settings.parallel
    degrees = resolve_degrees(
        world_size, pp=asked.pp if pp is None else pp, dp=asked.dp, tp=asked.tp if tp is None else tp
    )
    filled = _filled(values, degrees.dp if fill else None, training_args, model_config)
    settings = load_config(standing_in(filled.values), file)
    check_shard_group(degrees.dp, settings.zero_optimization.stage, settings.shard_group)
    resolved = {"world_size": world_size, **vars(degrees), **_resolved(settings, degrees.dp, filled.left)}
    if save is not None:
        _save(filled.values, save)
    found = differences(settings, degrees.pp)
    if as_json:
        pairs = [{"key": key, "difference": text} for key, text in found]
        origins = {key: {"value": value, "from": name} for key, (value, name) in filled.filled.items()}
        trainer = {"filled": origins, "left": filled.left}
        say_json({"config": resolved, "trainer": trainer, "differences": pairs})
        return
    for line in _of_the_trainer(filled, fill):
        say(line)
    _print(resolved, found)


_BATCHES = {
    "train_batch_size": "train_batch",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "accumulation",
}
"""Keys of the batch sizes, and the names under which they are printed."""


def _filled(
    values: dict[str, Any], dp: int | None, training_args: Path | None, model_config: Path | None
) -> Filled:
    """Fill in the config for `dp` data-parallel ranks; without them, nothing is."""
    from uni3d.config.trainer import FILL_FIRST, Filled, autos
    from uni3d.config.trainer import fill as fill_in

    if dp is None:
        return Filled(values, {}, dict.fromkeys(autos(values), FILL_FIRST))
    return fill_in(values, dp=dp, given=_object(training_args), width=_hidden_size(model_config))


def _resolved(settings: Config, dp: int, left: Mapping[str, str]) -> dict[str, Any]:
    """Return the config with its defaults, and with "auto" where a value stands in for it."""
    from uni3d.config import batch_triad

    if left.keys() & _BATCHES.keys():
        sizes = {name: getattr(settings, key) for key, name in _BATCHES.items()}
    else:
        sizes = batch_triad(settings, dp).model_dump()
    resolved = {**sizes, "precision": settings.precision, **_sections(settings)}
    _show_auto(resolved, left)
    return resolved


def _of_the_trainer(filled: Filled, fill: bool) -> Iterator[str]:
    """Yield one line with the values that Hugging Face's Trainer fills in."""
    parts = [f"{key} {json.dumps(value)} ({origin})" for key, (value, origin) in filled.filled.items()]
    if not fill and filled.left:
        yield (
            f"Hugging Face's Trainer fills in {', '.join(filled.left)}: add --fill, with --training-args "
            "ARGS.json unless its defaults hold"
        )
    elif parts or filled.left:
        left = [f"{key} ({how})" for key, how in filled.left.items()]
        yield "Filled in as by Hugging Face's Trainer: " + "; still auto: ".join(
            ", ".join(some) or "nothing" for some in ((parts, left) if left else (parts,))
        )


def _show_auto(resolved: dict[str, Any], left: Mapping[str, str]) -> None:
    """Put "auto" in place of the values that stand in for it."""
    for key in left:
        section, _, last = key.rpartition(".")
        if last == "enabled":
            if resolved["precision"] == "fp32":
                resolved["precision"] = "auto"
            continue
        name = _BATCHES.get(key, last)
        inner: Any = resolved
        for part in section.replace("optimizer.params", "optimizer").split(".") if section else []:
            inner = inner.get(part, {}) if isinstance(inner, dict) else {}
        if isinstance(inner, dict) and name in inner:
            inner[name] = "auto"


def _object(path: Path | None) -> dict[str, Any]:
    """Return the object in a JSON file; empty without a file."""
    from uni3d.config import read_config

    return {} if path is None else read_config(path)


def _hidden_size(path: Path | None) -> int | None:
    from uni3d.config.trainer import hidden_size

    width = hidden_size(_object(path))
    if path is not None and width is None:
        raise ValueError(f"{path} has no hidden_size; leave out --model-config")
    return width


def _save(values: Mapping[str, Any], path: Path) -> None:
    if path.exists():
        raise ValueError(f"--save {path} exists; give another name")
    path.write_text(json.dumps(values, indent=2) + "\n")


def _sections(settings: Config) -> dict[str, Any]:
    """Return the config's keys with their defaults, except those that `config` resolves itself."""
    known = dict.fromkeys((*_BATCHES, "fp16", "bf16", "data_types"), True)
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
    out().print(table)
    out().print()
    out().print(Text("Differences from DeepSpeed, and what is easily misread:"))
    for key, text in found:
        out().print(Padding(Text.assemble((key, "bold"), f": {text}"), (0, 0, 0, 2), expand=False))


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
