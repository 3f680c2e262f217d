"""Which questions are asked: the data set, the split a run was trained with, and what it has seen of them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from koret import runs
from koret.config import TrainingConfig
from koret.data.loader import Dataset, find_cache_dir, load_dataset
from koret.data.pairs import split_articles
from koret.evaluation.audit import Audit, Texts, audit_overlap, take_evaluated, take_task, take_training
from koret.evaluation.tasks import Kind, RetrievalTask, build_held_out_tasks

SPLITS = ("auto", "all", "held-out")


@dataclass(frozen=True)
class Selection:
    """The tasks, how their questions were chosen, and the training side where it is known."""

    dataset: Dataset
    tasks: list[RetrievalTask]
    split: str  # all | held-out
    asked: np.ndarray  # rows of the articles asked about
    training: Texts | None  # what the model was trained on; None: not known

    def audit(self, extra: Sequence[RetrievalTask] = ()) -> Audit | None:
        """Leakage from training into the questions and the extra sets; None where training is not known."""
        if self.training is None:
            return None
        name = "the held-out articles" if self.split == "held-out" else "the data set"
        return audit_overlap(self.training, [take_evaluated(self.dataset, self.asked, name), *map(take_task, extra)])

    def describe(self) -> dict[str, Any]:
        return {
            "fingerprint": self.dataset.fingerprint,
            "split": self.split,
            "articles_asked": len(self.asked),
            "articles": self.dataset.articles.num_rows,
            "questions": self.dataset.questions.num_rows,
            "passages": self.dataset.passages.num_rows,
        }


def select_questions(
    dataset: Dataset,
    training_data: Dataset | None = None,
    *,
    trained: Sequence[runs.Run] = (),
    kinds: Sequence[Kind] = ("passage", "answer"),
    split: str = "auto",
    max_queries: int | None = None,
) -> Selection:
    """Choose the questions of ``dataset`` and build the tasks.

    ``trained`` are the runs the models come from, ``training_data`` what the first was trained on when that is another
    data set. ``auto`` asks what the runs trained on ``dataset`` held out (all of them, when there are several), else
    every question. ``held-out`` without such a run uses the default split. Raises ValueError for an unknown split,
    ``max_queries`` below 1, or when the runs held out no article in common.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if max_queries is not None and max_queries < 1:
        raise ValueError(f"--max-queries must be at least 1, not {max_queries}")
    own = [TrainingConfig(**run.config) for run in trained if run.data.get("fingerprint") == dataset.fingerprint]
    settings = own[0] if own else TrainingConfig()
    everything = np.arange(dataset.articles.num_rows)
    train, held_out = everything[:0], everything
    for config in own or ([settings] if split == "held-out" else []):
        theirs, kept = split_articles(dataset, config.train_split, config.seed)
        train, held_out = np.union1d(train, theirs), np.intersect1d(held_out, kept)
    if not len(held_out):
        raise ValueError("the runs were trained with different splits and held out no article in common")
    training = take_training(dataset, train, "the runs' training articles") if own else None
    if training is None and trained and training_data is not None:
        config = TrainingConfig(**trained[0].config)
        theirs, _ = split_articles(training_data, config.train_split, config.seed)
        training = take_training(training_data, theirs, f"training articles of {Path(config.dataset_root).name}")
    split = "held-out" if split == "held-out" or (split == "auto" and own) else "all"
    if split == "all":
        train, held_out = everything[:0], everything
    tasks = build_held_out_tasks(
        dataset, train, held_out, kinds, corpus_size=settings.eval_corpus_size, samples=max_queries, seed=settings.seed
    )
    return Selection(dataset, tasks, split, held_out, training)


def open_data(
    source: str | Path | Dataset, encoder: Any, trained: Sequence[runs.Run] = (), **loading: Any
) -> tuple[Dataset, Dataset | None]:
    """The data set to ask about, and what the first run was trained on where that is another set and still there.

    Pages are cut into passages as that run cut them, else to the encoder's length by its tokens. ``loading`` goes to
    ``load_dataset``.
    """
    if not isinstance(source, (str, Path)):
        return source, None
    settings: dict[str, Any] = {"max_seq_length": getattr(encoder, "max_seq_length", 256), **loading}
    if hasattr(encoder, "export_tokenizer"):
        settings["tokenizer"] = encoder.export_tokenizer(find_cache_dir(loading.get("cache_dir")) / "tokenizers")
    if trained:
        config = TrainingConfig(**trained[0].config)
        settings |= {"max_seq_length": config.max_seq_length, "passage_tokens": config.passage_tokens}
        settings["overlap"] = config.passage_overlap
    dataset = load_dataset(source, **settings)
    if not trained or trained[0].data.get("fingerprint") == dataset.fingerprint:
        return dataset, None
    try:
        return dataset, load_dataset(config.dataset_root, **{**settings, "max_bad": config.max_bad})
    except (FileNotFoundError, ValueError):
        return dataset, None


def find_runs(*models: Any) -> list[runs.Run]:
    """The runs that models named by path or name come from; others are passed over."""
    found = []
    for model in models:
        if isinstance(model, (str, Path)):
            with contextlib.suppress(FileNotFoundError):
                found.append(runs.read_run(runs.resolve_model(model)))
    return found
