"""Sizes, rates and counts with their units: parsed from options, and formatted for people. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
BYTES = {"": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12} | {
    f"{letter}iB": 2.0 ** (10 * power) for power, letter in enumerate("KMGT", start=1)
}
RATES = BYTES | {f"{unit}/s": size for unit, size in BYTES.items() if unit}
FLOPS = {"": 1.0} | {f"{unit}FLOP/s": 10.0**power for unit, power in {"G": 9, "T": 12, "P": 15}.items()}


def format_bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def parse(text: str, units: Mapping[str, float], option: str, examples: str) -> float:
    """Return the value of a number with a unit, e.g. 80e9 for "80GB".

    Raises:
        ValueError: `text` isn't a positive, finite number followed by one of `units`.
    """
    match = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?) ?([A-Za-z/]*)", text)
    try:
        value = float(match[1]) * units[match[2]] if match else 0.0
    except (ValueError, KeyError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{option} {text}: expected a positive number with a known unit, e.g. {examples}")
    return value
