"""The whole evaluation as one HTML file: pictures inside, no link to anywhere."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path

from koret.evaluation.comparison import Move, compare_scores
from koret.evaluation.metrics import PRIMARY
from koret.evaluation.report import EvaluationReport, Section
from koret.evaluation.scores import format_gap, label
from koret.evaluation.significance import Difference, Interval

MOVES = 20
COLUMNS = (*PRIMARY, "recall@1", "recall@100", "precision@10", "article/recall@10")
_STYLE = """
:root { color-scheme: light; --ink: #22262b; --soft: #5d646d; --rule: #d9dde3; --good: #1d7a4c; --bad: #b3402a; }
body { font: 15px/1.55 system-ui, "Noto Sans KR", "Apple SD Gothic Neo", "Malgun Gothic", sans-serif; color: var(--ink);
  max-width: 66rem; margin: 2.5rem auto; padding: 0 1.25rem; background: #fff; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; } p { margin: .5rem 0; } .soft { color: var(--soft); }
.verdict { border-left: 5px solid var(--soft); padding: .5rem 1rem; margin: 1.2rem 0; background: #f6f7f9; }
.verdict.better { border-color: var(--good); } .verdict.worse, .verdict.mixed { border-color: var(--bad); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem .3rem 0; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.model td { font-weight: 600; } td small { color: var(--soft);
  font-weight: 400; } .better { color: var(--good); } .worse { color: var(--bad); } .verdict.better, .verdict.worse {
  color: inherit; } svg { max-width: 100%; height: auto; } details { margin: .4rem 0; } summary { cursor: pointer; }
.move { border-top: 1px solid var(--rule); padding: .6rem 0; } .move p { margin: .15rem 0; }
"""


def render_html(report: EvaluationReport, pictures: Mapping[str, str]) -> str:
    """The report as one HTML document; every text from data is escaped.

    ``pictures`` are SVG texts by name, as ``plots.save_plots`` returns them.
    """
    model = escape(Path(report.model).name)
    against = f" against {escape(Path(report.baseline).name)}" if report.baseline else ""
    parts = [
        f"<h1>{model}{against}</h1>",
        f"<p class=soft>{escape(_describe_data(report))}</p>",
    ]
    if report.verdict:
        parts.append(
            f'<div class="verdict {report.verdict.split()[0]}"><strong>{escape(report.verdict.capitalize())}.</strong> '
            f"{escape(report.conclusion)}</div>"
        )
    parts.append(f"<p>{escape(report.cleanness)}</p>")
    sections = report.name_sections()
    for name, section in sections[: len(report.sections)]:
        parts += _render_section(name, section, pictures)
    if report.extra:
        parts.append("<h2>Elsewhere</h2><p class=soft>Sets that must not get worse.</p>")
        for name, section in sections[len(report.sections) :]:
            parts += _render_section(name, section, pictures)
    parts += _render_audit(report)
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="ko"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{model}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _describe_data(report: EvaluationReport) -> str:
    data = report.data
    return (
        f"{data.get('source', '')}: {data.get('articles_asked', 0):,} of {data.get('articles', 0):,} articles asked "
        f"about (split: {data.get('split', '')}), {data.get('passages', 0):,} passages, fingerprint "
        f"{str(data.get('fingerprint', ''))[:12]}"
    )


def _render_section(name: str, section: Section, pictures: Mapping[str, str]) -> Iterator[str]:
    task = section.task
    yield f"<h2>{escape(task.name)}</h2>"
    yield (
        f"<p class=soft>{len(task.queries):,} questions over {len(task.corpus):,} texts. Intervals are 95%, by "
        "bootstrap over whole articles; differences are paired.</p>"
    )
    yield from (f"<p>{escape(line)}</p>" for line in section.lines)
    yield _render_scores(section)
    for kind in ("scores", "recall", "moves", "slices"):
        picture = pictures.get(f"{kind}-{name}")
        if picture is not None:
            yield f"<figure>{_inline(picture, f'{kind}: {task.name}')}</figure>"
    yield from _render_slices(section)
    yield from _render_probes(section)
    yield from _render_moves(section)
    if task.notes or task.excluded:
        items = [*task.notes, *(f"{query}: {reason}" for query, reason in task.excluded)]
        title = f"{len(task.excluded)} questions not scored, {len(task.notes)} notes"
        yield f"<details><summary>{title}</summary><ul>{_wrap('li', items)}</ul></details>"


def _render_scores(section: Section) -> str:
    names = [name for name in COLUMNS if any(name in row.metrics for row in section.rows)]
    titles = ["", *(("article " if name.startswith("article/") else "") + label(name) for name in names)]
    rows = []
    for row in section.rows:
        cells = [_format_interval(row.metrics[name]) if name in row.metrics else "" for name in names]
        rows.append(_render_row([escape(row.system), *cells], row.role))
    if section.gaps:
        gaps = [_format_gap(section.gaps[name]) if name in section.gaps else "" for name in names]
        rows.append(_render_row(["difference", *gaps], "gap"))
    return _render_table(titles, rows)


def _render_slices(section: Section) -> Iterator[str]:
    if not section.slices:
        return
    systems = [row.system for row in section.rows]
    titles = ["slice", "questions", "articles", *systems, "tuned - base", "model - BM25"]
    rows = [
        _render_row(
            [
                escape(f"{part.dimension}: {part.name}"),
                f"{part.queries:,}",
                f"{part.groups:,}",
                *(_format_interval(part.means[system]) for system in systems),
                _format_gap(part.gap) if part.gap else "",
                _format_gap(part.lexical_gap) if part.lexical_gap else "",
            ]
        )
        for part in section.slices
    ]
    yield (
        "<details><summary>All slices, nDCG@10</summary><p class=soft>With this many comparisons about one in twenty "
        f"looks real by chance.</p>{_render_table(titles, rows)}</details>"
    )


def _render_probes(section: Section) -> Iterator[str]:
    if not section.probes:
        return
    systems = list(section.probes[0].drops)
    rows = [
        _render_row(
            [escape(probe.title), f"{probe.changed:.0%}", *(_format_gap(probe.drops[system]) for system in systems)]
        )
        for probe in section.probes
    ]
    yield "<h3>Robustness: nDCG@10 gained or lost when questions change</h3>"
    yield _render_table(["probe", "questions changed", *systems], rows)
    examples = [f"{probe.title}: {a} → {b}" for probe in section.probes for a, b in probe.examples[:1]]
    yield f"<details><summary>Examples</summary><ul>{_wrap('li', examples)}</ul></details>"


def _render_moves(section: Section) -> Iterator[str]:
    base, model = section.find_scores("base"), section.find_scores("model")
    if base is None or model is None:
        return
    found = compare_scores(section.task, base, model, moves=MOVES)
    yield f"<p>Wins {found.wins:,}, losses {found.losses:,}, ties {found.ties:,} (nDCG@10 per question).</p>"
    for title, moves in (("largest gains", found.gains), ("largest losses", found.drops)):
        if moves:
            shown = "".join(_render_move(move) for move in moves)
            yield f"<details><summary>The {len(moves)} {title}, with passages</summary>{shown}</details>"


def _render_move(move: Move) -> str:
    ranks = " → ".join("not found" if rank is None else f"rank {rank}" for rank in (move.rank_a, move.rank_b))
    lines = [f"<p><strong>{escape(move.query)}</strong> {move.difference:+.3f} ({ranks})</p>"]
    lines.append(f"<p>right: {escape(move.relevant)}</p>")
    for name, rank, top in (("base", move.rank_a, move.top_a), ("tuned", move.rank_b, move.top_b)):
        if rank != 1:
            lines.append(f"<p class=soft>first for {name}: {escape(top)}</p>")
    return f"<div class=move>{''.join(lines)}</div>"


def _render_audit(report: EvaluationReport) -> Iterator[str]:
    if report.audit is None or not report.audit.findings:
        return
    yield "<h2>Leakage audit</h2>"
    yield f"<p class=soft>Against {escape(report.audit.training)}.</p>"
    rows = [
        _render_row([escape(f.where), f.what, f"{f.checked:,}", f"{f.same:,}", f"{f.near:,}"])
        for f in report.audit.findings
    ]
    yield _render_table(["evaluated set", "what", "checked", "seen exactly", "seen nearly"], rows)
    for finding in report.audit.findings:
        if finding.examples:
            listed = [f"{a} ≈ {b} ({share:.0%})" if a != b else a for a, b, share in finding.examples]
            title = f"{finding.where}: shared {finding.what}, the {len(listed)} closest"
            yield f"<details><summary>{escape(title)}</summary><ul>{_wrap('li', listed)}</ul></details>"


def _format_interval(value: Interval) -> str:
    span = "" if value.low != value.low else f" <small>{value.low:.3f}–{value.high:.3f}</small>"
    return f"{value.mean:.3f}{span}"


def _format_gap(gap: Difference) -> str:
    kind = gap.outcome if gap.outcome in ("better", "worse") else ""
    return f'<span class="{kind}">{escape(format_gap(gap))}</span>'


def _render_table(titles: Iterable[str], rows: Iterable[str]) -> str:
    return f"<div class=wide><table><tr>{_wrap('th', titles)}</tr>{''.join(rows)}</table></div>"


def _render_row(cells: Iterable[str], kind: str = "") -> str:
    """A table row of cells that are HTML already."""
    return f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _wrap(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)


def _inline(svg: str, title: str) -> str:
    """SVG as HTML takes it: without name-space addresses, ids unlike those of other pictures on the page."""
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    unique = f"i{zlib.crc32(svg.encode()):x}"
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{unique}-\1"', svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{unique}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{unique}-\1)", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title, quote=True)}"', 1)
