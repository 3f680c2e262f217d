"""The ``evaluation`` folder of a run: what the base and the tuned model scored, and what that comes to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as dump_arrays

from koret.config import TrainingConfig
from koret.data.pairs import split_articles
from koret.evaluation.audit import audit_overlap, take_evaluated, take_training
from koret.evaluation.metrics import PRIMARY, mark_hits
from koret.evaluation.report import EvaluationReport, build_section
from koret.evaluation.scores import Scores
from koret.evaluation.selection import find_lost, find_runs
from koret.evaluation.tasks import RetrievalTask
from koret.files import DiskFull, write_file, write_json
from koret.retrieval.encoder import TextEncoder
from koret.training.preparation import Job


def write_scores(folder: Path, name: str, step: int, scores: list[Scores], tasks: list[RetrievalTask]) -> None:
    """``<name>.json``: per question the deciding metrics and the rank of its first right text (null: not found).

    The rankings behind them go to ``<name>.safetensors``, so that they need not be made again.
    """
    arrays = {}
    for number, one in enumerate(scores):
        arrays |= {f"{number}/rankings": one.rankings.astype(np.int32), f"{number}/similarities": one.similarities}
        arrays |= {f"{number}/metric/{metric}": values for metric, values in one.per_query.items()}
    write_file(folder / f"{name}.safetensors", dump_arrays(arrays))
    first, *others = [_describe(s, t) for s, t in zip(scores, tasks, strict=True)]
    write_json(folder / f"{name}.json", {"step": step, **first, "others": others})


def _describe(scores: Scores, task: RetrievalTask) -> dict:
    hits = mark_hits(scores.rankings, task.relevant)[0]
    ranks = [int(row.argmax()) + 1 if row.any() else None for row in hits]
    return {
        "system": scores.system,
        "task": scores.task,
        "metrics": scores.metrics,
        "per_query": {"id": task.query_ids, "rank": ranks}
        | {metric: [float(v) for v in scores.per_query[metric]] for metric in PRIMARY},
    }


def read_scores(folder: Path, name: str) -> list[Scores]:
    """What ``write_scores`` wrote."""
    record, arrays = json.loads((folder / f"{name}.json").read_bytes()), load_file(folder / f"{name}.safetensors")
    scores = []
    for number, one in enumerate([record, *record["others"]]):
        start = f"{number}/metric/"
        values = {key[len(start) :]: array for key, array in arrays.items() if key.startswith(start)}
        rankings, similarities = arrays[f"{number}/rankings"].astype(np.int64), arrays[f"{number}/similarities"]
        scores.append(Scores(one["system"], one["task"], values, rankings, similarities))
    return scores


def find_base_scores(job: Job, encoder: TextEncoder, fingerprint: str) -> list[Scores] | None:
    """What an untrained encoder scored in an earlier training on the same data, None where that is not known.

    Kept beside the prepared data, under a hash of weights, precision and tasks, so that ten trainings on the same
    data score their base once. ``fingerprint`` is the model's without adapters: fresh ones change nothing. Scores
    that cannot be read are measured again.
    """
    if job.dataset.directory is None:
        return None
    try:
        return read_scores(job.dataset.directory, _name_base_scores(job, encoder, fingerprint))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def keep_base_scores(job: Job, encoder: TextEncoder, fingerprint: str, scores: list[Scores]) -> None:
    """Write what ``find_base_scores`` finds in a later training."""
    if job.dataset.directory is None:
        return
    tasks = [evaluator.task for evaluator in job.evaluators]
    try:
        write_scores(job.dataset.directory, _name_base_scores(job, encoder, fingerprint), 0, scores, tasks)
    except (OSError, DiskFull):
        pass  # kept scores only save time


def _name_base_scores(job: Job, encoder: TextEncoder, fingerprint: str) -> str:
    tasks = [evaluator.task for evaluator in job.evaluators]
    facts = [fingerprint, encoder.precision, encoder.device.type, encoder.slow_path_reason]
    facts += [(task.name, task.query_ids, task.fingerprint()) for task in tasks]
    return f"base-scores-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}"


def conclude(job: Job, model_name: str, base: list[Scores], tuned: list[Scores]) -> EvaluationReport:
    """Base, tuned and BM25 on the same questions, the paired verdicts, and whether training has seen any of it.

    A base that was trained here too has seen what its run trained on; where that was other data, it is not known.
    """
    sections = [
        build_section(evaluator.task, after, before, [evaluator.score_lexical()])
        for evaluator, before, after in zip(job.evaluators, base, tuned, strict=True)
    ]
    runs, seen = find_runs(model_name), [job.train]
    unknown = dict.fromkeys(find_lost(runs), "")
    for run in runs:
        if run.data.get("fingerprint") == job.dataset.fingerprint:
            config = TrainingConfig(**run.config)
            seen.append(split_articles(job.dataset, config.train_split, config.seed)[0])
        else:
            unknown[run.name] = "other data than this"
    audit = audit_overlap(
        take_training(job.dataset, np.unique(np.concatenate(seen)), "the training articles"),
        [take_evaluated(job.dataset, job.held_out)],
    )
    audit = replace(audit, unknown=unknown)
    dense, lexical = (sections[0].find_scores(role) for role in ("model", "lexical"))
    weight = job.evaluators[0].choose_weight(dense, lexical)  # for hybrid search with the saved model
    return EvaluationReport("tuned", model_name, {**job.report, "fusion_weight": weight}, sections, audit=audit)
