"""The file of mined negatives: written by `koret mine` and by re-mining, checked and merged into the pairs.

JSON lines. The first says what was mined from what, by what and what was dropped; then one line a question: its id,
article, positive passage and negatives with score, place in the article and source. Passages, articles and questions
are row numbers of the prepared data, which a hash of their content (``hash_content``) ties to the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from koret.data.columns import Csr, make_places, read_column
from koret.data.keys import text_key
from koret.data.loader import Dataset
from koret.data.pairs import PairTable
from koret.files import write_file
from koret.privacy import scrub
from koret.training.mining import SOURCES, Mined, MiningSettings, read_passages

FORMAT, VERSION = "koret negatives", 1


class NegativesError(ValueError):
    """A file of negatives that cannot serve this training."""


class _Passage(msgspec.Struct, gc=False, omit_defaults=True):
    passage: int
    score: float | None
    article: int = -1
    start: int = -1
    end: int = -1
    source: str = ""


class _Line(msgspec.Struct, gc=False):
    question: str  # its id in the data
    row: int
    article: int
    positive: _Passage
    negatives: list[_Passage]


def hash_content(dataset: Dataset) -> str:
    """sha256 over the passages and questions: equal where row numbers mean the same, whatever the tokenizer was."""
    digest = hashlib.sha256()
    for table, column in ((dataset.passages, "text_key"), (dataset.passages, "article"), (dataset.questions, "best")):
        digest.update(read_column(table, column).astype("<i8").tobytes())
    for name in ("question_key", "article"):
        digest.update(read_column(dataset.questions, name).astype("<i8").tobytes())
    return digest.hexdigest()


def write_negatives(
    path: Path, mined: Mined, dataset: Dataset, settings: MiningSettings, origin: dict[str, Any]
) -> dict[str, Any]:
    """Write ``mined`` to ``path``, whole or not at all; ``origin`` says by what and for which split. The first line."""
    header = {
        "format": FORMAT,
        "version": VERSION,
        "content": hash_content(dataset),
        **scrub(origin),
        "scores": mined.measure,
        "settings": asdict(settings),
        "report": mined.report,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    first = json.dumps(header, ensure_ascii=False, allow_nan=False).encode()
    write_file(path, b"\n".join([first, *map(msgspec.json.encode, _list_lines(mined, dataset)), b""]))
    return header


def _list_lines(mined: Mined, dataset: Dataset) -> Iterator[_Line]:
    ids = dataset.questions.column("id").take(make_places(mined.questions)).to_pylist()
    asked_in = read_column(dataset.questions, "article")[mined.questions].tolist()
    columns = [read_column(dataset.passages, name) for name in ("article", "start", "end")]
    for i, (name, row, article) in enumerate(zip(ids, mined.questions.tolist(), asked_in, strict=True)):
        at = range(int(mined.negatives.offsets[i]), int(mined.negatives.offsets[i + 1]))
        found = [
            _Passage(
                passage,
                _to_json(mined.scores[k]),
                *(int(column[passage]) for column in columns),
                source=SOURCES[mined.sources[k]],
            )
            for k, passage in zip(at, mined.negatives[i].tolist(), strict=True)
        ]
        positive = _Passage(int(mined.positives[i]), _to_json(mined.positive_scores[i]))
        yield _Line(name, row, article, positive, found)


def _to_json(score: np.float32) -> float | None:
    return None if np.isnan(score) else float(score)


def read_negatives(path: Path, dataset: Dataset, train: np.ndarray) -> tuple[Mined, dict[str, Any]]:
    """What ``write_negatives`` wrote, and its first line with the file's sha256 as ``sha256``.

    Raises NegativesError when it is damaged, is about other data, or holds a question or passage of an article that is
    not in ``train``; FileNotFoundError when there is no such file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileNotFoundError(f"hard_negatives: cannot read {path}: {error.strerror}") from None
    first, _, rest = data.partition(b"\n")
    try:
        header = json.loads(first)
        if header["format"] != FORMAT or header["version"] != VERSION:
            raise ValueError("its first line is of another format")
        lines = msgspec.json.Decoder(_Line).decode_lines(rest) if header["content"] == hash_content(dataset) else None
        if lines is not None and len(lines) != header["report"]["questions"]:
            raise ValueError(f"it ends after {len(lines)} of {header['report']['questions']} questions")
    except (ValueError, KeyError, TypeError) as error:
        raise NegativesError(
            f"{path} is not a whole file of hard negatives ({error}): make it again with koret mine"
        ) from None
    if lines is None:
        raise NegativesError(
            f"{path} was mined from other data than this, or from pages cut at another length: mine it again with "
            "koret mine and the --dataset-root, --max-seq-length and --passage-tokens of the training"
        )
    mined = _collect(lines, header)
    _require_side(path, mined, dataset, train, header)
    return mined, {**header, "sha256": hashlib.sha256(data).hexdigest()}


def _collect(lines: list[_Line], header: dict[str, Any]) -> Mined:
    negatives = [negative for line in lines for negative in line.negatives]
    return Mined(
        questions=np.array([line.row for line in lines], np.int64),
        positives=np.array([line.positive.passage for line in lines], np.int64),
        positive_scores=np.array([line.positive.score for line in lines], np.float32),  # None is NaN
        negatives=Csr.from_lists([[negative.passage for negative in line.negatives] for line in lines]),
        scores=np.array([negative.score for negative in negatives], np.float32),
        sources=np.array([SOURCES.index(negative.source) for negative in negatives], np.int8),
        measure=header["scores"],
        report=header["report"],
    )


def _require_side(path: Path, mined: Mined, dataset: Dataset, train: np.ndarray, header: dict[str, Any]) -> None:
    asked = read_column(dataset.questions, "article")[mined.questions]
    found = read_column(dataset.passages, "article")[mined.negatives.values]
    beyond = [int((~np.isin(articles, train)).sum()) for articles in (asked, found)]
    if any(beyond):
        raise NegativesError(
            f"{path} holds {beyond[0]} questions and {beyond[1]} passages of articles that are held out here: it was "
            f"mined with train_split {header.get('train_split')} and seed {header.get('seed')}; mine again with the "
            "--train-split and --seed of the training"
        )


# ---------------------------------------------------------------- into the pairs


def list_by_question(mined: Mined, dataset: Dataset, most: int) -> Csr:
    """Per row of ``dataset.questions``, the first ``most`` passages mined for it."""
    lists: list[Any] = [()] * dataset.questions.num_rows
    for i, row in enumerate(mined.questions.tolist()):
        lists[row] = mined.negatives[i][:most]
    return Csr.from_lists(lists)


def add_scores(pairs: PairTable, mined: Mined, dataset: Dataset) -> PairTable:
    """``pairs`` with the model's scores of positives and negatives, NaN where none is known; BM25's are not used."""
    if mined.measure != "cosine":
        return pairs
    keys = read_column(dataset.questions, "question_key")[mined.questions]
    ids = {text_key(text): number for number, text in enumerate(pairs.texts)}
    rows, place = np.unique(np.concatenate([mined.positives, mined.negatives.values]), return_inverse=True)
    number = np.array([ids.get(text_key(text), -1) for text in read_passages(dataset, rows)])[place.reshape(-1)]
    owner = np.concatenate([keys, np.repeat(keys, np.diff(mined.negatives.offsets))])
    scores = np.concatenate([mined.positive_scores, mined.scores]).tolist()
    known = dict(zip(zip(owner.tolist(), number.tolist(), strict=True), scores, strict=True))
    asked, named = pairs.negatives.take(np.arange(len(pairs)))
    return replace(
        pairs,
        positive_scores=_look_up(known, pairs.question_key, pairs.targets),
        negative_scores=_look_up(known, pairs.question_key[asked], named),
    )


def _look_up(known: dict[tuple[int, int], float], questions: np.ndarray, texts: np.ndarray) -> np.ndarray:
    found = zip(questions.tolist(), texts.tolist(), strict=True)
    return np.array([known.get(pair, np.nan) for pair in found], np.float32)
