"""BEIR folders (corpus.jsonl, queries.jsonl, qrels/*.tsv) as retrieval tasks: what else must not get worse."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from koret.evaluation.tasks import RetrievalTask


def read_beir(folder: str | Path, split: str | None = None) -> RetrievalTask:
    """Read ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv``.

    Without ``split``: test, else dev, else train, else the only file there. Relevance counts as binary (score above
    0). Judgements that name unknown ids are left out and noted; queries without a relevant text are excluded and
    listed; queries of other splits are not part of the task. Raises FileNotFoundError or ValueError naming the file
    and line.
    """
    folder = Path(folder)
    qrels_file = _choose_qrels(folder, split)
    corpus = _read_texts(folder / "corpus.jsonl", _join_title)
    queries = _read_texts(folder / "queries.jsonl", _read_text)
    rows = {id_: row for row, id_ in enumerate(corpus)}
    judged: dict[str, set[int]] = {}
    unknown: dict[str, list[str]] = {"query": [], "corpus": []}
    graded = 0
    for query, text, score in _read_qrels(qrels_file):
        if query not in queries:
            unknown["query"].append(query)
            continue
        relevant = judged.setdefault(query, set())
        if text not in rows:
            unknown["corpus"].append(text)
        elif score > 0:
            relevant.add(rows[text])
            graded += score != 1
    notes = [
        f"{len(ids)} judgements of {qrels_file.name} name {kind} ids that do not exist ({_shorten(ids)}); left out"
        for kind, ids in unknown.items()
        if ids
    ]
    if graded:
        notes.append(f"{graded} judgements have grades above 1; relevance counts as yes or no")
    kept = [query for query, relevant in judged.items() if relevant and queries[query].strip()]
    excluded = [
        (query, "no relevant text" if not relevant else "empty question")
        for query, relevant in judged.items()
        if not relevant or not queries[query].strip()
    ]
    return RetrievalTask(
        name=folder.resolve().name,
        query_ids=kept,
        queries=[queries[query] for query in kept],
        corpus_ids=list(corpus),
        corpus=list(corpus.values()),
        relevant=[np.array(sorted(judged[query]), np.int64) for query in kept],
        groups=np.arange(len(kept)),
        corpus_articles=np.full(len(corpus), -1, np.int64),
        excluded=excluded,
        notes=notes,
    )


def _choose_qrels(folder: Path, split: str | None) -> Path:
    for needed in (folder, folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels"):
        if not needed.exists():
            raise FileNotFoundError(
                f"{needed} does not exist: a BEIR folder has corpus.jsonl, queries.jsonl and qrels/*.tsv"
            )
    files = {file.stem: file for file in sorted((folder / "qrels").glob("*.tsv"))}
    wanted = [split] if split else ["test", "dev", "train"] + (list(files) if len(files) == 1 else [])
    for name in wanted:
        if name in files:
            return files[name]
    there = ", ".join(files) or "nothing"
    raise FileNotFoundError(f"{folder / 'qrels'} has no {' or '.join(wanted)}.tsv; it has: {there}")


def _read_jsonl(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                at = f"{path}, line {number}"
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{at} is not JSON: {error}") from error
                if not isinstance(record, dict):
                    raise ValueError(f"{at} must be an object with _id and text, not {type(record).__name__}")
                yield record, at


def _read_texts(path: Path, read: Callable[[dict[str, Any], str], str]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for record, at in _read_jsonl(path):
        identity = _read_id(record, at)
        if identity in texts:
            raise ValueError(f"{at} has the _id {identity!r} of a line before it")
        texts[identity] = read(record, at)
    return texts


def _read_id(record: dict[str, Any], at: str) -> str:
    if "_id" not in record:
        raise ValueError(f"{at} has no _id")
    return str(record["_id"])


def _read_text(record: dict[str, Any], at: str) -> str:
    if not isinstance(record.get("text"), str):
        raise ValueError(f"{at} has no text")
    return record["text"]


def _join_title(record: dict[str, Any], at: str) -> str:
    """Title, a space, the text: what mteb and BEIR encode."""
    return f"{record.get('title') or ''} {_read_text(record, at)}".strip()


def _read_qrels(path: Path) -> Iterator[tuple[str, str, int]]:
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            cells = line.rstrip("\r\n").split("\t")
            if not line.strip() or (number == 1 and cells[-1].strip() == "score"):
                continue
            try:
                query, text, score = cells
                yield query, text, int(score)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number} must be query-id, corpus-id, score, tab-separated: {line!r}"
                ) from error


def _shorten(ids: Sequence[str], most: int = 3) -> str:
    return ", ".join(ids[:most]) + (", ..." if len(ids) > most else "")
