"""Build one index with several processes, on one machine or many: each encodes its share of the documents.

The processes are those ``accelerate launch`` (or torchrun) starts; every one runs the same command. A document belongs
to the process its id hashes to, so shares need no talk. Into a database every process writes its own share. A folder
has one writer: process 0 takes in the shares of all, which lie as folders beside the index until then, so processes
on several machines need a file system they share.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from koret.data.korquad import Reject
from koret.retrieval.corpus import read_corpus
from koret.retrieval.encoder import TextEncoder, load_encoder
from koret.retrieval.folder import FolderStore
from koret.retrieval.index import BuildReport, Index, build_index, check_budget
from koret.retrieval.milvus_connection import parse_url
from koret.retrieval.places import create_store, describe_encoder, exists, is_database, open_store
from koret.retrieval.processes import Process, choose_device, find_process, join_group
from koret.retrieval.store import Store


def build_shares(
    model: str | Path | TextEncoder,
    corpus: str | Path,
    out: str | Path,
    *,
    approximate: bool = False,
    max_seq_length: int | None = None,
    prune: bool = False,
    progress: Callable[[int], None] | None = None,
    **settings: Any,
) -> Index | None:
    """``index.build_index``, shared among the processes of a launch; alone it is that function.

    Every process reads the whole corpus and encodes its own documents. Process 0 gets the index, with the report over
    all; the others get None once everything is kept. ``settings`` go to ``build_index``, and so do its errors. When a
    process fails the launcher ends the others; the same command goes on from what was kept.
    """
    process = find_process()
    if process.count > 1 and is_database(out) and parse_url(str(out)).file:
        raise ValueError(f"{out} serves one process; start it as a server (milvus-lite server) and name its address")
    encoder = model
    if not isinstance(encoder, TextEncoder):
        encoder = load_encoder(model, max_seq_length=max_seq_length, device=choose_device(process))
    whole = {"approximate": approximate, "prune": prune, **settings}
    group = join_group()
    if group.alone:
        return build_index(encoder, corpus, out, progress=progress, **whole)
    group.lead(_make_index, encoder, out, settings)
    report = _build_share(process, encoder, corpus, out, progress)
    reports = group.gather(msgspec.to_builtins(report))
    index = None
    if group.leads:
        if not is_database(out):
            _merge_shares(Path(out))
        index = build_index(encoder, corpus, out, progress=progress, **whole)  # finds all there, or adds it
        index.report = _add_up([msgspec.convert(own, BuildReport) for own in reports], index.report)
    group.wait()
    return index


# ---- details


class Share:
    """What one process adds to a folder index: known is what the whole has, new documents go to a folder beside it."""

    def __init__(self, whole: Store, part: FolderStore) -> None:
        self.info, self.find_versions, self.add = whole.info, whole.find_versions, part.add


def _make_index(encoder: TextEncoder, out: str | Path, settings: dict[str, Any]) -> None:
    """An empty index, or the one that is there once its settings are found to fit and old shares are taken in."""
    if not exists(out):
        check_budget(settings.get("passage_tokens"), encoder)
        create_store(out, describe_encoder(encoder, out, settings)).close()
        return
    index = Index(open_store(out), str(out), encoder)
    index.close()
    for name, value in settings.items():
        kept = getattr(index.info, name)
        if name != "hybrid_weight" and value is not None and value != kept:
            raise ValueError(f"{out} was made with {name} {kept}, not {value}: build another index, or leave it out")
    if not is_database(out):
        _merge_shares(Path(out))


def _build_share(
    process: Process,
    encoder: TextEncoder,
    corpus: str | Path,
    out: str | Path,
    progress: Callable[[int], None] | None,
) -> BuildReport:
    own = (item for item in read_corpus(corpus) if isinstance(item, Reject) or process.owns(item.id))
    store = open_store(out)
    part = None
    try:
        if not is_database(out):
            info = {**store.info, "lexical": []}  # words are counted once, when the share is taken in
            part = FolderStore.create(_name_share(Path(out), process.rank), info, store.info["dimensions"])
        return Index(Share(store, part) if part else store, str(out), encoder).add(own, progress)
    finally:
        if part:
            part.close()
        store.close()


def _merge_shares(out: Path) -> None:
    """Take the passages of every share into the index, then remove the share; a kill between repeats one harmlessly."""
    shares = sorted(out.parent.glob(f"{out.name}.share-*"))
    if not shares:
        return
    whole = FolderStore.open(out)
    for share in shares:
        if (share / "manifest.json").exists():
            part = FolderStore.open(share)
            for entries, vectors in part.read_segments():
                whole.add(entries, vectors)
            part.close()
        shutil.rmtree(share)
    whole.close()


def _name_share(out: Path, rank: int) -> Path:
    return out.with_name(f"{out.name}.share-{rank}")


def _add_up(reports: Sequence[BuildReport], last: BuildReport) -> BuildReport:
    """One report over all shares; the last pass over the whole corpus met everything that was rejected."""
    whole = msgspec.structs.replace(last, seconds=last.seconds + max(report.seconds for report in reports))
    for name in ("added", "changed", "unchanged", "encoded", "cut_texts"):
        setattr(whole, name, sum(getattr(report, name) for report in reports))
    return whole
