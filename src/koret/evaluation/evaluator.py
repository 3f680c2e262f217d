"""Encode, rank, score: base, tuned and BM25 on the same queries."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from koret.evaluation.beir import read_beir
from koret.evaluation.metrics import DEPTH, KS, PRIMARY, compute_metrics
from koret.evaluation.probes import run_probes
from koret.evaluation.report import EvaluationReport, Section, build_section
from koret.evaluation.scores import Scores
from koret.evaluation.selection import find_trained, open_data, select_questions
from koret.evaluation.slices import label_queries
from koret.evaluation.tasks import Kind, RetrievalTask, name_apart
from koret.retrieval.exact import find_top_k
from koret.retrieval.lexical import LexicalIndex, Tokenizer, fuse_ranks, fuse_scores

if TYPE_CHECKING:
    from koret.data.loader import Dataset

ARTICLE_DEPTH = 10
WEIGHTS = tuple(step / 10 for step in range(11))  # of the dense score, that a fusion may have
FOLDS = 5
LEXICAL_NAMES = {"bigram": "BM25 bigrams", "kiwi": "BM25 morphemes", "whitespace": "BM25 words"}
#: (query rows, k) -> corpus rows (Q, K), -1 where there is none, and scores (Q, K)
Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


class Encoder(Protocol):
    """What is evaluated: texts -> (N, D) float32 vectors; ``kind`` is 'query' or 'passage'."""

    def encode(self, texts: Sequence[str], kind: str, *, progress: bool = False) -> np.ndarray: ...


class Evaluator:
    """Scores any number of systems on one fixed task."""

    def __init__(self, task: RetrievalTask, depth: int = DEPTH, ks: Sequence[int] = KS) -> None:
        self.task, self.depth, self.ks = task, depth, tuple(ks)
        self._indexes: dict[str, LexicalIndex] = {}

    def score(
        self, encoder: Encoder, name: str | None = None, *, queries: Sequence[str] | None = None, progress: bool = False
    ) -> Scores:
        """Encode queries and corpus, search exactly, score. ``queries`` replaces the task's query texts (probes).

        Raises ValueError (or the encoder's own error) when a vector is not finite.
        """
        start = time.perf_counter()
        vectors = self.encode(encoder, queries=queries, progress=progress)
        return self.score_vectors(name or getattr(encoder, "name", "model"), *vectors, time.perf_counter() - start)

    def encode(
        self, encoder: Encoder, *, queries: Sequence[str] | None = None, progress: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of the corpus (N, D) and of the queries (Q, D). Raises as ``score`` does."""
        corpus = encoder.encode(self.task.corpus, "passage", progress=progress)
        asked = encoder.encode(self.task.queries if queries is None else queries, "query", progress=progress)
        self._require_shape(corpus, len(self.task.corpus), "corpus")
        self._require_shape(asked, len(self.task.queries), "query")
        return corpus, asked

    def score_vectors(self, name: str, corpus: np.ndarray, asked: np.ndarray, encoded: float = 0.0) -> Scores:
        """Search exactly with the vectors ``encode`` gave, and score; ``encoded`` are the seconds that took."""
        return self._score(name, lambda rows, k: find_top_k(asked[rows], corpus, k), encoded)

    def score_lexical(self, tokenizer: Tokenizer = "bigram", queries: Sequence[str] | None = None) -> Scores:
        """BM25 on the same queries and corpus."""
        asked = self.task.queries if queries is None else queries
        start = time.perf_counter()
        if tokenizer not in self._indexes:
            self._indexes[tokenizer] = LexicalIndex(self.task.corpus, tokenizer)
        index = self._indexes[tokenizer]
        indexed = time.perf_counter() - start
        return self._score(
            LEXICAL_NAMES[tokenizer], lambda rows, k: index.search([asked[row] for row in rows], k), indexed
        )

    def score_fusion(self, dense: Scores, lexical: Scores, weight: float | None = None) -> Scores:
        """Dense and BM25 rankings together: by reciprocal rank, or by ``weight`` (dense) when one is given."""
        start = time.perf_counter()
        if weight is None:
            how, ranked = "RRF", fuse_ranks([dense.rankings, lexical.rankings], self.depth)
        else:
            pair = [(scores.rankings, scores.similarities) for scores in (dense, lexical)]
            how, ranked = f"w={weight:.1f}", fuse_scores(*pair, weight, self.depth)
        values = compute_metrics(ranked[0], self.task.relevant, self.ks)
        name = f"{dense.system} + BM25 ({how})"
        return Scores(name, self.task.name, values, *ranked, {"encode": 0.0, "search": time.perf_counter() - start})

    def choose_weight(self, dense: Scores, lexical: Scores) -> float:
        """The weight of the dense score that fuses best over all questions; of equal ones the lowest.

        For questions to come: the score of these questions at this weight flatters (``score_learned_fusion`` does
        not). The model must not have been trained on them, or it will look better than it is.
        """
        return max(WEIGHTS, key=lambda w: self.score_fusion(dense, lexical, w).metrics[PRIMARY[0]])

    def score_learned_fusion(self, dense: Scores, lexical: Scores) -> Scores | None:
        """Fusion by a weight learned for every question on the questions of other articles; None with fewer than two.

        Cross-fitting in at most five folds of whole groups (Stone 1974, cross-validatory choice), so no question has
        a say in its own weight. Training questions would not do: the model knows their passages, and the weight comes
        out far too high.
        """
        groups, place = np.unique(self.task.groups, return_inverse=True)
        if len(groups) < 2:
            return None
        order = np.random.default_rng(0).permutation(len(groups))
        fold = (order % min(FOLDS, len(groups)))[place.reshape(-1)]  # (Q,)
        fused = [self.score_fusion(dense, lexical, weight) for weight in WEIGHTS]
        found = np.stack([scores.per_query[PRIMARY[0]] for scores in fused])  # (W, Q)
        chosen = np.array([found[:, fold != own].mean(axis=1).argmax() for own in range(fold.max() + 1)])
        pick = chosen[fold]

        def gather(arrays: list[np.ndarray]) -> np.ndarray:
            return np.stack(arrays)[pick, np.arange(len(pick))]

        values = {name: gather([scores.per_query[name] for scores in fused]) for name in fused[0].per_query}
        name = f"{dense.system} + BM25 (learned)"
        ranked = [gather([getattr(scores, part) for scores in fused]) for part in ("rankings", "similarities")]
        return Scores(name, self.task.name, values, *ranked, {"encode": 0.0, "search": fused[0].seconds["search"]})

    def _score(self, system: str, search: Search, encoded: float) -> Scores:
        start = time.perf_counter()
        rows, scores = search(np.arange(len(self.task.queries)), self.depth)
        values = compute_metrics(rows, self.task.relevant, self.ks)
        if self.task.has_articles:
            values |= self._score_articles(search, rows)
        seconds = {"encode": encoded, "search": time.perf_counter() - start}
        return Scores(system, self.task.name, values, rows, scores, seconds)

    def _score_articles(self, search: Search, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Metrics of finding the right article, whose rank is that of its best text; names begin with ``article/``.

        Queries whose results hold too few different articles are searched deeper, so the ten articles are exact.
        """
        owners = self.task.corpus_articles
        ranked = np.full((len(rows), ARTICLE_DEPTH), -1, np.int64)
        ranked[:, : rows.shape[1]] = rank_articles(rows, owners)[:, :ARTICLE_DEPTH]
        depth = rows.shape[1]
        open_ = np.flatnonzero((ranked[:, -1] < 0) & (rows[:, -1] >= 0))
        while len(open_) and depth < len(owners):
            depth = min(4 * depth, len(owners))
            deeper = search(open_, depth)[0]
            found = rank_articles(deeper, owners)[:, :ARTICLE_DEPTH]
            ranked[open_, : found.shape[1]] = found
            open_ = open_[(ranked[open_, -1] < 0) & (deeper[:, -1] >= 0)]
        relevant = [np.unique(owners[rows]) for rows in self.task.relevant]
        values = compute_metrics(ranked, relevant, [k for k in self.ks if k <= ARTICLE_DEPTH])
        return {f"article/{name}": column for name, column in values.items() if not name.startswith(("map", "pre"))}

    def _require_shape(self, vectors: Any, rows: int, what: str) -> None:
        if getattr(vectors, "ndim", 0) != 2 or len(vectors) != rows:
            shape = getattr(vectors, "shape", type(vectors).__name__)
            raise ValueError(f"the encoder gave {shape} for {rows} {what} texts; ({rows}, dimensions) was expected")


def rank_articles(rows: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Texts' rows (Q, K) -> their different articles in the order of their best text (Q, K), -1 behind them."""
    articles = np.where(rows >= 0, owners[rows], -1)
    order = np.argsort(articles, axis=1, kind="stable")
    ordered = np.take_along_axis(articles, order, axis=1)
    first = np.ones(articles.shape, bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    is_first = np.zeros(articles.shape, bool)
    np.put_along_axis(is_first, order, first, axis=1)
    is_first &= articles >= 0
    ranked = np.full(articles.shape, -1, np.int64)
    query, place = np.nonzero(is_first)
    ranked[query, (np.cumsum(is_first, axis=1) - 1)[query, place]] = articles[query, place]
    return ranked


# ---- one model, everything there is to say about it


class Remembering:
    """An encoder that encodes no text twice, and counts its seconds. Lists beyond ``LIMIT`` texts are not kept."""

    LIMIT = 100_000

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.seconds = encoder, 0.0
        self.name = getattr(encoder, "name", "model")
        self._rows: dict[tuple[str, str], int] = {}
        self._vectors: np.ndarray | None = None

    def encode(self, texts: Sequence[str], kind: str, *, progress: bool = False) -> np.ndarray:
        if len(texts) > self.LIMIT or not len(texts):
            return self._encode(texts, kind, progress)
        missing = [text for text in dict.fromkeys(texts) if (kind, text) not in self._rows]
        if missing:
            vectors = self._encode(missing, kind, progress)
            if np.shape(vectors)[:1] != (len(missing),):
                raise ValueError(f"the encoder gave {np.shape(vectors)} for {len(missing)} {kind} texts")
            first = len(self._rows)
            self._rows.update(((kind, text), first + i) for i, text in enumerate(missing))
            self._vectors = vectors if self._vectors is None else np.concatenate([self._vectors, vectors])
        return self._vectors[[self._rows[kind, text] for text in texts]]

    def _encode(self, texts: Sequence[str], kind: str, progress: bool) -> np.ndarray:
        start = time.perf_counter()
        vectors = self.encoder.encode(texts, kind, progress=progress)
        self.seconds += time.perf_counter() - start
        return vectors


def evaluate(
    model: str | Path | Encoder,
    dataset_root: str | Path | Dataset,
    *,
    baseline: str | Path | Encoder | None = None,
    bm25: bool | Sequence[Tokenizer] = True,
    kinds: Sequence[Kind] = ("passage", "answer"),
    split: str = "auto",
    extra: Sequence[str | Path] = (),
    probes: bool = False,
    max_queries: int | None = None,
    max_seq_length: int | None = None,
    progress: bool = False,
    **loading: Any,
) -> EvaluationReport:
    """Score a model, its baseline and BM25 on the same questions, with intervals, paired tests and slices.

    ``model`` and ``baseline`` are runs, model directories, hub names or 'offline', or objects with ``encode``.
    ``dataset_root`` is anything ``load_dataset`` reads (or its result); ``loading`` goes there. ``split``: 'auto' asks
    the questions a run held out when it was trained on this data, else all; 'held-out' or 'all' say so. ``bm25``:
    True scores character bigrams and Kiwi morphemes, or name the tokenizers. ``extra`` are BEIR folders that must not
    get worse. ``probes`` also scores misspelt questions.

    The report's ``verdict`` is '' without a baseline. Raises ValueError or FileNotFoundError saying what is wrong.
    """
    start = time.perf_counter()
    scored = find_trained(model, baseline)
    encoders = {"model": open_encoder(model, max_seq_length)}
    if baseline is not None:
        encoders["base"] = open_encoder(baseline, max_seq_length)
    chosen = select_questions(
        *open_data(dataset_root, encoders["model"].encoder, scored["trained"], progress=progress, **loading),
        **scored, kinds=kinds, split=split, max_queries=max_queries,
    )  # fmt: skip
    others = name_apart([*chosen.tasks, *(read_beir(folder) for folder in extra)])[len(chosen.tasks) :]
    loaded = time.perf_counter()
    tokenizers = (("bigram", "kiwi") if bm25 else ()) if isinstance(bm25, bool) else tuple(bm25)
    sections = [
        _evaluate_task(task, encoders, tokenizers, chosen.dataset, probes=probes, progress=progress)
        for task in chosen.tasks
    ]
    further = [_evaluate_task(task, encoders, tokenizers[:1], progress=progress) for task in others]
    dense, lexical = (sections[0].find_scores(role) for role in ("model", "lexical"))
    weight = None if lexical is None else Evaluator(chosen.tasks[0]).choose_weight(dense, lexical)
    audit = chosen.audit(others)
    done = time.perf_counter()
    encoding = sum(encoder.seconds for encoder in encoders.values())
    return EvaluationReport(
        model=encoders["model"].name,
        baseline=encoders["base"].name if baseline is not None else None,
        data={"source": _name_source(dataset_root), **chosen.describe(), "fusion_weight": weight},
        sections=sections,
        extra=further,
        audit=audit,
        seconds={"loading": loaded - start, "encoding": encoding, "rest": done - loaded - encoding},
    )


def _evaluate_task(
    task: RetrievalTask,
    encoders: dict[str, Remembering],
    tokenizers: Sequence[Tokenizer],
    dataset: Dataset | None = None,
    *,
    probes: bool = False,
    progress: bool = False,
) -> Section:
    evaluator = Evaluator(task)
    names = {"model": "tuned", "base": "base"} if "base" in encoders else {"model": "model"}
    with ThreadPoolExecutor(1) as beside:  # BM25 cuts and counts while the encoder works; Kiwi runs outside Python
        counting = [beside.submit(evaluator.score_lexical, tokenizer) for tokenizer in tokenizers]
        dense = {role: evaluator.score(encoder, names[role], progress=progress) for role, encoder in encoders.items()}
        lexical = [job.result() for job in counting]
    fused = []
    if lexical:
        pair = dense["model"], lexical[0]
        fused = [evaluator.score_fusion(*pair), *filter(None, [evaluator.score_learned_fusion(*pair)])]
    on_passages = dataset is not None and task.passage_rows is not None
    labels = label_queries(dataset, task) if on_passages else None
    section = build_section(task, dense["model"], dense.get("base"), lexical, fused, labels)
    if probes and on_passages:
        systems = [(dense[role], partial(_score_again, evaluator, encoders[role], names[role])) for role in dense]
        systems += [
            (scores, partial(evaluator.score_lexical, tokenizer))
            for scores, tokenizer in zip(lexical, tokenizers, strict=True)
        ]
        section.probes = run_probes(task, systems)
    return section


def _score_again(evaluator: Evaluator, encoder: Encoder, name: str, queries: Sequence[str]) -> Scores:
    return evaluator.score(encoder, name, queries=queries)


def open_encoder(model: str | Path | Encoder, max_seq_length: int | None) -> Remembering:
    """A model by path or name, or an encoder, as one that remembers."""
    if not isinstance(model, (str, Path)):
        return Remembering(model)
    from koret.retrieval.encoder import load_encoder

    return Remembering(load_encoder(model, max_seq_length=max_seq_length))


def _name_source(source: str | Path | Dataset) -> str:
    return Path(source).name if isinstance(source, (str, Path)) else "a prepared data set"
