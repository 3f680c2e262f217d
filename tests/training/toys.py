"""A tiny BERT with random weights, data whose questions share words with their passage, and a stop on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from koret.data.keys import normalize_answer, text_key
from koret.data.loader import ARTICLES, PASSAGES, QUESTIONS, Dataset

SYLLABLES = [chr(code) for code in range(ord("가"), ord("가") + 28 * 40, 28)]  # 가 개 갸 ... 40 of them
WORDS = [a + b for a in SYLLABLES[:20] for b in SYLLABLES[20:]]


def make_dataset(articles: int = 12, paragraphs: int = 3, questions: int = 4, seed: int = 0) -> Dataset:
    """Paragraphs of random words; a question is some words of its paragraph, its answer one of them."""
    rng = np.random.default_rng(seed)
    tables = {"articles": [], "passages": [], "questions": []}
    for article in range(articles):
        first = len(tables["passages"])
        for _ in range(paragraphs):
            words = [str(w) for w in rng.choice(WORDS, 18, replace=False)]
            row, text = len(tables["passages"]), " ".join(words)
            tables["passages"].append([article, "", text, 0, len(text), -1, text_key(text)])
            for _ in range(questions):
                chosen = [str(w) for w in rng.choice(words, 5, replace=False)]
                asked, answer = " ".join(chosen[1:]), chosen[0]
                name = f"q{len(tables['questions'])}"
                tables["questions"].append(
                    [name, asked, article, [answer], "short", [row], row, [row], [], text_key(asked),
                     text_key(normalize_answer(answer)), text.index(answer), text.index(answer) + len(answer)]
                )  # fmt: skip
        tables["articles"].append([f"문서 {article}", "", "toy.json", first, paragraphs, 1000, False])
    schemas = {"articles": ARTICLES, "passages": PASSAGES, "questions": QUESTIONS}
    built = {}
    for name, rows in tables.items():
        columns = zip(zip(*rows, strict=True), schemas[name], strict=True)
        built[name] = pa.table([pa.array(column, field.type) for column, field in columns], schema=schemas[name])
    return Dataset(**built, fingerprint=f"toy-{articles}-{paragraphs}-{questions}-{seed}")


def build_tiny_model(folder: Path, vocabulary: list[str]) -> None:
    """Write a 2-layer BERT of width 32 with a word tokenizer; its weights are random, by a fixed seed."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {word: i for i, word in enumerate([*special, *vocabulary])}
    backend = Tokenizer(models.WordPiece(words, unk_token="[UNK]", max_input_chars_per_word=50))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names).save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)


def train_until(trainer, number: int, error: type[BaseException] = KeyboardInterrupt) -> Path:
    """Train, and raise ``error`` before step ``number``; the directory of the run."""
    take_step = trainer._take_step

    def take(step):
        if step.number == number:
            raise error
        take_step(step)

    trainer._take_step = take
    with pytest.raises(error):
        trainer.train()
    return trainer.run_dir
