"""Common style of the pictures of `uni3d plot`, and writing them to files.

matplotlib is loaded only when something is drawn. Figures are made without pyplot, so none stays open and no
display is needed.
"""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Distinguishable for colour-blind readers too (Okabe and Ito 2008)."""
GREY = "0.35"
DPI = 110


def check_matplotlib() -> None:
    """Raises ValueError if matplotlib isn't installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f"drawing needs matplotlib ({error}); pip install 'uni3d[plot]'") from None


def make_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_output(path: Path, force: bool) -> None:
    """Check, before any work, that the picture may be written.

    Raises:
        ValueError: its name doesn't end in .png.
        OSError: it exists and `force` is false, or its folder doesn't exist.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: expected a name that ends in .png")
    if path.is_dir() or (path.exists() and not force):
        raise FileExistsError(f"{path} exists; give another name, or --force to replace it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: no such folder: {path.parent}")


def save(figure: Figure, path: Path, force: bool) -> None:
    """Write the picture. The file appears when it is complete, and replaces another only with `force`."""
    from PIL import Image

    drawn, picture = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    # A palette makes the file a third of the size, with no visible difference.
    palette = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    palette.save(picture, format="png", optimize=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(picture.getvalue())
        check_output(path, force)  # it may have appeared in the meantime
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
