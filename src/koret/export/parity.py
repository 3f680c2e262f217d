"""Does an export rank as the original does? Vectors, tokens, nDCG, size and speed of both, against stated limits.

Letters: Q queries, N corpus texts, D dimensions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from koret.evaluation.evaluator import Encoder, Evaluator
from koret.evaluation.metrics import PRIMARY
from koret.evaluation.scores import Scores, format_gap
from koret.evaluation.significance import Difference, compare_paired
from koret.evaluation.tasks import Kind, RetrievalTask
from koret.export.binary import RECOMMENDED, Stored, measure_stored
from koret.export.runtime import Exported
from koret.export.vocabulary import Trim
from koret.retrieval.encoder import TextEncoder

BATCH_TEXTS, SPEED_TEXTS, SPEED_QUERIES, ROUNDS = 48, 256, 200, 4
NDCG_LIMIT = 0.01


@dataclass(frozen=True)
class Limits:
    """What an export must keep: the worst cosine to the original, the worst cosine of a text encoded among others to
    the same text alone, and how far below 0 the interval of the nDCG@10 difference may reach."""

    cosine: float
    batch: float
    ndcg: float = NDCG_LIMIT


#: float32 files must give the original's vectors; OpenVINO computes in bfloat16 on processors that have it; int8 is
#: allowed other vectors but not another ranking (ONNX Runtime scales activations by the whole batch)
LIMITS = {
    "merged": Limits(0.99999, 0.99999),
    "onnx": Limits(0.99999, 0.99999),
    "openvino": Limits(0.999, 0.999),
    "onnx-int8": Limits(0.90, 0.90),
    "openvino-int8": Limits(0.95, 0.99),
}


@dataclass(frozen=True)
class Check:
    """One limit: what was measured, what is asked, and whether it holds."""

    name: str
    measured: float
    limit: float
    passed: bool

    @property
    def sentence(self) -> str:
        if math.isnan(self.measured):
            return f"{self.name} could not be measured: no text is cut into the same tokens as before"
        return f"{self.name} is {self.measured:.6g}, at least {self.limit:.6g} is needed" + (
            "" if self.passed else f" ({self.limit - self.measured:.2g} short)"
        )

    def to_dict(self) -> dict[str, Any]:
        measured = None if not math.isfinite(self.measured) else self.measured
        return {"name": self.name, "measured": measured, "limit": self.limit, "passed": self.passed}


@dataclass(frozen=True)
class Speed:
    """Passages encoded together per second, and milliseconds of one question alone."""

    texts_per_second: float
    p50_ms: float
    p99_ms: float

    def to_dict(self) -> dict[str, float]:
        return {"texts_per_second": self.texts_per_second, "p50_ms": self.p50_ms, "p99_ms": self.p99_ms}


@dataclass
class Reference:
    """The original in float32 on a task: kept before anything about it is changed."""

    task: RetrievalTask
    vectors: dict[Kind, np.ndarray]  # query (Q, D), passage (N, D)
    ids: dict[Kind, list[np.ndarray]]
    scores: Scores
    size: int  # bytes of weights and tokenizer


@dataclass
class Parity:
    """Everything measured about one export."""

    kind: str
    task: dict[str, Any]
    checks: list[Check]
    cosine: dict[str, dict[str, float]]
    same_tokens: dict[str, float]
    ndcg: tuple[float, float]
    difference: Difference
    size: tuple[int, int]
    speed: tuple[Speed, Speed]
    stored: list[Stored] = field(default_factory=list)
    trim: dict[str, Any] | None = None
    strength: dict[str, Any] | None = None

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> str:
        return "; ".join(check.sentence for check in self.checks if not check.passed)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON: what is not a number is None."""
        before, after = self.speed
        cosine = {k: {n: None if math.isnan(v) else v for n, v in c.items()} for k, c in self.cosine.items()}
        return {
            "passed": self.passed,
            "kind": self.kind,
            "task": self.task,
            "checks": [check.to_dict() for check in self.checks],
            "cosine": cosine,
            "same_tokens": self.same_tokens,
            "ndcg@10": {"before": self.ndcg[0], "after": self.ndcg[1], "difference": self.difference.to_dict()},
            "bytes": {"before": self.size[0], "after": self.size[1]},
            "speed": {"before": before.to_dict(), "after": after.to_dict()},
            "stored": [way.to_dict() for way in self.stored],
            "trim": self.trim,
            "strength": self.strength,
        }


def measure_reference(task: RetrievalTask, encoder: TextEncoder, *, progress: bool = False) -> Reference:
    """Encode and score the original."""
    texts = {"query": task.queries, "passage": task.corpus}
    vectors = {kind: encoder.encode(group, kind, progress=progress) for kind, group in texts.items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in encoder.model.state_dict().values())
    return Reference(
        task=task,
        vectors=vectors,
        ids={kind: encoder.tokenize(group, kind) for kind, group in texts.items()},
        scores=_score(task, vectors),
        size=size + len(encoder.tokenizer.backend_tokenizer.to_str().encode()),
    )


def measure_parity(
    kind: str, reference: Reference, original: Encoder, exported: Exported, size: int, limits: Limits, *,
    trim: Trim | None = None, binary: bool = False, progress: bool = False,
) -> Parity:  # fmt: skip
    """Compare what was exported with the original on the same texts; ``original`` itself is only timed.

    Vectors of fewer dimensions are compared with the original's, cut and normalised; after a ``trim``, cosines are
    those of texts that are still cut into the same tokens (the others count in nDCG).
    """
    task = reference.task
    texts = {"query": task.queries, "passage": task.corpus}
    vectors = {k: np.asarray(exported.encode(group, k, progress=progress), np.float32) for k, group in texts.items()}
    cosine, same = {}, {}
    for k, group in texts.items():
        alike = _find_alike(reference.ids[k], exported.tokenize(group, k), trim)
        same[k] = float(alike.mean())
        cosines = np.einsum("nd,nd->n", _cut(reference.vectors[k], exported.dimensions), vectors[k])[alike]
        cosine[k] = {"mean": float(cosines.mean()), "worst": float(cosines.min())} if len(cosines) else {
            "mean": math.nan, "worst": math.nan,
        }  # fmt: skip
    scores = _score(task, vectors)
    metric = PRIMARY[0]
    before, after = reference.scores.per_query[metric], scores.per_query[metric]
    gap = compare_paired(before, after, task.groups)
    length = np.abs(np.linalg.norm(np.concatenate(list(vectors.values())), axis=1) - 1).max()
    batch = measure_batch(exported, task)
    checks = [
        *(_check(f"worst cosine of a {k}", cosine[k]["worst"], limits.cosine) for k in texts),
        _check("worst cosine of a text alone and among others", batch, limits.batch),
        _check("1 - error of the vectors' length", 1 - float(length), 0.9999),
        _check("lower bound of the nDCG@10 difference", _bound(gap, before, after), -limits.ndcg),
    ]
    if trim is None:
        checks += [_check(f"share of {k} texts with equal tokens", same[k], 1.0) for k in texts]
    stored: list[Stored] = []
    if binary:
        stored = measure_stored(task, vectors["query"], vectors["passage"], before)
        chosen = next(way for way in stored if way.name == RECOMMENDED)
        low = chosen.difference.low if chosen.difference.low == chosen.difference.low else -math.inf
        checks.append(_check(f"lower bound of the nDCG@10 difference, {RECOMMENDED}", low, -limits.ndcg))
    before_speed, after_speed = measure_speeds([original, exported], task)
    described = {"name": task.name, "queries": len(task.queries), "corpus": len(task.corpus)}
    return Parity(
        kind=kind,
        task={**described, "groups": gap.groups, "fingerprint": task.fingerprint()},
        checks=checks,
        cosine=cosine,
        same_tokens=same,
        ndcg=(float(before.mean()), float(after.mean())),
        difference=gap,
        size=(reference.size, size),
        speed=(before_speed, after_speed),
        stored=stored,
    )


def measure_speeds(encoders: Sequence[Encoder], task: RetrievalTask) -> list[Speed]:
    """Up to SPEED_TEXTS passages in ROUNDS blocks, then SPEED_QUERIES questions one after another.

    The encoders take turns, so that what else the machine does falls on all of them; each is warmed up first.
    """
    rows = np.linspace(0, len(task.corpus) - 1, min(SPEED_TEXTS, len(task.corpus))).astype(int)
    blocks = [[task.corpus[row] for row in block] for block in np.array_split(rows, min(ROUNDS, len(rows)))]
    asked = [task.queries[i % len(task.queries)] for i in range(SPEED_QUERIES)]
    waits: list[list[float]] = [[] for _ in encoders]
    for encoder in encoders:
        encoder.encode(blocks[0][:8], "passage")
        encoder.encode(asked[:1], "query")
    together = [[_time(encoder, block, "passage") for encoder in encoders] for block in blocks]
    for start in range(0, SPEED_QUERIES, SPEED_QUERIES // ROUNDS):  # engines' threads spin on for a while: no finer
        for encoder, own in zip(encoders, waits, strict=True):
            own += [1000 * _time(encoder, [text], "query") for text in asked[start : start + SPEED_QUERIES // ROUNDS]]
    return [
        Speed(len(rows) / sum(seconds), *map(float, np.percentile(own, [50, 99])))
        for seconds, own in zip(zip(*together, strict=True), waits, strict=True)
    ]


def measure_batch(encoder: Encoder, task: RetrievalTask) -> float:
    """The worst cosine between a text's vector when it is encoded alone and among others of all lengths."""
    rows = np.linspace(0, len(task.corpus) - 1, min(BATCH_TEXTS // 2, len(task.corpus))).astype(int)
    texts = [*(task.corpus[row] for row in rows), *task.queries[: BATCH_TEXTS // 2]]
    together = np.asarray(encoder.encode(texts, "passage"))
    alone = np.concatenate([np.asarray(encoder.encode([text], "passage")) for text in texts])
    return float(np.einsum("nd,nd->n", together, alone).min())


def summarize(parity: Parity) -> list[tuple[str, str, str]]:
    """Rows of the printed table: what, before, after."""
    before, after = parity.speed
    rows = [
        (f"nDCG@10, {parity.task['queries']:,} questions", f"{parity.ndcg[0]:.4f}", f"{parity.ndcg[1]:.4f}"),
        ("nDCG@10 difference, 95% interval", "", format_gap(parity.difference)),
        *((f"cosine to the original, {k}", "", f"mean {c['mean']:.6f}, worst {c['worst']:.6f}")
          for k, c in parity.cosine.items()),
        ("weights and tokenizer", f"{parity.size[0] / 1e6:.1f} MB", f"{parity.size[1] / 1e6:.1f} MB"),
        ("passages per second", f"{before.texts_per_second:.1f}", f"{after.texts_per_second:.1f}"),
        ("one question, p50 / p99", f"{before.p50_ms:.1f} / {before.p99_ms:.1f} ms",
         f"{after.p50_ms:.1f} / {after.p99_ms:.1f} ms"),
    ]  # fmt: skip
    if parity.trim:
        trim = parity.trim
        rows.insert(5, ("tokens in the vocabulary", f"{trim['tokens_before']:,}", f"{trim['tokens_after']:,}"))
    return rows


def describe_strength(strength: dict[str, Any]) -> list[str]:
    """What a share of the tuning does on every task, in sentences: the forgetting report of ``koret sweep``."""
    base, whole = strength["points"][0], strength["points"][-1]
    kept = next(point for point in strength["points"] if point["weight"] == strength["weight"])
    said = []
    for task in strength["tasks"]:
        scores = [point["scores"][task]["mean"] for point in (base, kept, whole)]
        line = f"{kept['weight']:.0%} of the tuning on {task}: nDCG@10 {scores[0]:.3f} -> {scores[1]:.3f}"
        line += f", {kept['verdicts'][task]['verdict']}" if task in kept["verdicts"] else ", the base itself"
        if kept is not whole:
            line += f" (all of it: {scores[2]:.3f}, {whole['verdicts'][task]['verdict']})"
        said.append(line)
    if len(strength["tasks"]) == 1:
        said.append("what was forgotten elsewhere was not asked: --extra BEIR_FOLDER")
    return said


def _score(task: RetrievalTask, vectors: dict[Kind, np.ndarray]) -> Scores:
    return Evaluator(task).score(_Known(vectors))


class _Known:
    """An encoder that has encoded already."""

    name = "vectors"

    def __init__(self, vectors: dict[Kind, np.ndarray]) -> None:
        self.vectors = vectors

    def encode(self, texts: Sequence[str], kind: Kind, *, progress: bool = False) -> np.ndarray:
        return self.vectors[kind]


def _find_alike(old: list[np.ndarray], new: list[np.ndarray], trim: Trim | None) -> np.ndarray:
    mapped = old if trim is None else [trim.map_ids(ids) for ids in old]
    return np.array([np.array_equal(a, b) for a, b in zip(mapped, new, strict=True)])


def _cut(vectors: np.ndarray, dims: int) -> np.ndarray:
    kept = vectors[:, :dims]
    return kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-12)


def _bound(gap: Difference, before: np.ndarray, after: np.ndarray) -> float:
    """The interval's lower end; of fewer than two articles there is none, and only equality proves anything."""
    if gap.low == gap.low:
        return gap.low
    return 0.0 if np.array_equal(before, after) else -math.inf


def _check(name: str, measured: float, limit: float) -> Check:
    return Check(name, measured, limit, bool(measured >= limit))


def _time(encoder: Encoder, texts: Sequence[str], kind: Kind) -> float:
    start = time.perf_counter()
    encoder.encode(texts, kind)
    return time.perf_counter() - start
