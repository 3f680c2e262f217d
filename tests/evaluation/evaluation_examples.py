"""Examples for the evaluation tests: a data set made by hand, an encoder without a network."""

import zlib

import numpy as np
import pyarrow as pa

from koret.data.keys import normalize_answer, text_key
from koret.data.loader import ARTICLES, PASSAGES, QUESTIONS, Dataset


class HashEncoder:
    """Character bigrams hashed into a vector: related texts are near, nothing is trained."""

    def __init__(self, name="hash", dimensions=256, noise=0.0):
        self.name, self.dimensions, self.max_seq_length, self.noise = name, dimensions, 256, noise
        self.encoded = []

    def encode(self, texts, kind, *, progress=False):
        self.encoded.append((kind, len(texts)))
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        for row, text in enumerate(texts):
            letters = "".join(text.split())
            for a, b in zip(letters, letters[1:] + " ", strict=True):
                vectors[row, zlib.crc32(f"{a}{b}".encode()) % self.dimensions] += 1
            if self.noise:
                vectors[row] += self.noise * np.random.default_rng(zlib.crc32(text.encode())).random(self.dimensions)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def make_dataset(articles):
    """[(title, [paragraph, ...], [(question, answer, index of its paragraph, or None), ...]), ...] -> Dataset."""
    tables = {"articles": [], "passages": [], "questions": []}
    for number, (title, paragraphs, questions) in enumerate(articles):
        first = len(tables["passages"])
        tables["articles"].append(
            {
                "title": title,
                "url": "",
                "source": "by hand",
                "first_passage": first,
                "passage_count": len(paragraphs),
                "characters": sum(map(len, paragraphs)),
                "html": False,
            }
        )
        for text in paragraphs:
            tables["passages"].append(
                {
                    "article": number,
                    "heading": "",
                    "text": text,
                    "start": 0,
                    "end": len(text),
                    "tokens": -1,
                    "text_key": text_key(text),
                }
            )
        for i, (question, answer, place) in enumerate(questions):
            gold = [] if place is None else [first + place]
            start = -1 if place is None else paragraphs[place].find(answer)
            tables["questions"].append(
                {
                    "id": f"{title}-{i}",
                    "text": question,
                    "article": number,
                    "answers": [answer] if answer else [],
                    "answer_kind": "short",
                    "gold": gold,
                    "best": gold[0] if gold else -1,
                    "known": gold,
                    "negatives": [],
                    "question_key": text_key(question),
                    "answer_key": text_key(normalize_answer(answer)),
                    "answer_start": start,
                    "answer_end": start + len(answer) if start >= 0 else -1,
                }
            )
    schemas = {"articles": ARTICLES, "passages": PASSAGES, "questions": QUESTIONS}
    built = {name: pa.Table.from_pylist(rows, schemas[name]) for name, rows in tables.items()}
    return Dataset(**built, fingerprint="f" * 64, report={})


def build_tiny_encoder(folder, seed=1):
    """A TextEncoder over a 2-layer BERT of width 32 with random weights that reads Korean syllable by syllable."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from koret.retrieval.encoder import load_encoder

    syllables = [chr(code) for code in range(0xAC00, 0xD7A4)]
    pieces = [*"0123456789?.", *"query:passage", *syllables]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(pieces)]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=128, **special).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(names), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return load_encoder(folder, device="cpu")
