"""A guide model's vectors of every training text, made once before the first step and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as dump_arrays

from koret.data.pairs import PairTable
from koret.files import DiskFull, write_file
from koret.retrieval.encoder import Kind, TextEncoder, load_encoder

EMBED_AT_ONCE = 16384  # texts


@dataclass(frozen=True)
class GuideTable:
    """Unit vectors of G dimensions in float16, and the fingerprint of the guide they are of."""

    queries: np.ndarray  # (P, G) of the pairs' questions
    texts: np.ndarray  # (T, G) of the pair table's texts
    fingerprint: str

    def take(self, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """(len(rows) + len(ids), G) float32: questions of pairs ``rows``, then texts ``ids``."""
        return np.concatenate([self.queries[rows], self.texts[ids]]).astype(np.float32)


def embed_with_guide(name: str, precision: str, pairs: PairTable, cache: Path | None = None) -> GuideTable:
    """Load the guide ``name``, embed the pairs' questions and texts, and let the model go.

    In the folder ``cache`` the vectors are kept, found by a hash of guide, precision and texts. Raises ValueError
    where the model cannot be had.
    """
    encoder = load_encoder(name, precision=precision)
    fingerprint = encoder.fingerprint()
    asked, row = np.unique(np.array(pairs.queries, dtype=object), return_inverse=True)
    queries = _embed(encoder, asked.tolist(), "query", fingerprint, cache)
    texts = _embed(encoder, pairs.texts, "passage", fingerprint, cache)
    return GuideTable(queries[row.reshape(-1)], texts, fingerprint)


def _embed(encoder: TextEncoder, texts: Sequence[str], kind: Kind, fingerprint: str, cache: Path | None) -> np.ndarray:
    """(N, G) float16, texts of like length together."""
    path = cache / f"guide-{_hash_inputs(encoder, texts, kind, fingerprint)}.safetensors" if cache else None
    shape = (len(texts), encoder.dimensions)
    if path is not None and (kept := _read(path, shape)) is not None:
        return kept
    vectors = np.empty(shape, np.float16)
    order = np.argsort([-len(text) for text in texts], kind="stable")
    for start in range(0, len(order), EMBED_AT_ONCE):
        piece = order[start : start + EMBED_AT_ONCE]
        vectors[piece] = encoder.encode([texts[i] for i in piece.tolist()], kind)
    if path is not None:
        try:
            write_file(path, dump_arrays({"vectors": vectors}))
        except (OSError, DiskFull):
            pass  # the cache only saves time: the run goes on without it
    return vectors


def _hash_inputs(encoder: TextEncoder, texts: Sequence[str], kind: Kind, fingerprint: str) -> str:
    digest = hashlib.sha256(repr((fingerprint, encoder.precision, kind)).encode())
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    try:
        vectors = load_file(path)["vectors"]
    except (OSError, SafetensorError, KeyError):
        return None
    return vectors if vectors.shape == shape and vectors.dtype == np.float16 else None
