"""The dataset analysis as terminal tables, plots and one HTML file; works on the dictionary statistics makes."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from koret.figures import BLUE, GRAY, INK, ORANGE, RULE, make_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

GLOSSES = {
    "무엇": "what",
    "누구": "who",
    "언제": "when",
    "어디": "where",
    "몇/얼마": "how many",
    "왜": "why",
    "어떻게": "how",
    "어느": "which",
    "기타": "other",
}
_LENGTH_COLUMNS = ("mean", "p5", "p50", "p95", "p99", "max")


class Sheet(NamedTuple):
    """A table before it is drawn: cells are text already; the first column is left-aligned, the others right."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def format_tables(found: Mapping[str, Any]) -> list[Table]:
    """Rich tables of everything ``compute_statistics`` found."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    tables = []
    for sheet in build_sheets(found):
        table = Table(title=sheet.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for i, name in enumerate(sheet.columns):
            table.add_column(name, justify="right" if i else "left", overflow="fold")
        for row in sheet.rows:
            table.add_row(*map(Text, row))
        tables.append(table)
    return tables


def save_report(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write statistics.json, the plots (PNG) and report.html, one file with everything in it; returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "statistics.json", folder / "report.html"]
    files[0].write_text(json.dumps(found, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    figures = dict(draw_figures(found))
    files[1].write_text(_render_html(found, figures), encoding="utf-8")
    return files + [save_figure(figure, folder / f"{name}.png") for name, figure in figures.items()]


# ---- tables


def build_sheets(found: Mapping[str, Any]) -> list[Sheet]:
    """The tables of the report, those without content left out."""
    questions = found["counts"]["questions"]
    types = [
        (f"{name} ({GLOSSES[name]})", f"{count:,}", _percent(count, questions))
        for name, count in found["question_types"].items()
    ]
    kinds = [(kind, f"{count:,}", _percent(count, questions)) for kind, count in found["answer_kinds"].items()]
    sheets = [
        Sheet("Counts", ("what", "number"), [(name, f"{count:,}") for name, count in found["counts"].items()]),
        Sheet("Questions by type", ("type", "questions", "share"), types),
        Sheet("Answers by kind", ("kind", "questions", "share"), kinds),
        Sheet("Lengths", ("text", *_LENGTH_COLUMNS), list(_list_lengths(found))),
        Sheet("Duplicates", ("text", "repeats of an earlier one", "texts that repeat"), _list_duplicates(found)),
        Sheet("Most frequent answers", ("answer", "questions"), _list_frequent(found)),
        Sheet("Questions lost, answers moved", ("reason", "records"), _list_losses(found)),
        Sheet(*_list_tokens(found)),
        Sheet("Overlap with other sets", ("shared", "records", "share"), list(_list_overlap(found))),
    ]
    return [sheet for sheet in sheets if sheet.rows]


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


def _list_lengths(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    measured = [(f"{name}, {unit}", d) for unit, group in found["lengths"].items() for name, d in group.items()]
    measured += [(key.replace("_", " "), found[key]) for key in ("questions_per_article", "passages_per_article")]
    for name, summary in measured:
        if summary["count"]:
            yield name, f"{summary['mean']:,.1f}", *(f"{summary[key]:,}" for key in _LENGTH_COLUMNS[1:])


def _list_duplicates(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [(name, f"{d['repeats']:,}", f"{d['repeated_texts']:,}") for name, d in found["duplicates"].items()]


def _list_frequent(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [(" ".join(text.split()), f"{count:,}") for text, count in found["duplicates"]["answers"]["most_frequent"]]


def _list_losses(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = [(reason, f"{count:,}") for reason, count in found["losses"].items()]
    if found["moved_answers"]:
        rows.append(("kept, but found at the only occurrence of the text", f"{found['moved_answers']:,}"))
    if found["wide_answers"]:
        rows.append(("kept, but no passage holds the whole answer", f"{found['wide_answers']:,}"))
    return rows


def _list_tokens(found: Mapping[str, Any]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    tokens = found["tokens"]
    if not tokens:
        return "", (), []
    rows = [
        ("unknown tokens", f"{100 * tokens['unknown_token_share']:.2f}%"),
        ("words with an unknown token", f"{100 * tokens['unknown_word_share']:.2f}%"),
    ]
    rows.append(("passages measured", f"{tokens['passages_measured']:,}"))
    limit = tokens["max_seq_length"]
    rows += [(f"{name}s cut at {limit} tokens", f"{100 * s:.2f}%") for name, s in tokens["truncated"].items()]
    return "Tokens", ("measure", "value"), rows


def _list_overlap(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, shared in found["overlap"].items():
        for kind in ("titles", "passages", "questions"):
            yield f"{kind} also in {name}", f"{shared[kind]:,}", _percent(shared[kind], shared["of"][kind])
        for here, there, count in shared["splits"][:20]:
            yield f"  questions of {here} in {there}", f"{count:,}", _percent(count, shared["questions"])


# ---- plots


def draw_figures(found: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of every plot the statistics have content for."""
    if found["counts"]["questions"]:
        figure, (ax,) = make_figure(height=3.9)
        types = {f"{name} {GLOSSES[name]}": count for name, count in found["question_types"].items()}
        _draw_shares(ax, types, "Questions by type")
        yield "question_types", figure
        figure, (ax,) = make_figure(height=2.6)
        _draw_shares(ax, found["answer_kinds"], "Answers by kind")
        yield "answer_kinds", figure
    yield from _draw_lengths("lengths", found["lengths"]["characters"], "characters")
    if found["tokens"]:
        limit = found["tokens"]["max_seq_length"]
        yield from _draw_lengths("tokens", found["lengths"]["tokens"], "tokens", limit)
    articles = {key.replace("_", " "): found[key] for key in ("questions_per_article", "passages_per_article")}
    yield from _draw_lengths("per_article", articles, "number")


def _draw_shares(ax: Axes, counts: Mapping[str, int], title: str) -> None:
    names, values = list(counts), list(counts.values())
    bars = ax.barh(names, values, color=BLUE, height=0.68)
    total = sum(values)
    labels = [f"{_percent(value, total)}  ({value:,})" for value in values]
    ax.bar_label(bars, labels, padding=4, fontsize=8.5, color=INK)
    ax.invert_yaxis()
    ax.set_xlim(0, max(values) * 1.22)
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)
    ax.set_title(title, loc="left", fontsize=11, color=INK)


def _draw_lengths(
    name: str, summaries: Mapping[str, Mapping[str, Any]], unit: str, limit: int | None = None
) -> Iterator[tuple[str, Figure]]:
    filled = {label: summary for label, summary in summaries.items() if summary["count"]}
    if not filled:
        return
    columns = 2
    figure, axes = make_figure(columns, -(-len(filled) // columns), width=4.6, height=2.9)
    for ax, (label, summary) in zip(axes, filled.items(), strict=False):
        _draw_histogram(ax, label, summary, unit, limit)
    for ax in axes[len(filled) :]:
        ax.set_axis_off()
    yield name, figure


def _draw_histogram(ax: Axes, label: str, summary: Mapping[str, Any], unit: str, limit: int | None) -> None:
    from matplotlib.ticker import MaxNLocator

    edges, counts = summary["histogram"]["edges"], summary["histogram"]["counts"]
    left = [edge - 0.5 for edge in edges[:-1]]  # a bar covers whole numbers
    ax.bar(left, counts, width=edges[1] - edges[0], align="edge", color=BLUE)
    ax.grid(axis="y", color=RULE, linewidth=0.6)
    top = max(counts) * 1.18
    ax.set_ylim(0, top)
    _mark_value(ax, summary["p50"], f"median {summary['p50']:,}", ORANGE, top)
    _mark_value(ax, summary["p95"], f"95% {summary['p95']:,}", GRAY, top * 0.92)
    if limit is not None and edges[0] < limit <= edges[-1]:
        _mark_value(ax, limit, f"limit {limit:,}", INK, top * 0.84, linestyle="--")
    ax.set_title(label, loc="left", fontsize=10.5, color=INK)
    beyond = summary["histogram"]["beyond"]
    ax.set_xlabel(unit + (f" ({beyond:,} longer not shown, up to {summary['max']:,})" if beyond else ""), fontsize=8.5)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _mark_value(ax: Axes, value: float, words: str, color: str, y: float, linestyle: str = "-") -> None:
    """A line at ``value`` with its words on the side that has room."""
    low, high = ax.get_xlim()
    is_far = value > low + 0.8 * (high - low)
    ax.axvline(value, color=color, linewidth=1.2, linestyle=linestyle)
    side = "right" if is_far else "left"
    ax.text(value, y, f" {words} ", color=color, fontsize=8, va="top", ha=side)


# ---- HTML

_STYLE = (
    "body{font:15px/1.5 system-ui,'Noto Sans KR','Malgun Gothic',sans-serif;color:#22262b;max-width:60rem;"
    "margin:2rem auto;padding:0 1rem}h1{font-size:1.6rem}h2{font-size:1.1rem;margin:2rem 0 .4rem}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid #d9dde3;text-align:right;"
    "vertical-align:top}td:first-child,th:first-child{text-align:left;padding-left:0;white-space:pre-wrap}"
    "img{max-width:100%;height:auto;margin-top:.8rem}"
)
_FIGURE_BELOW = {
    "Questions by type": ("question_types",),
    "Answers by kind": ("answer_kinds",),
    "Lengths": ("lengths", "per_article", "tokens"),
}


def _render_html(found: Mapping[str, Any], figures: Mapping[str, Figure]) -> str:
    parts = []
    for sheet in build_sheets(found):
        head = "".join(f"<th>{html.escape(name)}</th>" for name in sheet.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in sheet.rows
        )
        parts.append(f"<h2>{html.escape(sheet.title)}</h2>\n<table>\n<tr>{head}</tr>\n{body}</table>")
        parts += [_embed(name, figures[name]) for name in _FIGURE_BELOW.get(sheet.title, ()) if name in figures]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Dataset analysis</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Dataset analysis</h1>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _embed(name: str, figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor="white")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(name.replace("_", " "))}" src="data:image/png;base64,{data}">'
