"""From settings to everything a training needs before its first step: data, split, pairs, tokens, tasks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from koret.config import TrainingConfig
from koret.data.columns import read_column
from koret.data.loader import Dataset, find_cache_dir, load_dataset
from koret.data.pairs import PairTable, assert_no_leak, build_pairs, split_articles
from koret.evaluation.evaluator import Evaluator
from koret.evaluation.tasks import build_held_out_tasks
from koret.privacy import scrub
from koret.retrieval.encoder import TextEncoder
from koret.retrieval.processes import Group, SharedEncoder
from koret.training.batches import BatchMaker, TokenTable, tokenize_texts
from koret.training.guide import embed_with_guide
from koret.training.mining import Mined, MiningSettings, mine_negatives
from koret.training.negatives import add_scores, list_by_question, read_negatives, write_negatives
from koret.training.schedule import Schedule


@dataclass(frozen=True)
class Job:
    """What a run trains on and is scored on."""

    dataset: Dataset
    train: np.ndarray  # rows of the articles trained on
    held_out: np.ndarray  # rows of the articles asked about
    pairs: PairTable
    schedule: Schedule
    maker: BatchMaker
    evaluators: list[Evaluator]  # the first decides; a second one scores question -> answer
    report: dict[str, Any]  # data.json

    def question_ids(self, rows: np.ndarray) -> list[str]:
        """The record ids behind rows of the pair table."""
        return [self.dataset.questions.column("id")[int(row)].as_py() for row in self.pairs.question[rows]]


def prepare_job(config: TrainingConfig, encoder: TextEncoder, dataset: Dataset) -> Job:
    """Split by article, build pairs, tokenise, plan the steps and the evaluation.

    Raises ValueError, before any step, when there is nothing to train on or to score.
    """
    train, held_out = split_articles(dataset, config.train_split, config.seed)
    assert_no_leak(dataset, train, held_out)
    mined, origin = None, {}
    if config.hard_negatives is not None:
        mined, origin = read_negatives(Path(config.hard_negatives).expanduser(), dataset, train)
    pairs = make_pairs(config, dataset, train, mined)
    _require_enough(pairs, config)
    schedule = Schedule(
        pairs,
        batch_size=config.batch_size,
        epochs=config.num_epochs,
        seed=config.seed,
        accumulate=config.gradient_accumulation_steps,
        max_steps=config.max_steps,
        batching=config.batching,
    )
    if schedule.total == 0:
        raise ValueError(
            "there would be no optimizer step: in every batch all pairs share one target, so there are no negatives; "
            "give data with more than one passage, or --positives answer"
        )
    if config.remine_every and not (read_column(dataset.questions, "best")[pairs.question] >= 0).any():
        raise ValueError("remine_every: no question here has a passage that answers it, so nothing can be mined for")
    cache = dataset.directory
    queries = tokenize_texts(encoder, pairs.queries, "query", cache)
    targets = tokenize_texts(encoder, pairs.texts, "passage", cache)
    tasks = build_held_out_tasks(
        dataset,
        train,
        held_out,
        ("passage",) if config.positives == "passage" else ("passage", "answer"),
        corpus_size=config.eval_corpus_size,
        samples=config.eval_samples,
        seed=config.seed,
    )
    limit = encoder.max_seq_length
    report = {
        "fingerprint": dataset.fingerprint,
        "source": config.dataset_root,
        "training_articles": len(train),
        "held_out_articles": len(held_out),
        "passages": dataset.passages.num_rows,
        "questions": dataset.questions.num_rows,
        "pairs": len(pairs),
        "different_targets": len(np.unique(pairs.targets)),
        "steps": schedule.total,
        "batches": measure_epoch(pairs, queries, targets, schedule.cut_epoch(0)[0]),
        "pairs_dropped_without_negatives": schedule.dropped,
        "questions_skipped": pairs.skipped,
        "hard_negatives": int(pairs.negatives.values.size),
        "hard_negatives_dropped_as_positive": pairs.dropped_negatives,
        "mined": {name: origin[name] for name in ("sha256", "model", "settings", "report") if name in origin} or None,
        "queries_cut": int((queries.lengths >= limit).sum()),
        "targets_cut": int((targets.lengths >= limit).sum()),
        "evaluation": [{**task.describe(), "excluded": len(task.excluded)} for task in tasks],
        "loading": dataset.report,
    }
    maker = make_maker(config, encoder, pairs, queries, targets, cache)
    if maker.guide is not None:
        report["guide"] = {"model": config.guide_model, "fingerprint": maker.guide.fingerprint}
    evaluators = [Evaluator(task) for task in tasks]
    return Job(dataset, train, held_out, pairs, schedule, maker, evaluators, scrub(report))


def make_pairs(config: TrainingConfig, dataset: Dataset, train: np.ndarray, mined: Mined | None) -> PairTable:
    """The pairs of the training articles, with the mined negatives that are asked for and the scores known of them."""
    lists = None if mined is None else list_by_question(mined, dataset, config.negatives_per_question)
    pairs = build_pairs(dataset, train, config.positives, config.max_samples, config.seed, lists)
    return pairs if mined is None else add_scores(pairs, mined, dataset)


def mine_into(path: Path, job: Job, config: TrainingConfig, encoder: SharedEncoder, group: Group) -> str:
    """Mine negatives for the pairs of ``job`` with the model as it is now, into the file ``path``; what came of it.

    The processes of ``group`` encode together, and the first writes.

    Without a margin, as in ANCE: what a model in training ranks above the positive is its mistake, not a finding.
    """
    settings = MiningSettings(per_question=config.negatives_per_question, margin_relative=None)
    asked = np.unique(job.pairs.question)
    asked = asked[read_column(job.dataset.questions, "best")[asked] >= 0]  # answers trained on may stand in no passage
    mined = mine_negatives(job.dataset, job.train, encoder, settings, questions=asked)
    origin = {"model": f"{config.model_name}, {path.stem}", "train_split": config.train_split, "seed": config.seed}
    group.lead(write_negatives, path, mined, job.dataset, settings, origin)
    return f"mined {mined.report['kept']:,} hard negatives for {mined.report['questions']:,} questions: {path.name}"


def replace_negatives(path: Path, job: Job, config: TrainingConfig, encoder: TextEncoder, group: Group) -> Job:
    """``job`` with the mined negatives of ``path`` in place of those before; rows and order of its pairs stay.

    The first process of ``group`` reads, the others are told.
    """
    mined, _ = group.lead(read_negatives, path, job.dataset, job.train)
    pairs = make_pairs(config, job.dataset, job.train, mined)
    targets = tokenize_texts(encoder, pairs.texts, "passage")
    return replace(
        job, pairs=pairs, maker=make_maker(config, encoder, pairs, job.maker.queries, targets, job.dataset.directory)
    )


def make_maker(
    config: TrainingConfig,
    encoder: TextEncoder,
    pairs: PairTable,
    queries: TokenTable,
    targets: TokenTable,
    cache: Path | None,
) -> BatchMaker:
    """What makes batches of ``pairs``, with the guide's vectors and the teacher's scores that are asked for.

    Raises ValueError where there is no teacher to distil from, or the model has no vectors as long as asked for.
    """
    if config.matryoshka_dims and max(config.matryoshka_dims) > encoder.dimensions:
        raise ValueError(
            f"matryoshka_dims: {max(config.matryoshka_dims)} is more than the {encoder.dimensions} dimensions of "
            f"{config.model_name}"
        )
    taught = config.distillation != "none" and config.guide_model is None
    if taught and (pairs.negative_scores is None or not np.isfinite(pairs.negative_scores).any()):
        raise ValueError(
            f"distillation: {config.distillation} needs a teacher's scores, and no hard negatives here carry any: give "
            "hard_negatives mined with koret mine, or a guide_model"
        )
    guide = None
    if config.guide_model is not None:
        guide = embed_with_guide(config.guide_model, encoder.precision, pairs, cache)
    return BatchMaker(
        pairs, queries, targets, config.mask_false_negatives, guide, taught, several=config.multi_positive
    )


def measure_epoch(
    pairs: PairTable, queries: TokenTable, targets: TokenTable, batches: list[np.ndarray]
) -> dict[str, Any]:
    """What one epoch of ``batches`` is made of: means per batch, the tokens encoded in all and in the heaviest."""
    question = np.unique(np.array(pairs.queries, dtype=object), return_inverse=True)[1]
    asked, read, tokens, counts = queries.lengths, targets.lengths, [], []
    for rows in batches:
        first = np.unique(question[rows], return_index=True)[1]
        ids = np.unique(np.concatenate([pairs.targets[rows], pairs.negatives.take(rows)[1]]))
        tokens.append(int(asked[rows[first]].sum() + read[ids].sum()))
        counts.append([len(rows), len(ids), len(np.unique(pairs.article[rows]))])
    means = np.mean(counts, axis=0).round(2).tolist()
    totals = {"tokens_of_an_epoch": sum(tokens), "tokens_of_the_heaviest": max(tokens)}
    return dict(zip(("pairs", "different_texts", "articles"), means, strict=True)) | totals


def load_data(config: TrainingConfig, encoder: TextEncoder, progress: bool) -> Dataset:
    """The data set the settings name, prepared or from the cache; pages are cut into passages by the model's tokens."""
    tokenizer = encoder.export_tokenizer(find_cache_dir(config.cache_dir) / "tokenizers")
    return load_dataset(
        config.dataset_root,
        tokenizer=tokenizer,
        passage_tokens=config.passage_tokens,
        max_seq_length=config.max_seq_length,
        overlap=config.passage_overlap,
        max_bad=config.max_bad,
        num_workers=config.num_workers,
        cache_dir=config.cache_dir,
        progress=progress,
    )


def _require_enough(pairs: PairTable, config: TrainingConfig) -> None:
    if len(pairs) < config.batch_size:
        skipped = ", ".join(f"{count} {reason}" for reason, count in pairs.skipped.items())
        raise ValueError(
            f"{len(pairs)} training pairs are fewer than one batch of {config.batch_size}"
            + (f" (skipped: {skipped})" if skipped else "")
            + ": give more data, or a smaller --batch-size"
        )
    if len(np.unique(pairs.targets)) < 2 and not pairs.negatives.values.size:
        raise ValueError("every training pair has the same target, so there are no negatives to learn from")


def require_source(config: TrainingConfig) -> None:
    """Raise FileNotFoundError before anything slow happens when the data cannot be there."""
    root = Path(config.dataset_root).expanduser()
    if config.dataset_root != "sample" and not root.exists():
        raise FileNotFoundError(f"dataset_root: there is no file or folder {config.dataset_root}")
    if config.hard_negatives is not None and not Path(config.hard_negatives).expanduser().is_file():
        raise FileNotFoundError(f"hard_negatives: there is no file {config.hard_negatives}: make it with koret mine")
