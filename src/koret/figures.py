"""Plots with readable Korean labels, drawn without a display."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

BLUE, ORANGE, GRAY = "#2f6db3", "#e07b39", "#8a8f98"
INK, RULE = "#22262b", "#d9dde3"

# Families that hold Hangul, as systems name them.
_SYSTEM_FONTS = (
    "NanumGothic",
    "Nanum Gothic",
    "Noto Sans CJK KR",
    "Noto Sans KR",
    "Malgun Gothic",
    "Apple SD Gothic Neo",
    "AppleGothic",
    "UnDotum",
    "Baekmuk Dotum",
)


def use_korean_font() -> str | None:
    """Make matplotlib write Hangul; returns the family used, None (and a warning) where no font has it.

    The font file of the installed ``koreanize_matplotlib`` is used without importing that package, which would
    set up matplotlib on import; otherwise a Korean font of the system.
    """
    import matplotlib
    from matplotlib import font_manager

    path = _find_packaged_font()
    if path:
        font_manager.fontManager.addfont(str(path))
        family = font_manager.FontProperties(fname=str(path)).get_name()
    else:
        installed = {font.name for font in font_manager.fontManager.ttflist}
        family = next((name for name in _SYSTEM_FONTS if name in installed), None)
    if family is None:
        logger.warning(
            "no Korean font found: labels in plots will be boxes; install koreanize-matplotlib or NanumGothic"
        )
        return None
    matplotlib.rcParams["font.family"] = [family, "DejaVu Sans"]
    matplotlib.rcParams["axes.unicode_minus"] = False
    return family


def _find_packaged_font() -> Path | None:
    spec = importlib.util.find_spec("koreanize_matplotlib")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "fonts" / "NanumGothic.ttf"
        if path.is_file():
            return path
    return None


def make_figure(columns: int = 1, rows: int = 1, width: float = 6.4, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """A figure of ``rows * columns`` plain axes, row by row; ``width`` and ``height`` are inches per axes."""
    from matplotlib.figure import Figure

    use_korean_font()
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.spines["bottom"].set_color(GRAY)
        ax.tick_params(colors=INK, length=0, labelsize=9)
        ax.set_axisbelow(True)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG at 150 dots per inch; returns ``path``."""
    figure.savefig(path, dpi=150, facecolor="white")
    return path
