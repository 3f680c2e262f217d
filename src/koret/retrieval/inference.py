"""E5KorQuADInference: encode questions and passages, compare them, search a list of passages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from koret.retrieval.encoder import Kind, TextEncoder, load_encoder
from koret.retrieval.exact import find_top_k


class E5KorQuADInference:
    """A fine-tuned (or any) embedder ready to use; prefixes are added for you, vectors are of unit length.

    ``model_path`` is a run (directory, name or 'latest'), any sentence-transformers directory, a hub name, or
    'offline'. CUDA is used when present unless ``device`` says otherwise. Raises ValueError where no model is found.
    """

    def __init__(self, model_path: str | Path, device: str | None = None, *, precision: str = "fp32") -> None:
        self.encoder: TextEncoder = load_encoder(model_path, device=device, precision=precision)
        self.dimensions = self.encoder.dimensions

    def encode_query(self, query: str) -> np.ndarray:
        """One question -> (D,) float32."""
        return self._encode([query], "query", "query")[0]

    def encode_queries(self, queries: Sequence[str], show_progress: bool = True) -> np.ndarray:
        """N questions -> (N, D) float32."""
        return self._encode(queries, "query", "queries", show_progress)

    def encode_passage(self, passage: str) -> np.ndarray:
        """One passage -> (D,) float32."""
        return self._encode([passage], "passage", "passage")[0]

    def encode_passages(self, passages: Sequence[str], show_progress: bool = True) -> np.ndarray:
        """N passages -> (N, D) float32."""
        return self._encode(passages, "passage", "passages", show_progress)

    def compute_similarity(self, query_embedding: np.ndarray, passage_embeddings: np.ndarray) -> np.ndarray:
        """Cosine similarities: (D,) with (N, D) -> (N,); (Q, D) with (N, D) -> (Q, N); else ValueError."""
        queries, passages = np.asarray(query_embedding), np.atleast_2d(np.asarray(passage_embeddings))
        if queries.ndim not in (1, 2) or passages.ndim != 2 or queries.shape[-1] != passages.shape[-1]:
            raise ValueError(
                f"embeddings do not fit: query {queries.shape}, passages {passages.shape}; "
                f"expected (D,) or (Q, D) and (N, D) of the same D"
            )
        return queries @ passages.T

    def search(self, query: str, passages: Sequence[str], top_k: int = 5) -> list[dict[str, Any]]:
        """The ``top_k`` nearest passages: dicts of rank (from 1), passage, score (cosine) and index in ``passages``."""
        return self.batch_search([query], passages, top_k)[0]

    def batch_search(
        self, queries: Sequence[str], passages: Sequence[str], top_k: int = 5
    ) -> list[list[dict[str, Any]]]:
        """One ``search`` result per query; passages are encoded once, equal scores keep their order."""
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}")
        vectors = self.encode_queries(queries)  # checks the queries even where nothing can be found
        if len(passages) == 0:
            return [[] for _ in queries]
        rows, scores = find_top_k(vectors, self.encode_passages(passages), min(top_k, len(passages)))
        return [
            [
                {"rank": rank, "passage": passages[int(i)], "score": float(score), "index": int(i)}
                for rank, (i, score) in enumerate(zip(found, values, strict=True), 1)
            ]
            for found, values in zip(rows, scores, strict=True)
        ]

    def _encode(self, texts: Sequence[str], kind: Kind, noun: str, progress: bool = False) -> np.ndarray:
        if isinstance(texts, str):
            raise ValueError(f"{noun}: expected a list of texts, got one text; wrap it in a list")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{noun}[{i}]: expected text, got {type(text).__name__}")
        return self.encoder.encode(texts, kind, progress=progress)
