"""What a client may ask and how it is answered: the embeddings interface of OpenAI, every fault named in its shape.

The interface is that of https://platform.openai.com/docs/api-reference/embeddings; ``input_type``, and the endings
``-query`` and ``-passage`` of a model's name for clients that cannot send it, are those of NVIDIA NIM.
"""

from __future__ import annotations

import base64
import difflib
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import orjson

from koret.retrieval.encoder import Kind

MOST_TEXTS = 2048  # in one request, as with OpenAI
MOST_CHARACTERS = 1_000_000  # of one text; what the model cannot read of it is cut before it costs anything
FIELDS = ("input", "model", "input_type", "encoding_format", "dimensions", "user")
KINDS: dict[str, Kind] = {"query": "query", "passage": "passage", "document": "passage"}
DEFAULT_KIND: Kind = "passage"  # a corpus is what is embedded in bulk by clients that know no input_type


class ApiError(Exception):
    """A request that is refused: HTTP status, a sentence, and the fields of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.content = orjson.dumps(
            {"error": {"message": message, "type": kind, "param": param, "code": code}},
        )


@dataclass(frozen=True)
class EmbeddingRequest:
    """A request that was read and found right."""

    texts: list[str]
    kind: Kind
    as_base64: bool
    dimensions: int


def read_request(body: bytes, served: str, width: int) -> EmbeddingRequest:
    """Read the body of a request to the model called ``served``, of ``width`` dimensions. Raises ApiError."""
    try:
        asked = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {error}", code="invalid_json") from None
    if not isinstance(asked, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    for name in asked:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(FIELDS)}"
            raise ApiError(400, f"unknown field '{name[:80]}': {hint}", param=name[:80], code="unknown_parameter")
    return EmbeddingRequest(
        kind=_read_kind(asked, served),
        texts=_read_texts(asked.get("input")),
        as_base64=_read_choice(asked, "encoding_format", ("float", "base64"), "float") == "base64",
        dimensions=_read_dimensions(asked.get("dimensions"), width),
    )


def _read_kind(asked: dict[str, Any], served: str) -> Kind:
    """query or passage: by ``input_type`` or by the ending of the model's name."""
    if "model" not in asked:
        raise ApiError(400, f"'model' is missing: this server has '{served}'", param="model", code="missing_parameter")
    named: dict[Any, Kind | None] = {served: None, f"{served}-query": "query", f"{served}-passage": "passage"}
    model = asked["model"]
    if not isinstance(model, str) or model not in named:
        shown = f"'{model[:80]}'" if isinstance(model, str) else "that is no text"
        raise ApiError(404, f"no model {shown} here: this server has '{served}'", param="model", code="model_not_found")
    wanted = _read_choice(asked, "input_type", tuple(KINDS), None)
    kind = named[model]
    if wanted and kind and KINDS[wanted] != kind:
        raise ApiError(
            400,
            f"input_type is '{wanted}', but the model's name ends in '-{kind}'",
            param="input_type",
        )
    return kind or (KINDS[wanted] if wanted else DEFAULT_KIND)


def _read_choice(asked: dict[str, Any], name: str, choices: tuple[str, ...], default: str | None) -> str | None:
    value = asked.get(name)
    if value is None:
        return default
    if value not in choices:
        listed = ", ".join(f"'{choice}'" for choice in choices)
        raise ApiError(400, f"'{name}' must be one of {listed}", param=name, code="invalid_value")
    return value


def _read_dimensions(value: Any, width: int) -> int:
    if value is None:
        return width
    if type(value) is not int or not 1 <= value <= width:
        raise ApiError(
            400, f"'dimensions' must be a whole number from 1 to {width}, what this model gives", param="dimensions",
            code="invalid_value",
        )  # fmt: skip
    return value


def _read_texts(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise ApiError(400, "'input' must be a text or a list of texts, not empty", param="input", code="invalid_value")
    if len(texts) > MOST_TEXTS:
        raise ApiError(
            400, f"'input' holds {len(texts)} texts, at most {MOST_TEXTS} are taken at a time", param="input",
            code="too_many_inputs",
        )  # fmt: skip
    if all(type(x) is int or isinstance(x, list) for x in texts):
        raise ApiError(
            400,
            "'input' holds token ids: they belong to another model's tokenizer and would mean other words here; "
            "send the text itself (LangChain: check_embedding_ctx_length=False)",
            param="input", code="token_ids",
        )  # fmt: skip
    for number, text in enumerate(texts):
        where = "'input'" if isinstance(value, str) else f"'input[{number}]'"
        if not isinstance(text, str):
            raise ApiError(400, f"{where} is no text", param="input", code="invalid_value")
        if not text.strip():
            raise ApiError(400, f"{where} is empty: it has no meaning to embed", param="input", code="empty_input")
        if len(text) > MOST_CHARACTERS:
            raise ApiError(
                400, f"{where} has {len(text):,} characters, at most {MOST_CHARACTERS:,} are taken", param="input",
                code="text_too_long",
            )  # fmt: skip
    return texts


def shorten(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """The first ``dimensions`` of unit vectors (N, D), of unit length again (Kusupati et al. 2022, arXiv 2205.13147).

    Raises FloatingPointError where nothing of a vector is left.
    """
    if dimensions == vectors.shape[1]:
        return vectors
    kept = vectors[:, :dimensions]
    lengths = np.linalg.norm(kept.astype(np.float64), axis=1, keepdims=True)
    if not lengths.all():
        raise FloatingPointError(f"the first {dimensions} dimensions of a vector are all zero")
    return (kept / lengths).astype(np.float32)


def format_answer(vectors: np.ndarray, tokens: int, model: str, as_base64: bool) -> bytes:
    """The JSON answer: float32 as the shortest decimals that read back the same, or as base64, little-endian."""
    if as_base64:
        rows: Any = [base64.b64encode(row.tobytes()).decode() for row in vectors.astype("<f4")]
    else:
        rows = list(np.ascontiguousarray(vectors, np.float32))
    answer = {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
