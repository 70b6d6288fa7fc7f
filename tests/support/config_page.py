"""Print the tables of config keys in `docs/from-deepspeed.md`; a test compares the two."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from uni3d.config import Config, deepspeed_keys, torch_optimizers
from uni3d.config import optimizer as optimizer_config
from uni3d.config.scheduler import SCHEDULES
from uni3d.config.strict import sections_of


def tables() -> str:
    """Return Markdown tables of the keys that are honoured, read as others, without effect, and refused."""
    return "\n".join(
        [
            "**Honoured.**\n",
            *_table(("section", "keys, with their defaults"), _honoured(Config)),
            "\n**`optimizer.type`**, in any case, with parameters in `optimizer.params`. Other classes of",
            "`torch.optim` are given by name, with their own parameters:",
            f"{_others()}.\n",
            *_table(("type", "parameters and their defaults"), _optimizers()),
            "\n**`scheduler.type`**, with parameters in `scheduler.params`.\n",
            *_table(("type", "parameters and their defaults"), _schedules()),
            "\n**Read as another key.**\n",
            *_table(("keys", "read as"), ((k, f"`{v}`") for v, k in _by_reason(deepspeed_keys.READ_AS))),
            "\n**Without effect**: accepted, and reported when training begins.\n",
            *_table(("section", "keys, and why"), _by_section(deepspeed_keys.NO_MEANING)),
            '\n**Refused**, unless the value turns them off (`null`, `false`, `"enabled": false`).\n',
            *_table(("section", "keys, and why"), _by_section(deepspeed_keys.REFUSED)),
            "\n**Refused optimizers.**\n",
            *_table(("reason", "types"), _by_reason(optimizer_config.REFUSED)),
        ]
    )


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def _honoured(section: type[BaseModel], within: str = "") -> Iterator[tuple[str, str]]:
    """Yield each section, first the whole config, with a line for each of its own keys."""
    lines, inside = [], []
    for name, field in section.model_fields.items():
        inner = sections_of(field.annotation)
        if name in ("optimizer", "scheduler"):
            continue
        if inner:
            inside.append((inner[0], f"{within}{name}."))
            continue
        text = (section.__doc__ if name == "enabled" else field.description) or ""
        lines.append(f"`{within}{name}` {_default(field.default)}: {' '.join(text.split())}")
    yield within.rstrip(".") or "(whole)", "<br>".join(lines)
    for further, name in inside:
        yield from _honoured(further, name)


def _others() -> str:
    own = {"Adam", "AdamW", "Muon", *torch_optimizers.REFUSED}
    return ", ".join(f"`{name}`" for name in torch_optimizers.names() if name not in own)


def _optimizers() -> Iterator[tuple[str, str]]:
    own: dict[str, type[BaseModel]] = {
        "Adam`, `AdamW": optimizer_config.AdamParams,
        "Lion": optimizer_config.LionParams,
        "Muon": optimizer_config.MuonParams,
    }
    for name, section in own.items():
        yield f"`{name}`", _parameters(section)


def _schedules() -> Iterator[tuple[str, str]]:
    for name, section in SCHEDULES.items():
        yield f"`{name}`", _parameters(section)


def _parameters(section: type[BaseModel]) -> str:
    return ", ".join(f"`{name}` {_default(f.default)}".rstrip() for name, f in section.model_fields.items())


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "(required)"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f'"{value}"' if isinstance(value, str) else str(list(value) if isinstance(value, tuple) else value)


def _by_section(keys: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each section of the config, first the whole config, with its keys by reason."""
    sections: dict[str, dict[str, str]] = {}
    for key, reason in sorted(keys.items(), key=lambda item: "." in item[0]):
        section, dot, _ = key.partition(".")
        sections.setdefault(section if dot else "(whole)", {})[key] = reason
    for section, inner in sections.items():
        parts = [f"{names}: {reason}" for reason, names in _by_reason(inner)]
        yield section, "; ".join(parts)


def _by_reason(keys: dict[str, str]) -> Iterator[tuple[str, str]]:
    for reason, names in deepspeed_keys.by_reason(keys).items():
        yield reason, ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    print(tables())
