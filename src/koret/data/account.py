"""The account of what was read: seen, kept and left out for every source, and whether that is good enough."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec

from koret.data import totals
from koret.data.assemble import IDENTICAL
from koret.data.korquad import UNANSWERABLE
from koret.data.prepare import SourceReport
from koret.data.sources import DataError
from koret.privacy import make_printable

DEFAULT_MAX_BAD = 0.001
_ALWAYS_TOLERATED = 10  # bad records, under the default share: one bad line does not stop a small set
_HARMLESS = (UNANSWERABLE, IDENTICAL)  # left out by design, no sign of bad data


def report_source(report: SourceReport) -> dict[str, Any]:
    """A source's report as nested plain values."""
    kinds = {
        kind: {state: getattr(report, f"{kind}_{state}") for state in ("seen", "kept", "rejected")}
        for kind in ("articles", "questions")
    }
    rest = msgspec.to_builtins(report)
    return {key: value for key, value in rest.items() if not key.startswith(("articles_", "questions_"))} | kinds


def make_report(
    root: str, reports: list[SourceReport], ignored: list[tuple[str, str]], started: float
) -> dict[str, Any]:
    """Everything ``Dataset.report`` holds; ``started`` is the perf_counter at the start of the work."""
    sources = [report_source(report) for report in reports]
    reasons: dict[str, int] = {}
    for source in sources:
        for reason, count in source["reasons"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    formats = list(dict.fromkeys(source["format"] for source in sources))
    total = {
        kind: {state: sum(source[kind][state] for source in sources) for state in ("seen", "kept", "rejected")}
        for kind in ("articles", "questions")
    }
    return {
        "root": root,
        "format": formats[0] if len(formats) == 1 else f"mixed: {', '.join(formats)}",
        **total,
        "passages": sum(source["passages"] for source in sources),
        "reasons": dict(sorted(reasons.items(), key=lambda item: -item[1])),
        "moved_answers": sum(source["moved_answers"] for source in sources),
        "wide_answers": sum(source["wide_answers"] for source in sources),
        "sources": sources,
        "ignored": [{"name": name, "reason": reason} for name, reason in ignored],
        "notes": totals.compare_totals(sources),
        "seconds": round(time.perf_counter() - started, 3),
    }


def format_report(report: dict[str, Any]) -> str:
    """The account as lines of text: totals, reasons, what was ignored, and each source where there are several."""
    articles, questions = report["articles"], report["questions"]
    lines = [
        f"{report['root']} ({report['format']}, {_count(len(report['sources']), 'file')}): "
        f"{articles['kept']:,} of {_count(articles['seen'], 'article')}, "
        f"{questions['kept']:,} of {_count(questions['seen'], 'question')} kept, "
        f"{_count(report['passages'], 'passage')}"
    ]
    lines += [f"  left out {count:,}: {reason}" for reason, count in report["reasons"].items()]
    if report["moved_answers"]:
        lines.append(f"  {_count(report['moved_answers'], 'answer')} placed at the only occurrence of the text")
    if report["wide_answers"]:
        lines.append(f"  {_count(report['wide_answers'], 'answer')} that no passage holds whole")
    lines += [f"  ignored {item['name']}: {item['reason']}" for item in report["ignored"]]
    lines += [f"  note: {note}" for note in report["notes"]]
    if len(report["sources"]) > 1:
        lines += [f"  {describe_source(source)}" for source in report["sources"]]
    return make_printable("\n".join(lines))


def describe_source(source: dict[str, Any]) -> str:
    """One line about a source."""
    rejected = source["articles"]["rejected"] + source["questions"]["rejected"]
    return make_printable(
        f"{source['name']}: {_count(source['articles']['kept'], 'article')}, "
        f"{_count(source['questions']['kept'], 'question')}" + (f", {rejected:,} left out" if rejected else "")
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def check_report(report: dict[str, Any], directory: Path, max_bad: float) -> None:
    """Raise DataError when too much was rejected, or everything."""
    harmless = sum(report["reasons"].get(reason, 0) for reason in _HARMLESS)
    lost_articles = report["articles"]["rejected"]
    bad = report["questions"]["rejected"] - harmless + lost_articles
    seen = report["questions"]["seen"] + lost_articles
    allowed = max(max_bad * seen, _ALWAYS_TOLERATED if max_bad == DEFAULT_MAX_BAD else 0)
    if report["questions"]["kept"] and bad <= allowed:
        return
    worst = "".join(f"\n  {count:,} x {reason}" for reason, count in list(report["reasons"].items())[:5])
    listed = f"{worst}\nfirst: {_read_first_reject(directory)}\nall: {directory / 'rejects.jsonl'}" if bad else ""
    if not report["questions"]["kept"]:
        raise DataError(f"no usable question in {report['root']} ({report['questions']['seen']:,} seen){listed}")
    raise DataError(
        f"{bad:,} of {seen:,} records of {report['root']} are bad, more than the share of {max_bad:g} allowed "
        f"(max_bad){listed}"
    )


def _read_first_reject(directory: Path) -> str:
    with open(directory / "rejects.jsonl", "rb") as file:
        line = msgspec.json.decode(file.readline() or b"{}")
    where = [line.get("file", ""), line.get("member", ""), line.get("article", ""), line.get("id", "")]
    return f"{', '.join(part for part in where if part)}: {line.get('reason', '')}"
