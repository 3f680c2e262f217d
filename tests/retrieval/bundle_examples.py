"""Directories of tiny models with random weights, as sentence-transformers and transformers write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LETTERS = [*"abcdefghijklmnopqrstuvwxyz:.?", *(chr(code) for code in range(ord("가"), ord("가") + 28 * 399, 28))]
FAMILIES = ("bert", "electra", "roberta", "camembert", "xlm-roberta")


def build_transformer(folder: Path, family: str, **changes: Any) -> None:
    """Write a transformer of ``family``, two layers of width 32, with the family's own tokenizer."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(3)
    tokenizer = _build_tokenizer(family)
    sizes = dict(
        vocab_size=len(tokenizer), hidden_size=32, embedding_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=66, initializer_range=0.2, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModel.from_config(AutoConfig.for_model(family, **{**sizes, **changes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_model(folder: Path, family: str = "bert", pooling: str = "mean", *, normalizes: bool = False) -> None:
    """Write a directory of sentence-transformers, with prompts and a similarity of its own."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    build_transformer(folder / "transformer", family)
    modules = [Transformer(str(folder / "transformer")), Pooling(32, pooling), *([Normalize()] if normalizes else [])]
    prompts = {"query": "질문: ", "passage": "글: "}
    SentenceTransformer(modules=modules, device="cpu", prompts=prompts, similarity_fn_name="dot").save(
        str(folder / "model"), create_model_card=False
    )


def _build_tokenizer(family: str) -> Any:
    from transformers import BertTokenizer, CamembertTokenizer, ElectraTokenizer, RobertaTokenizer, XLMRobertaTokenizer

    if family in ("bert", "electra"):
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + letter for letter in LETTERS)]
        kind = BertTokenizer if family == "bert" else ElectraTokenizer
        return kind(vocab={word: i for i, word in enumerate(words)}, do_lower_case=False, model_max_length=64)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    if family == "roberta":
        from tokenizers.pre_tokenizers import ByteLevel

        letters = [*special, *sorted(ByteLevel.alphabet()), "<mask>"]
        return RobertaTokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[], model_max_length=64)
    pieces = [(piece, 0.0) for piece in special] + [(piece, -float(i)) for i, piece in enumerate(["▁", *LETTERS], 1)]
    kind = CamembertTokenizer if family == "camembert" else XLMRobertaTokenizer
    return kind(vocab=[*pieces, ("<mask>", 0.0)], model_max_length=64)
