"""Pictures of an evaluation: scores, recall curves with bands, slices, wins and losses."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from koret.evaluation.metrics import PRIMARY
from koret.evaluation.report import EvaluationReport, Row, Section
from koret.evaluation.scores import label
from koret.evaluation.significance import Interval
from koret.figures import BLUE, GRAY, INK, ORANGE, RULE, make_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREEN, VIOLET = "#4a9a6f", "#8466ad"
_COLOURS = {"model": BLUE, "base": GRAY}
_OTHERS = (ORANGE, "#c9a227", GREEN, VIOLET)
LEAST_POINTS_RASTERED = 2000


def save_plots(report: EvaluationReport, folder: str | Path) -> dict[str, str]:
    """Every picture as PNG and SVG in ``folder``: scores-*, recall-*, slices-*, moves-* per task.

    Returns the SVG texts by file name without ending.
    """
    pictures = {}
    for name, figure in draw_report(report):
        save_figure(figure, Path(folder) / f"{name}.png")
        pictures[name] = render_svg(figure)
        (Path(folder) / f"{name}.svg").write_text(pictures[name], encoding="utf-8")
    return pictures


def draw_report(report: EvaluationReport) -> Iterator[tuple[str, Figure]]:
    """(file name without ending, figure) of every picture the report has numbers for."""
    for name, section in report.name_sections():
        kinds: tuple[tuple[str, Callable[[Section], Figure | None]], ...] = (
            ("scores", draw_scores),
            ("recall", draw_recall),
            ("slices", draw_slices),
            ("moves", draw_moves),
        )
        for kind, draw in kinds:
            figure = draw(section)
            if figure is not None:
                yield f"{kind}-{name}", figure


def draw_scores(section: Section) -> Figure:
    """nDCG@10, MAP, recall@10 and MRR@10 of every system, with 95% intervals."""
    colours = _choose_colours(section.rows)
    figure, (axis,) = make_figure(width=8.6, height=1.1 + 0.28 * len(section.rows) * 1.6)
    step = 0.8 / len(section.rows)
    places = np.arange(len(PRIMARY))
    for i, row in enumerate(section.rows):
        at = places - 0.4 + step * (i + 0.5)
        _draw_bars(axis, at, [row.metrics[name] for name in PRIMARY], step * 0.86, colours[row.system], row.system)
    axis.set_xticks(places, [label(name) for name in PRIMARY])
    axis.set_ylim(0, 1.02)
    _finish(axis, f"{section.task.name}: {len(section.task.queries):,} questions, 95% intervals over articles")
    return figure


def draw_recall(section: Section) -> Figure:
    """Recall at every cut-off, with the 95% band."""
    colours = _choose_colours(section.rows)
    figure, (axis,) = make_figure(width=7.2, height=4.2)
    for row in section.rows:
        ks = list(row.curve)
        style, colour = "--" if row.role == "fusion" else "-", colours[row.system]
        axis.plot(ks, [row.curve[k].mean for k in ks], style, color=colour, label=row.system, linewidth=1.8)
        lows, highs = ([getattr(row.curve[k], end) for k in ks] for end in ("low", "high"))
        if row.role in ("base", "model") or row.system == section.strongest:
            axis.fill_between(ks, lows, highs, color=colour, alpha=0.14, linewidth=0)
    axis.set_xscale("log")
    shown = [k for k in (1, 2, 5, 10, 20, 50, 100) if k <= max(ks)]
    axis.set_xticks(shown, [str(k) for k in shown])
    axis.minorticks_off()
    axis.set_xlabel("results looked at (k)", color=INK)
    axis.set_ylim(0, 1.02)
    _finish(axis, f"{section.task.name}: recall@k with 95% bands", drop=0.14)
    return figure


def draw_slices(section: Section) -> Figure | None:
    """nDCG@10 per slice of base, model and the strongest BM25; None without slices."""
    if not section.slices:
        return None
    rows = [row for row in section.rows if row.role in ("base", "model") or row.system == section.strongest]
    colours = _choose_colours(rows)
    dimensions = list(dict.fromkeys(part.dimension for part in section.slices))
    figure, (axis,) = make_figure(width=8.6, height=1.2 + 0.34 * (len(section.slices) + len(dimensions)))
    place, ticks, names = 0.0, [], []
    for dimension in dimensions:
        axis.text(-0.01, place, dimension, transform=axis.get_yaxis_transform(), ha="right", va="center",
                  fontsize=9.5, color=BLUE)  # fmt: skip
        place += 1
        for part in (p for p in section.slices if p.dimension == dimension):
            for i, row in enumerate(rows):
                value, at = part.means[row.system], place + (i - (len(rows) - 1) / 2) * 0.2
                first = part is section.slices[0]
                axis.plot(value.mean, at, "o", color=colours[row.system], markersize=5,
                          label=row.system if first else None)  # fmt: skip
                axis.plot([value.low, value.high], [at, at], color=colours[row.system], linewidth=1.6, alpha=0.6)
            ticks.append(place)
            names.append(f"{part.name}  ({part.queries:,})")
            place += 1
    axis.set_yticks(ticks, names)
    axis.set_ylim(place - 0.4, -0.8)
    axis.set_xlim(-0.02, 1.02)
    title = f"{section.task.name}: nDCG@10 by slice (questions), 95% intervals"
    axis.set_title(title, color=INK, fontsize=11, loc="left")
    axis.grid(axis="x", color=RULE, linewidth=0.8)
    axis.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.03), ncols=len(rows))
    return figure


def draw_moves(section: Section) -> Figure | None:
    """Every question's nDCG@10 with the base and with the tuned model; None without a baseline."""
    if section.verdict is None:
        return None
    base, model = section.find_scores("base"), section.find_scores("model")
    before, after = base.per_query[PRIMARY[0]], model.per_query[PRIMARY[0]]
    gap = after - before
    jitter = np.random.default_rng(0).uniform(-0.012, 0.012, (2, len(gap)))
    figure, (axis,) = make_figure(width=5.2, height=5.2)
    raster = len(gap) >= LEAST_POINTS_RASTERED
    for chosen, colour, words in (
        (gap < 0, ORANGE, "losses"), (np.abs(gap) == 0, GRAY, "ties"), (gap > 0, BLUE, "wins"),
    ):  # fmt: skip
        axis.plot((before + jitter[0])[chosen], (after + jitter[1])[chosen], "o", color=colour, alpha=0.45,
                  markersize=4, markeredgewidth=0, label=f"{chosen.sum():,} {words}", rasterized=raster)  # fmt: skip
    axis.plot([0, 1], [0, 1], color=GRAY, linewidth=0.8, zorder=0)
    axis.set_xlabel(f"nDCG@10, {base.system}", color=INK)
    axis.set_ylabel(f"nDCG@10, {model.system}", color=INK)
    axis.set_xlim(-0.03, 1.03)
    axis.set_ylim(-0.03, 1.03)
    axis.set_aspect("equal")
    _finish(axis, f"{section.task.name}: every question", legend="lower right")
    return figure


def render_svg(figure: Figure) -> str:
    """The figure as SVG text that is the same in every run and names no other document."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "koret"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text[text.index("<svg") :]


def _draw_bars(axis, places: np.ndarray, values: list[Interval], width: float, colour: str, name: str) -> None:
    means = np.array([value.mean for value in values])
    axis.bar(places, means, width, color=colour, label=name)
    spans = np.array([[value.mean - value.low, value.high - value.mean] for value in values]).T
    if np.isfinite(spans).all():
        axis.errorbar(places, means, np.maximum(spans, 0), fmt="none", ecolor=INK, elinewidth=1, capsize=0)


def _choose_colours(rows: list[Row]) -> dict[str, str]:
    others = iter(_OTHERS)
    return {row.system: _COLOURS.get(row.role) or next(others, INK) for row in rows}


def _finish(axis, title: str, legend: str = "outside", drop: float = 0.09) -> None:
    axis.set_title(title, color=INK, fontsize=11, loc="left")
    axis.grid(axis="y", color=RULE, linewidth=0.8)
    if legend == "outside":
        axis.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -drop), ncols=3)
    else:
        axis.legend(frameon=False, fontsize=9, loc=legend)
