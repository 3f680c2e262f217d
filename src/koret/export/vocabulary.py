"""Fewer tokens, the same vectors: cut from the embedding table what a corpus never uses.

Kept are the tokens the corpus and the model's prefixes use, all special tokens, every token of one character (Hangul
syllables, jamo, digits, punctuation, letters of any script; with and without the mark of a word's start), byte tokens,
and every token with a character that no kept token writes alone. So

- a corpus text is cut into the same tokens. Unigram (Kudo 2018, arXiv 1804.10959) takes the best-scoring path: removing
  tokens that are on no such path removes only paths that lost. The lowest-scoring token stays too, for the cost of an
  unknown character is reckoned from it. WordPiece takes the longest token that fits: those it took are all there.
- any other text may be cut finer, but nothing becomes unknown that was known.

Letters: V tokens before, K kept.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from koret.retrieval.encoder import Kind, TextEncoder

LEAST_TOKENS = 10_000  # below this the estimate of what is unseen says little itself
MOST_UNSEEN = 0.01
AT_ONCE = 1024  # texts tokenised together
MARKS = {"Unigram": "▁", "WordPiece": "##"}
Text = tuple[Kind, str]


@dataclass(frozen=True)
class Trim:
    """What a trim keeps and what is known about it. ``unseen``: see ``estimate_unseen``."""

    kept: np.ndarray  # (K,) the old ids, ascending; the new id is the position
    tokenizer: str  # the new tokenizer.json
    tokens_before: int
    corpus_tokens: int
    used: int  # tokens the corpus uses
    unseen: float

    def map_ids(self, ids: np.ndarray) -> np.ndarray:
        """Old ids -> new ones; -1 for tokens that are gone."""
        table = np.full(self.tokens_before, -1, np.int64)
        table[self.kept] = np.arange(len(self.kept))
        return table[ids]


@dataclass(frozen=True)
class Proof:
    """What was checked on the corpus after a trim."""

    texts: int
    texts_tokenised_alike: int
    vectors_compared: int
    largest_difference: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_trim(encoder: TextEncoder, texts: Sequence[Text], *, anyway: bool = False) -> Trim:
    """Which tokens to keep for ``texts``, (kind, text) each; they are read whole, whatever the model's length.

    Raises ValueError for a tokenizer that is neither Unigram nor WordPiece, and for a corpus too small for a safe trim
    unless ``anyway``: fewer than LEAST_TOKENS tokens, or more than MOST_UNSEEN of a new text's tokens to be expected
    among those removed.
    """
    description = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    kind = description["model"]["type"]
    if kind not in MARKS:
        raise ValueError(
            f"the tokenizer of {encoder.name} is of type {kind}; only Unigram and WordPiece can be trimmed"
        )
    tokens = list_tokens(description)
    rows = encoder.backbone.get_input_embeddings().num_embeddings
    counts = np.zeros(rows, np.int64)
    for ids in tokenize_whole(encoder.tokenizer.backend_tokenizer.to_str(), encoder, texts):
        counts += np.bincount(np.concatenate(ids), minlength=rows)
    safe = mark_safe(description, tokens, rows, int(encoder.backbone.config.pad_token_id or 0))
    unseen = estimate_unseen(counts, safe)
    total = int(counts.sum())
    if not anyway and (total < LEAST_TOKENS or unseen > MOST_UNSEEN):
        why = f"{total:,} tokens, at least {LEAST_TOKENS:,} are needed" if total < LEAST_TOKENS else (
            f"{unseen:.1%} of the tokens of a new text would be among those removed (Good-Turing estimate), "
            f"at most {MOST_UNSEEN:.0%} may"
        )  # fmt: skip
        raise ValueError(f"the corpus is too small for a safe trim: {why}; give more text, or add --trim-anyway")
    prefixes = np.zeros(rows, bool)  # what stands before every text is no word of the corpus, and in use all the same
    for ids in tokenize_whole(encoder.tokenizer.backend_tokenizer.to_str(), encoder, [(k, "") for k in get_args(Kind)]):
        prefixes[np.concatenate(ids)] = True
    kept = np.flatnonzero(safe | (counts > 0) | prefixes)
    return Trim(
        kept, json.dumps(rewrite_tokenizer(description, kept), ensure_ascii=False), rows, total,
        int((counts > 0).sum()), unseen,
    )  # fmt: skip


def apply_trim(encoder: TextEncoder, trim: Trim) -> None:
    """Give the encoder the kept rows of its embedding table and the new tokenizer, of the generic class."""
    from transformers import PreTrainedTokenizerFast

    published, backbone = encoder.tokenizer, encoder.backbone
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    special = {name: getattr(published, name) for name in names if getattr(published, name, None) is not None}
    encoder.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trim.tokenizer), model_max_length=published.model_max_length, **special
    )
    old = backbone.get_input_embeddings()
    rows = old.weight.detach()[torch.from_numpy(trim.kept).to(old.weight.device)].clone()
    table = nn.Embedding(*rows.shape, padding_idx=old.padding_idx, device=rows.device, dtype=rows.dtype)
    with torch.no_grad():
        table.weight.copy_(rows)
    table.weight.requires_grad_(old.weight.requires_grad)
    backbone.set_input_embeddings(table)
    config = backbone.config
    config.vocab_size = len(rows)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "mask_token_id"):
        value = getattr(config, name, None)
        if isinstance(value, int) and 0 <= value < trim.tokens_before:
            new = int(trim.map_ids(np.array([value]))[0])
            setattr(config, name, new if new >= 0 else None)


def trim_encoder(encoder: TextEncoder, trim: Trim, texts: Sequence[Text], most_vectors: int = 2000) -> Proof:
    """Apply a trim and prove it: the same tokens for every text, the same vectors for up to ``most_vectors`` of them.

    Vectors are a function of tokens and rows, which are copied bit by bit; they are compared all the same. Raises
    RuntimeError naming the first text that is cut differently or whose vector differs by more than 1e-6.
    """
    chosen = np.unique(np.linspace(0, len(texts) - 1, min(most_vectors, len(texts))).astype(int))
    groups = {kind: [texts[i][1] for i in chosen if texts[i][0] == kind] for kind in ("query", "passage")}
    before = {kind: encoder.encode(group, kind) for kind, group in groups.items() if group}
    old = tokenize_whole(encoder.tokenizer.backend_tokenizer.to_str(), encoder, texts)
    apply_trim(encoder, trim)
    new = tokenize_whole(trim.tokenizer, encoder, texts)
    alike = 0
    for first, second in zip(old, new, strict=True):
        for a, b in zip(first, second, strict=True):
            if not np.array_equal(trim.map_ids(a), b):
                raise RuntimeError(f"after the trim this text is cut into other tokens: {texts[alike][1][:80]!r}")
            alike += 1
    largest = 0.0
    for kind, vectors in before.items():
        gaps = np.abs(vectors - encoder.encode(groups[kind], kind)).max(axis=1)
        if gaps.max() > 1e-6:
            text = groups[kind][int(gaps.argmax())]
            raise RuntimeError(f"after the trim the vector of this text differs by {gaps.max():.1e}: {text[:80]!r}")
        largest = max(largest, float(gaps.max()))
    return Proof(len(texts), alike, len(chosen), largest)


def tokenize_whole(description: str, encoder: TextEncoder, texts: Sequence[Text]) -> Iterator[list[np.ndarray]]:
    """Token ids of the prefixed texts, not truncated, AT_ONCE texts at a time."""
    tokenizer = Tokenizer.from_str(description)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for start in range(0, len(texts), AT_ONCE):
        prefixed = [encoder.prefixes[kind] + text for kind, text in texts[start : start + AT_ONCE]]
        yield [np.asarray(row.ids, np.int64) for row in tokenizer.encode_batch(prefixed)]


def list_tokens(description: dict[str, Any]) -> dict[int, str]:
    """id -> token of a tokenizer.json, the added ones included."""
    vocabulary = description["model"]["vocab"]
    if isinstance(vocabulary, dict):
        tokens = {number: token for token, number in vocabulary.items()}
    else:
        tokens = {number: token for number, (token, _) in enumerate(vocabulary)}
    return tokens | {added["id"]: added["content"] for added in description.get("added_tokens", [])}


def mark_safe(description: dict[str, Any], tokens: dict[int, str], rows: int, pad: int) -> np.ndarray:
    """(V,) bool: the tokens kept whether the corpus uses them or not; see the module's description."""
    kind = description["model"]["type"]
    mark = MARKS[kind]
    safe = np.zeros(rows, bool)
    safe[: pad + 1] = True  # RoBERTa counts positions from the padding's id, so it must not move
    special = {added["id"] for added in description.get("added_tokens", [])}
    present = set(tokens.values())
    for number, token in tokens.items():
        bare = token.removeprefix(mark)
        # a character stands alone in Unigram as itself, in WordPiece at a word's start or, marked, within it
        pieces = list(token) if kind == "Unigram" else [
            (mark if token.startswith(mark) or i else "") + character for i, character in enumerate(bare)
        ]  # fmt: skip
        safe[number] |= (
            number in special
            or len(bare) <= 1
            or (token.startswith("<0x") and token.endswith(">"))
            or (unicodedata.normalize("NFC", bare) != bare and len(unicodedata.normalize("NFC", bare)) == 1)
            or any(piece not in present for piece in pieces)
        )
    if kind == "Unigram":
        scores = [score for _, score in description["model"]["vocab"]]
        safe[int(np.argmin(scores))] = True
    return safe


def estimate_unseen(counts: np.ndarray, safe: np.ndarray) -> float:
    """The share of a new text's tokens to be expected among those removed.

    Good 1953 (The population frequencies of species): what was seen once, over all that was seen; tokens that stay
    anyway are no risk.
    """
    return float(((counts == 1) & ~safe).sum() / max(1, counts.sum()))


def rewrite_tokenizer(description: dict[str, Any], kept: np.ndarray) -> dict[str, Any]:
    """A tokenizer.json with the tokens ``kept`` under their new ids; everything else stays as it is."""
    new = {int(old): number for number, old in enumerate(kept)}
    model = dict(description["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: new[number] for token, number in model["vocab"].items() if number in new}
    else:
        model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    return {
        **description,
        "truncation": None,
        "padding": None,
        "model": model,
        "added_tokens": [{**added, "id": new[added["id"]]} for added in description.get("added_tokens", [])],
        "post_processor": _rewrite_processor(description.get("post_processor"), new),
    }


def _rewrite_processor(part: dict[str, Any] | None, new: dict[int, int]) -> dict[str, Any] | None:
    if part is None:
        return None
    part = dict(part)
    if part["type"] == "Sequence":
        part["processors"] = [_rewrite_processor(inner, new) for inner in part["processors"]]
    elif part["type"] == "TemplateProcessing":
        part["special_tokens"] = {
            name: {**token, "ids": [new[number] for number in token["ids"]]}
            for name, token in part["special_tokens"].items()
        }
    elif part["type"] in ("BertProcessing", "RobertaProcessing"):
        for name in ("sep", "cls"):
            token, number = part[name]
            part[name] = [token, new[number]]
    return part
