"""What an evaluation leaves on disk: JSON, per-query JSONL, TREC run and qrels files.

Letters: Q queries, K ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from koret.evaluation.html_report import render_html
from koret.evaluation.metrics import PRIMARY, mark_hits
from koret.evaluation.plots import save_plots
from koret.evaluation.report import EvaluationReport, make_name
from koret.evaluation.scores import Scores
from koret.evaluation.tasks import RetrievalTask
from koret.files import write_file, write_json
from koret.privacy import scrub

LISTED_RANKS = 10


def save_report(report: EvaluationReport, folder: str | Path, *, figures: bool = True) -> list[Path]:
    """Write report.json, queries-*.jsonl, and with ``figures`` report.html and the plots (PNG and SVG).

    Returns the files written. Everything already in ``folder`` under other names stays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", scrub(report.to_dict()))
    files = [folder / "report.json"]
    for name, section in report.name_sections():
        files.append(save_queries(section.task, section.scores, folder, name))
    if figures:
        pictures = save_plots(report, folder)
        files += [folder / f"{name}.{ending}" for name in pictures for ending in ("png", "svg")]
        write_file(folder / "report.html", render_html(report, pictures).encode())
        files.append(folder / "report.html")
    return files


def save_queries(task: RetrievalTask, systems: Sequence[Scores], folder: Path, name: str) -> Path:
    """queries-<name>.jsonl: per query its text, right texts, and for each system its metrics, first right rank and
    first ten results.
    """
    path = folder / f"queries-{name}.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) for record in describe_queries(task, systems)]
    write_file(path, ("\n".join(lines) + "\n").encode())
    return path


def describe_queries(task: RetrievalTask, systems: Sequence[Scores]) -> Iterator[dict[str, Any]]:
    """One JSON-able record per query, as ``save_queries`` writes them."""
    hits = [mark_hits(scores.rankings, task.relevant)[0] for scores in systems]
    for query, (id_, text) in enumerate(zip(task.query_ids, task.queries, strict=True)):
        record: dict[str, Any] = {
            "id": id_,
            "query": text,
            "group": int(task.groups[query]),
            "relevant": [task.corpus_ids[row] for row in task.relevant[query]],
            "systems": {},
        }
        for scores, found in zip(systems, hits, strict=True):
            rows = scores.rankings[query, :LISTED_RANKS]
            record["systems"][scores.system] = {
                **{name: round(float(scores.per_query[name][query]), 6) for name in PRIMARY},
                "rank": int(found[query].argmax()) + 1 if found[query].any() else None,
                "top": [task.corpus_ids[row] for row in rows if row >= 0],
            }
        yield record


def save_trec(report: EvaluationReport, folder: str | Path) -> list[Path]:
    """TREC files for every task: ``<task>.qrels`` and one ``<task>-<system>.run`` per system.

    trec_eval sorts by score and breaks ties by document id; scores are therefore written so that they fall strictly
    with the rank (by one unit in the last place where they are equal), and trec_eval sees the order that was scored.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, section in report.name_sections():
        task = section.task
        ids = [_make_token(id_) for id_ in task.query_ids], [_make_token(id_) for id_ in task.corpus_ids]
        qrels = folder / f"{name}.qrels"
        lines = [f"{q} 0 {ids[1][row]} 1" for q, rows in zip(ids[0], task.relevant, strict=True) for row in rows]
        write_file(qrels, ("\n".join(lines) + "\n").encode())
        files.append(qrels)
        for scores in section.scores:
            run = folder / f"{name}-{make_name(scores.system)}.run"
            write_file(run, "".join(_format_run(scores, *ids)).encode())
            files.append(run)
    return files


def _format_run(scores: Scores, query_ids: Sequence[str], corpus_ids: Sequence[str]) -> Iterator[str]:
    tag = make_name(scores.system)
    for query, rows in enumerate(scores.rankings):
        falling = _fall_strictly(scores.similarities[query])
        for rank, (row, score) in enumerate(zip(rows, falling, strict=True), 1):
            if row >= 0:
                yield f"{query_ids[query]} Q0 {corpus_ids[row]} {rank} {score!r} {tag}\n"


def _fall_strictly(scores: np.ndarray) -> list[float]:
    """The scores (K,) as float32 values that get smaller with every rank."""
    falling: list[float] = []
    for score in scores.astype(np.float32):
        if falling and score >= falling[-1]:
            score = np.nextafter(np.float32(falling[-1]), np.float32(-np.inf))
        falling.append(float(score))
    return falling


def _make_token(id_: str) -> str:
    """An id without white space, as TREC files need."""
    return "_".join(id_.split()) or "_"
