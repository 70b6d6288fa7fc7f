"""What the pictures of `uni3d plot` share: their look, and how they become files.

matplotlib is loaded when something is drawn, and not before. Figures are made without pyplot: nothing is
kept open, and no display is looked for.
"""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase
    from matplotlib.figure import Figure
    from matplotlib.text import Text

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart by colour-blind readers too (Okabe and Ito 2008)."""
GREY = "0.35"
DPI = 150


def check_matplotlib() -> None:
    """Raises ValueError where matplotlib isn't installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f"drawing needs matplotlib ({error}); pip install 'uni3d[plot]'") from None


def make_figure(width: float, height: float) -> Figure:
    """An empty one, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Axes) -> None:
    """The look of all curves."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.margins(x=0.01)


def renderer_of(figure: Figure) -> RendererBase:
    """What measures texts, after everything has found its place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.draw_without_rendering()
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg), "make_figure gave it one"
    renderer: RendererBase = canvas.get_renderer()  # type: ignore[no-untyped-call]
    return renderer


def size_of(text: Text, renderer: RendererBase) -> tuple[float, float]:
    """Width and height in pixels."""
    box = text.get_window_extent(renderer)
    return box.width, box.height


def check_output(path: Path, force: bool) -> None:
    """Raises ValueError or OSError for a file that can't or mustn't be written, before any work."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path} must end in .png")
    if path.is_dir() or (path.exists() and not force):
        raise FileExistsError(f"{path} exists; give another name, or --force to replace it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")


def save(figure: Figure, path: Path, force: bool) -> None:
    """Write the picture; the file is there when it is whole, and replaces none unless forced."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(picture.getvalue())
        check_output(path, force)  # may have come in the meantime
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
