"""Exported folders as encoders: texts -> unit vectors through ONNX Runtime, OpenVINO or plain sentence-transformers.

Letters: N texts, L tokens of the longest, C width of the transformer, D dimensions of a vector.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from koret.retrieval.encoder import CHARACTERS_PER_TOKEN, Kind, cut_by_tokens

BATCH_TOKENS = 8192
#: token ids and mask (N, L) int64 -> (N, L, C) float32
Forward = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Exported(Protocol):
    """What an exported folder can do."""

    name: str
    dimensions: int

    def tokenize(self, texts: Sequence[str], kind: Kind) -> list[np.ndarray]: ...

    def encode(self, texts: Sequence[str], kind: Kind, *, progress: bool = False) -> np.ndarray: ...


def open_exported(folder: str | Path, *, threads: int | None = None) -> Exported:
    """The encoder of an exported folder: ONNX or OpenVINO files where there are any, else its safetensors.

    ``threads``: how many the engine uses (default: its own choice). Raises FileNotFoundError where there is no model,
    RuntimeError naming the extra where the engine is not installed.
    """
    folder = Path(folder)
    if found := sorted(folder.glob("onnx/*.onnx")):
        return EngineEncoder(folder, _open_onnx(found[0], threads))
    if found := sorted(folder.glob("openvino/*.xml")):
        return EngineEncoder(folder, _open_openvino(found[0], threads))
    if (folder / "model.safetensors").is_file():
        return PlainEncoder(folder)
    raise FileNotFoundError(f"{folder} holds no exported model: make one with koret export")


class EngineEncoder:
    """Tokenising, pooling, cutting and normalising around an engine; no torch in the way."""

    def __init__(self, folder: Path, forward: Forward) -> None:
        self.name, self.forward = folder.name, forward
        self.tokenizer = read_tokenizer(folder)
        config = _read(folder / "config.json")
        self.pad = int(config.get("pad_token_id") or 0)
        self.prompts = _read(folder / "config_sentence_transformers.json")["prompts"]
        self.max_seq_length = int(_read(folder / "sentence_bert_config.json")["max_seq_length"])
        self.mean = bool(_read(folder / "1_Pooling" / "config.json")["pooling_mode_mean_tokens"])
        dense = folder / "2_Dense" / "config.json"
        self.dimensions = int(_read(dense)["out_features"]) if dense.is_file() else int(config["hidden_size"])
        self.tokenizer.enable_truncation(self.max_seq_length)

    def tokenize(self, texts: Sequence[str], kind: Kind) -> list[np.ndarray]:
        """Token ids of each text, prefix and special tokens included: N arrays of int32."""
        clip = self.max_seq_length * CHARACTERS_PER_TOKEN
        rows = self.tokenizer.encode_batch([self.prompts[kind] + text[:clip] for text in texts])
        return [np.asarray(row.ids, np.int32) for row in rows]

    def encode(self, texts: Sequence[str], kind: Kind, *, progress: bool = False) -> np.ndarray:
        """Texts -> (N, D) float32 unit vectors, longest first in batches of a token budget."""
        ids = self.tokenize(texts, kind)
        vectors = np.empty((len(ids), self.dimensions), np.float32)
        order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
        for batch in cut_by_tokens(order, ids, BATCH_TOKENS):
            vectors[batch] = self._embed([ids[i] for i in batch])
        return vectors

    def _embed(self, ids: list[np.ndarray]) -> np.ndarray:
        tokens = np.full((len(ids), max(map(len, ids))), self.pad, np.int64)
        mask = np.zeros_like(tokens)
        for row, x in enumerate(ids):
            tokens[row, : len(x)], mask[row, : len(x)] = x, 1
        states = self.forward(tokens, mask)
        pooled = np.einsum("nlc,nl->nc", states, mask.astype(np.float32)) if self.mean else states[:, 0]
        if self.mean:
            pooled = pooled / mask.sum(axis=1, keepdims=True)
        kept = pooled[:, : self.dimensions]
        return kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-12)


class PlainEncoder:
    """The folder as a user without koret loads it: SentenceTransformer(folder).encode(texts, prompt_name=...)."""

    def __init__(self, folder: Path) -> None:
        from sentence_transformers import SentenceTransformer

        self.name = folder.name
        self.model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        self.dimensions = int(self.model.get_embedding_dimension())

    def tokenize(self, texts: Sequence[str], kind: Kind) -> list[np.ndarray]:
        prefixed = [self.model.prompts[kind] + text for text in texts]
        rows = self.model.tokenizer(prefixed, truncation=True, max_length=self.model.max_seq_length)["input_ids"]
        return [np.asarray(row, np.int32) for row in rows]

    def encode(self, texts: Sequence[str], kind: Kind, *, progress: bool = False) -> np.ndarray:
        return self.model.encode(list(texts), prompt_name=kind, show_progress_bar=progress, convert_to_numpy=True)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, without truncation or padding."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _open_onnx(file: Path, threads: int | None) -> Forward:
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeError("ONNX files need onnxruntime: pip install 'koret[export]'") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda tokens, mask: session.run(None, {"input_ids": tokens, "attention_mask": mask})[0]


def _open_openvino(file: Path, threads: int | None) -> Forward:
    try:
        import openvino
    except ImportError as error:
        raise RuntimeError("OpenVINO files need openvino: pip install 'koret[export]'") from error
    settings = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
    model = openvino.Core().compile_model(str(file), "CPU", settings)
    return lambda tokens, mask: model({"input_ids": tokens, "attention_mask": mask})["last_hidden_state"]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes())
