"""Evaluation reports and comparisons as terminal tables, 100 columns wide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from koret.evaluation.report import EvaluationReport, Section
from koret.evaluation.scores import label
from koret.evaluation.significance import Difference, Interval

if TYPE_CHECKING:
    from koret.evaluation.comparison import Comparison, Move

COLUMNS = ("ndcg@10", "map", "mrr@10", "recall@10")
ARTICLE_COLUMNS = ("article/ndcg@10", "article/mrr@10", "article/recall@10", "article/accuracy@1")
COLOURS = {"better": "green", "worse": "red", "mixed": "yellow", "not distinguishable": "yellow"}


def print_report(report: EvaluationReport, console: Console) -> None:
    """The whole report: a table per task, slices of the first task, verdicts, what the audit allows."""
    console.print(format_report(report))


def format_report(report: EvaluationReport, *, slices: bool = True) -> RenderableType:
    """Everything ``print_report`` prints; without ``slices`` the short form that closes a training."""
    parts: list[RenderableType] = []
    for section in (*report.sections, *report.extra):
        parts += list(_format_section(section))
    if slices:
        for section in report.sections:
            parts += list(_format_slices(section))
    if report.verdict:
        colour = COLOURS[report.verdict]
        parts.append(Text.assemble((report.verdict.upper(), f"bold {colour}"), "  ", report.conclusion))
    for section in report.sections:
        for line in section.lines[1 if section.verdict else 0 :]:
            parts.append(Text(f"{section.task.name}: {line}"))
    parts.append(Text(report.cleanness, style="" if report.audit and report.audit.clean else "yellow"))
    return Group(*parts)


def format_table(section: Section) -> Table:
    """Base, tuned, BM25 and fusion with 95% intervals, and tuned - base below."""
    task = section.task
    facts = f"{len(task.queries):,} questions, {len(task.corpus):,} texts"
    if task.excluded:
        facts += f", {len(task.excluded)} questions not scored"
    table = _start_table(f"{task.name}  ({facts})", COLUMNS)
    best = {name: max(row.metrics[name].mean for row in section.rows) for name in COLUMNS}
    for row in section.rows:
        cells = [_format_interval(row.metrics[name], row.metrics[name].mean == best[name]) for name in COLUMNS]
        table.add_row(escape(row.system), *cells, style="bold" if row.role == "model" else None)
    if section.gaps:
        table.add_section()
        base, model = section.find_row("base"), section.find_row("model")
        name = f"{model.system} - {base.system}" if base and model else "difference"
        table.add_row(escape(name), *(_format_gap(section.gaps[metric]) for metric in COLUMNS))
    return table


def format_article_table(section: Section) -> Table | None:
    """The same systems at article level (an article ranks where its best passage does); None where it says nothing."""
    rows = [row for row in section.rows if ARTICLE_COLUMNS[0] in row.metrics]
    if not rows:
        return None
    table = _start_table(f"{section.task.name}, whole articles (rank of the best passage)", ARTICLE_COLUMNS)
    for row in rows:
        cells = [_format_interval(row.metrics[name], False) for name in ARTICLE_COLUMNS]
        table.add_row(escape(row.system), *cells, style="bold" if row.role == "model" else None)
    return table


def format_comparison(comparison: Comparison) -> RenderableType:
    """Wins, losses and ties, the paired test, and the largest moves either way with their passages."""
    a, b = comparison.names
    counts = f"{b} wins {comparison.wins}, loses {comparison.losses}, ties {comparison.ties}"
    parts: list[RenderableType] = [
        Text(f"{comparison.task}: nDCG@10 of {len(comparison.query_ids):,} questions", style="bold"),
        Text(counts),
        Text(comparison.verdict.sentence, style=COLOURS[comparison.verdict.verdict]),
    ]
    if comparison.cleanness:
        parts.append(Text(comparison.cleanness))
    for title, moves in ((f"{b} better than {a}", comparison.gains), (f"{b} worse than {a}", comparison.drops)):
        if moves:
            parts.append(Text(f"\n{title}, the {len(moves)} largest moves", style="bold"))
            parts += [_format_move(move, a, b) for move in moves]
    return Group(*parts)


def _format_section(section: Section) -> Iterator[RenderableType]:
    yield format_table(section)
    articles = format_article_table(section)
    if articles is not None:
        yield articles
    if section.probes:
        yield _format_probes(section)
    for note in section.task.notes:
        yield Text(f"{section.task.name}: {note}", style="dim")
    reasons = [reason for _, reason in section.task.excluded]
    for reason in dict.fromkeys(reasons):
        ids = [query for query, why in section.task.excluded if why == reason]
        shown = ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
        yield Text(f"{section.task.name}: {len(ids)} questions not scored, {reason} ({shown})", style="dim")


def _format_slices(section: Section) -> Iterator[RenderableType]:
    if not section.slices:
        return
    title = f"{section.task.name}, nDCG@10 by slice"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    rows = [row for row in section.rows if row.role != "fusion"][:3]
    table.add_column("slice", no_wrap=True, max_width=34)
    table.add_column("questions", justify="right")
    for row in rows:
        table.add_column(escape(row.system), justify="right", no_wrap=True)
    compared = section.verdict or section.lexical
    if compared:
        table.add_column("tuned - base" if section.verdict else "model - BM25", justify="right", no_wrap=True)
    dimension = None
    for part in section.slices:
        if part.dimension != dimension:
            dimension = part.dimension
            table.add_row(f"[bold]{escape(dimension)}[/]")
        cells = [_drop_zero(f"{part.means[row.system].mean:.3f}") for row in rows]
        gap = part.gap if section.verdict else part.lexical_gap
        table.add_row(f"  {escape(part.name)}", f"{part.queries:,}", *cells, *([_format_gap(gap)] if gap else []))
    yield table


def _format_probes(section: Section) -> RenderableType:
    title = f"{section.task.name}, nDCG@10 gained or lost when questions change (* beyond noise)"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    table.add_column("questions changed", justify="right")
    rows = [row for row in section.rows if any(row.system in probe.drops for probe in section.probes)]
    for row in rows:
        table.add_column(escape(row.system), justify="right", no_wrap=True)
    for probe in section.probes:
        drops = [probe.drops[row.system] for row in rows]
        cells = [_drop_zero(f"{d.mean:+.3f}") + (" " if d.outcome == "not distinguishable" else "*") for d in drops]
        table.add_row(probe.title, f"{probe.changed:.0%}", *cells)
    return table


def _start_table(title: str, metrics: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for name in metrics:
        table.add_column(label(name), justify="right", no_wrap=True, min_width=17)
    return table


def _format_interval(value: Interval, best: bool) -> str:
    mean = _drop_zero(f"{value.mean:.3f}")
    mean = f"[bold]{mean}[/]" if best else mean
    if value.low != value.low:
        return mean
    return f"{mean} [dim]{_drop_zero(f'{value.low:.3f}')}–{_drop_zero(f'{value.high:.3f}')}[/]"


def _format_gap(gap: Difference) -> str:
    text = _drop_zero(f"{gap.mean:+.3f}")
    if gap.low == gap.low:
        text += f" [dim]{_drop_zero(f'{gap.low:+.3f}')}…{_drop_zero(f'{gap.high:+.3f}')}[/]"
    return f"[{COLOURS[gap.outcome]}]{text}[/]" if gap.outcome != "not distinguishable" else text


def _drop_zero(number: str) -> str:
    """0.123 -> .123, -0.123 -> -.123: four columns of numbers have to fit."""
    return number.replace("0.", ".", 1) if number.lstrip("+-").startswith("0.") else number


def _format_move(move: Move, a: str, b: str) -> RenderableType:
    head = f"{move.difference:+.3f}  {move.query}"
    lines = [f"    right ({_format_rank(move.rank_a)} -> {_format_rank(move.rank_b)}): {_shorten(move.relevant)}"]
    for name, text, rank in ((a, move.top_a, move.rank_a), (b, move.top_b, move.rank_b)):
        if rank != 1:
            lines.append(f"    first for {name}: {_shorten(text)}")
    return Text.assemble((head, "bold"), "\n", ("\n".join(lines), "dim"))


def _format_rank(rank: int | None) -> str:
    return f"rank {rank}" if rank else "not found"


def _shorten(text: str, most: int = 110) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
