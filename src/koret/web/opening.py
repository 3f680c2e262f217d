"""From a command's words to a desk: which models, over which passages, with which questions, and which run's report."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from koret import runs
from koret.data.loader import Dataset, find_cache_dir
from koret.evaluation.selection import find_runs, open_data, select_questions
from koret.evaluation.tasks import RetrievalTask
from koret.retrieval.encoder import TextEncoder, load_encoder
from koret.retrieval.folder import FolderStore
from koret.retrieval.index import Index, IndexInfo, encode_entries, open_index
from koret.retrieval.store import Entry
from koret.web.desk import Column, Desk
from koret.web.questions import Questions, make_unit, take_questions
from koret.web.report import RunReport

TOGETHER = 1024  # passages encoded and kept at a time


@dataclass(frozen=True)
class Opened:
    """All the page shows."""

    desk: Desk
    report: RunReport | None

    def close(self) -> None:
        self.desk.close()


@dataclass(frozen=True)
class Evaluated:
    """A data set and what is asked about it."""

    dataset: Dataset
    task: RetrievalTask | None


def open_page(
    models: Sequence[str] = (),
    indexes: Sequence[str] = (),
    dataset_root: str | None = None,
    *,
    log_dir: str | Path = "./logs/tensorboard",
    cache_dir: str | Path | None = None,
    precision: str = "fp32",
    say: Callable[[str], None] = lambda text: None,
) -> Opened:
    """Load models and passages. ``say`` is told what takes long.

    No model and no index: the newest finished run and its base, over the passages of the run's data. Vectors are kept
    in ``cache_dir``, so the next start only opens them. Indexes are searched as they are; models named with them are
    their encoders, in order. Passages are encoded in float32, questions in ``precision``. Raises ValueError,
    FileNotFoundError or RuntimeError in words.
    """
    if indexes:
        opened = _open_indexes(indexes, models)
        encoders = [index.encoder for index in opened]
    else:
        models = models or _find_pair(log_dir)
        encoders = [load_encoder(_resolve(name, log_dir), precision="fp32") for name in models]
        opened = []
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // len(encoders)))
    trained = find_runs(*(encoder.name for encoder in reversed(encoders)))
    evaluated = None
    if dataset_root or trained or not indexes:
        try:
            evaluated = _open_evaluated(dataset_root, encoders[-1], trained, cache_dir)
        except (FileNotFoundError, ValueError):
            if dataset_root or not indexes:
                raise  # saved indexes need no data: without it the page only lacks questions to try
    if not opened:
        entries = _list_entries(evaluated.dataset)
        opened = [keep_index(encoder, entries, evaluated.dataset.fingerprint, cache_dir, say) for encoder in encoders]
    report = None
    if trained:
        with contextlib.suppress(FileNotFoundError):
            report = RunReport(trained[0], *((evaluated.task, evaluated.dataset) if evaluated else ()))
    task = evaluated.task if evaluated else None
    questions = take_questions(evaluated.dataset, task) if task else Questions()
    corpus = Path(str(indexes[-1])).name if indexes else Path(str(evaluated.dataset.report.get("root", ""))).name
    desk = Desk(_name_columns(encoders, trained), opened, questions, corpus, precision)
    return Opened(desk, report)


def keep_index(
    encoder: TextEncoder,
    entries: Sequence[Entry],
    fingerprint: str,
    cache_dir: str | Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Index:
    """An index of exactly these passages in the cache; only what it lacks is encoded.

    ``fingerprint`` says which passages: other passages or another encoder are another folder.
    """
    own = encoder.fingerprint()
    folder = find_cache_dir(cache_dir) / "indexes" / hashlib.sha256(f"{own} {fingerprint}".encode()).hexdigest()[:24]
    if not (folder / "manifest.json").is_file():
        info = IndexInfo(
            encoder=Path(encoder.name).name,
            model=None,
            fingerprint=own,
            prefixes=dict(encoder.prefixes),
            dimensions=encoder.dimensions,
            max_seq_length=encoder.max_seq_length,
            passage_tokens=encoder.max_seq_length,
            tokenizer="",
        )
        FolderStore.create(folder, msgspec.to_builtins(info), info.dimensions).close()
    index = Index(FolderStore.open(folder), str(folder), encoder, fingerprint=own)
    versions = index.store.find_versions([entry.document for entry in entries])
    missing = [entry for entry, version in zip(entries, versions, strict=True) if version != entry.version]
    if missing:
        say(f"encoding {len(missing):,} passages for {_name_encoder(encoder)} (once; kept for the next start)")
    for start in range(0, len(missing), TOGETHER):
        batch = missing[start : start + TOGETHER]
        index.store.add(batch, encode_entries(encoder, batch))
    return index


def _open_indexes(indexes: Sequence[str], models: Sequence[str]) -> list[Index]:
    if models and len(models) != len(indexes):
        raise ValueError(
            f"{len(models)} models and {len(indexes)} indexes: name one model for each --index, or none at all"
        )
    return [open_index(path, model) for path, model in zip(indexes, models or [None] * len(indexes), strict=True)]


def _find_pair(log_dir: str | Path) -> list[str]:
    """The newest run with a model and what it was tuned from."""
    finished = [run for run in runs.find_runs(log_dir) if run.model]
    if not finished:
        raise FileNotFoundError(
            f"no finished run in {log_dir}: train a model first (make train), or name models and data, "
            "for example: koret web offline --dataset-root sample"
        )
    return [finished[-1].config["model_name"], str(finished[-1].model)]


def _resolve(name: str, log_dir: str | Path) -> str:
    """A run's name in ``log_dir`` as a path; other names stay."""
    try:
        return str(runs.resolve_model(name, log_dir))
    except FileNotFoundError:
        if name == "latest":
            raise
        return name


def _open_evaluated(
    dataset_root: str | None, encoder: TextEncoder, trained: Sequence[runs.Run], cache_dir: str | Path | None
) -> Evaluated:
    source = dataset_root or (trained[0].config["dataset_root"] if trained else "sample")
    try:
        dataset, training = open_data(source, encoder, trained, cache_dir=cache_dir, progress=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; name the data with --dataset-root") from error
    if not dataset.passages.num_rows:
        raise ValueError(f"{source} holds no passage to search")
    try:
        asked = select_questions(dataset, training, trained=trained, kinds=("passage",))
    except ValueError:  # no question that can be scored: there is still something to search
        return Evaluated(dataset, None)
    return Evaluated(dataset, asked.tasks[0])


def _list_entries(dataset: Dataset) -> list[Entry]:
    """Every different passage; its row is its id."""
    columns = dataset.passages.column("heading").to_pylist(), dataset.passages.column("text").to_pylist()
    units = {}
    for row, unit in enumerate(zip(*columns, strict=True)):
        units.setdefault(make_unit(*unit), (row, *unit))
    version = dataset.fingerprint[:16]
    return [Entry(f"p{row}#1", f"p{row}", heading, text, version) for row, heading, text in units.values()]


def _name_columns(encoders: Sequence[TextEncoder], trained: Sequence[runs.Run]) -> list[Column]:
    """A column per model; a run and the model it was tuned from are called what they are to each other."""
    tuned = {str(run.path): run for run in trained}
    bases = {str(run.config.get("model_name")) for run in trained}
    columns = []
    for number, encoder in enumerate(encoders):
        run = tuned.get(str(Path(encoder.name).parent)) or tuned.get(encoder.name)
        kind = "tuned" if run else "base" if encoder.name in bases else "model"
        columns.append(Column(f"m{number}", kind, _name_encoder(encoder)))
    kinds = [column.kind for column in columns]
    if len(columns) == 2 and kinds == ["base", "tuned"]:
        return columns
    return [msgspec.structs.replace(column, kind="model") for column in columns]


def _name_encoder(encoder: TextEncoder) -> str:
    path = Path(encoder.name)
    return path.parent.name if path.name == "model" else path.name
