"""Where an index lies (a folder, or a database by URL), and what it says about itself and its model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from koret import runs
from koret.data.loader import find_cache_dir
from koret.retrieval import offline
from koret.retrieval.encoder import TextEncoder
from koret.retrieval.folder import FolderStore
from koret.retrieval.store import Store


class IndexInfo(msgspec.Struct, frozen=True):
    """What an index says about itself."""

    encoder: str  # name to show
    model: str | None  # hub name, 'offline' or a path relative to the index; None: was not kept, name it when searching
    fingerprint: str
    prefixes: dict[str, str]
    dimensions: int
    max_seq_length: int
    passage_tokens: int
    tokenizer: str  # fingerprint
    dtype: str = "float16"
    lexical: tuple[str, ...] = ("bigram",)
    hybrid_weight: float | None = None  # of the dense score; None: reciprocal rank
    format: int = 1


def is_database(location: str | Path) -> bool:
    return str(location).startswith(("milvus:", "milvus+https:"))


def _store_class(location: str | Path) -> Any:
    if is_database(location):
        from koret.retrieval.milvus import MilvusStore

        return MilvusStore
    return FolderStore


def open_store(location: str | Path) -> Store:
    return _store_class(location).open(str(location))


def exists(location: str | Path) -> bool:
    if is_database(location):
        try:
            open_store(location).close()
        except FileNotFoundError:
            return False
        return True
    return (Path(location) / "manifest.json").exists() or any(Path(location).glob("segments/*"))


def create_store(location: str | Path, info: IndexInfo) -> Store:
    """An empty index. Raises ValueError where something else lies, or for a dtype it cannot keep."""
    if info.dtype == "binary" and is_database(location):
        raise ValueError(f"{location} keeps whole vectors: leave --dtype binary out, or build the index in a folder")
    return _store_class(location).create(str(location), msgspec.to_builtins(info), info.dimensions)


def describe_encoder(encoder: TextEncoder, out: str | Path, wanted: dict[str, Any]) -> IndexInfo:
    tokenizer = encoder.export_tokenizer(find_cache_dir(None) / "tokenizers").stem
    return IndexInfo(
        encoder=_name_model(encoder.name),
        model=_refer(encoder.name, out),
        fingerprint=encoder.fingerprint(),
        prefixes=dict(encoder.prefixes),
        dimensions=encoder.dimensions,
        max_seq_length=encoder.max_seq_length,
        tokenizer=tokenizer,
        **{"passage_tokens": encoder.max_seq_length, **{k: v for k, v in wanted.items() if v is not None}},
    )


def _name_model(name: str) -> str:
    """A model's name to show: that of its run or directory, without where it lies."""
    path = Path(name)
    if not path.is_dir():
        return name
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def _refer(name: str, out: str | Path) -> str | None:
    """The model as an index may keep it: a name, or a path relative to the index that names no person."""
    if name == offline.NAME:
        return name
    try:
        path = Path(runs.resolve_model(name)).resolve()
    except FileNotFoundError:
        return name
    if is_database(out):
        return None
    relative = os.path.relpath(path, Path(out).resolve())
    home = Path.home().name
    return None if home and home in Path(relative).parts else f"./{relative}"


def resolve_model(info: IndexInfo, location: str) -> str:
    if info.model is None:
        raise ValueError(f"{location} does not say where its model ({info.encoder}) is: name it with --model")
    if not info.model.startswith("."):
        return info.model
    path = Path(location, info.model).resolve()
    if not path.exists():
        raise ValueError(f"the model of {location} ({info.model} from there) is gone: name it with --model")
    return str(path)
