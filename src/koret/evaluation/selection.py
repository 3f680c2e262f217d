"""Which questions are asked: the data set, the split a run was trained with, and what it has seen of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from koret import runs
from koret.config import TrainingConfig
from koret.data.loader import Dataset, find_cache_dir, load_dataset
from koret.data.pairs import split_articles
from koret.evaluation.audit import Audit, Texts, audit_overlap, merge_texts, take_evaluated, take_task, take_training
from koret.evaluation.tasks import Kind, RetrievalTask, build_held_out_tasks

SPLITS = ("auto", "all", "held-out")


@dataclass(frozen=True)
class Selection:
    """The tasks, how their questions were chosen, and the training side as far as it is known."""

    dataset: Dataset
    tasks: list[RetrievalTask]
    split: str  # all | held-out
    asked: np.ndarray  # rows of the articles asked about
    training: Texts | None  # what the models were trained on; None: not known
    unknown: Mapping[str, str] = field(default_factory=dict)  # models whose training is not in it -> why, or ''

    def audit(self, extra: Sequence[RetrievalTask] = ()) -> Audit:
        """Leakage from training into the questions and the extra sets; without findings where nothing is known."""
        if self.training is None:
            return Audit("", [], self.unknown)
        name = "the held-out articles" if self.split == "held-out" else "the data set"
        found = audit_overlap(self.training, [take_evaluated(self.dataset, self.asked, name), *map(take_task, extra)])
        return replace(found, unknown=self.unknown)

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
    training_data: Mapping[str, Dataset | str] | None = None,
    *,
    trained: Sequence[runs.Run] = (),
    unknown: Sequence[str] = (),
    kinds: Sequence[Kind] = ("passage", "answer"),
    split: str = "auto",
    max_queries: int | None = None,
) -> Selection:
    """Choose the questions of ``dataset`` and build the tasks.

    ``trained`` are the runs the models come from, ``unknown`` names the models that come from none, ``training_data``
    is what ``open_data`` gave for the runs trained on other data sets. ``auto`` asks what the runs trained on
    ``dataset`` held out (all of them, when there are several), else every question. ``held-out`` without such a run
    uses the default split. Raises ValueError for an unknown split, ``max_queries`` below 1, or when the runs held out
    no article in common.
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
    sides = [take_training(dataset, train, "the runs' training articles")] if own else []
    reasons = dict.fromkeys(unknown, "")
    for run in (run for run in trained if run.data.get("fingerprint") != dataset.fingerprint):
        data = (training_data or {}).get(run.data.get("fingerprint", ""), "")
        if isinstance(data, str):
            reasons[run.name] = data
            continue
        config = TrainingConfig(**run.config)
        theirs, _ = split_articles(data, config.train_split, config.seed)
        sides.append(take_training(data, theirs, f"training articles of {Path(config.dataset_root).name}"))
    training = merge_texts(sides) if sides else None
    split = "held-out" if split == "held-out" or (split == "auto" and own) else "all"
    if split == "all":
        train, held_out = everything[:0], everything
    tasks = build_held_out_tasks(
        dataset, train, held_out, kinds, corpus_size=settings.eval_corpus_size, samples=max_queries, seed=settings.seed
    )
    return Selection(dataset, tasks, split, held_out, training, reasons)


def open_data(
    source: str | Path | Dataset, encoder: Any, trained: Sequence[runs.Run] = (), **loading: Any
) -> tuple[Dataset, dict[str, Dataset | str]]:
    """The data set to ask about, and by fingerprint what the runs trained on others were trained on.

    In place of one that is gone or changed stands what is wrong with it. Pages are cut into passages as the first run
    cut them, else to the encoder's length by its tokens. ``loading`` goes to ``load_dataset``.
    """
    if not isinstance(source, (str, Path)):
        return source, {}
    settings: dict[str, Any] = {"max_seq_length": getattr(encoder, "max_seq_length", 256), **loading}
    settings |= _name_tokenizer(encoder, loading)
    dataset = load_dataset(source, **settings | (_list_cuts(trained[0]) if trained else {}))
    others: dict[str, Dataset | str] = {}
    for run in trained:
        fingerprint = run.data.get("fingerprint", "")
        if fingerprint != dataset.fingerprint and not isinstance(others.get(fingerprint), Dataset):
            others[fingerprint] = _open_training(run, settings, first=run is trained[0])
    return dataset, others


def _list_cuts(run: runs.Run) -> dict[str, Any]:
    """How the run cut its pages."""
    config = TrainingConfig(**run.config)
    settings = {"max_seq_length": config.max_seq_length, "passage_tokens": config.passage_tokens}
    return settings | {"overlap": config.passage_overlap}


def _name_tokenizer(encoder: Any, loading: Mapping[str, Any]) -> dict[str, Path]:
    if not hasattr(encoder, "export_tokenizer"):
        return {}
    return {"tokenizer": encoder.export_tokenizer(find_cache_dir(loading.get("cache_dir")) / "tokenizers")}


def _open_training(run: runs.Run, settings: Mapping[str, Any], first: bool) -> Dataset | str:
    """What the run was trained on, if it is still the same, else in words what is wrong with it."""
    config = TrainingConfig(**run.config)
    name = Path(config.dataset_root).name
    tried = []
    for tokenizer in _list_tokenizers(run, settings, first):
        if tokenizer in tried:
            continue
        tried.append(tokenizer)
        given = {**settings, **_list_cuts(run), "max_bad": config.max_bad, "tokenizer": tokenizer}
        try:
            data = load_dataset(config.dataset_root, **given)
        except (OSError, ValueError):
            return f"{name} cannot be read"
        if data.fingerprint == run.data.get("fingerprint"):
            return data
    return f"{name} now gives other data"


def _list_tokenizers(run: runs.Run, settings: Mapping[str, Any], first: bool) -> Iterator[Path | None]:
    """What may have counted the run's tokens: the evaluated model's tokenizer, likely where it is the run's."""
    if first:
        yield settings.get("tokenizer")
    if run.model is not None:
        from koret.retrieval.encoder import load_encoder

        with contextlib.suppress(OSError, ValueError):
            yield _name_tokenizer(load_encoder(run.model, device="cpu"), settings).get("tokenizer")
    yield settings.get("tokenizer")


def find_runs(*models: Any) -> list[runs.Run]:
    """The runs that models named by path or name come from, and those their bases come from; others are passed over."""
    found: dict[Path, runs.Run] = {}
    for model in models:
        run = runs.find_origin(model) if isinstance(model, (str, Path)) else None
        while run is not None and run.path.resolve() not in found:
            found[run.path.resolve()] = run
            run = _find_base(run)
    return list(found.values())


def _find_base(run: runs.Run) -> runs.Run | None:
    """The run a run's base comes from: where its settings say, from here, or beside it under the name it had."""
    wanted = run.base_run
    places = [run.config.get("model_name"), *([run.path.parent / wanted] if wanted else [])]
    found = [origin for place in places if place and (origin := runs.find_origin(place))]
    return next((origin for origin in found if wanted in (None, origin.name)), None)


def find_lost(found: Sequence[runs.Run]) -> list[str]:
    """Names of the runs that bases of ``find_runs``' runs come from, where they are not among these."""
    names = [run.name for run in found]
    return [run.base_run for run in found if run.base_run and run.base_run not in names]


def find_trained(model: Any, baseline: Any = None) -> dict[str, Any]:
    """``trained`` and ``unknown`` of a scored model and its baseline, for ``select_questions``.

    The model must come from a run for its training to be known. A baseline from none is what has not been trained.
    """
    names = [m if isinstance(m, (str, Path)) else getattr(m, "name", None) for m in (model, baseline)]
    name = Path(str(names[0] or "this model").rstrip("/").removesuffix("/model")).name
    trained = find_runs(*names)
    return {"trained": trained, "unknown": [*([] if find_runs(names[0]) else [name]), *find_lost(trained)]}
