"""Tiny models with random weights, and a few questions to prove their exports on."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from koret.retrieval.encoder import TextEncoder

MOUNTAINS = ["한라산", "백두산", "지리산", "설악산", "북한산", "금강산", "태백산", "소백산"]
PLACES = ["제주도", "함경도", "경상도", "강원도", "서울", "회양군", "태백시", "영주시"]


def write_questions(file: Path) -> Path:
    """Eight articles of two paragraphs and two questions, in SQuAD's format."""
    articles = []
    for i, (mountain, place) in enumerate(zip(MOUNTAINS, PLACES, strict=True)):
        height, month = f"{1500 + 37 * i}미터", f"{i + 1}월"
        paragraphs = [
            (f"{mountain}은 {place}에 있는 산이다. 높이는 {height}이다.", f"{mountain}의 높이는 얼마인가?", height),
            (f"{place} 사람들은 {month}에 축제를 연다.", f"{place}의 축제는 언제 열리는가?", month),
        ]
        articles.append({"title": mountain, "paragraphs": [
            {"context": text, "qas": [
                {"id": f"{i}-{n}", "question": asked, "answers": [{"text": answer, "answer_start": text.index(answer)}]}
            ]} for n, (text, asked, answer) in enumerate(paragraphs)
        ]})  # fmt: skip
    file.write_text(json.dumps({"version": "toy", "data": articles}, ensure_ascii=False), encoding="utf-8")
    return file


def build_wordpiece_model(seed: int = 0) -> TextEncoder:
    """A BERT of 2 layers and width 32 with a token per syllable and some words."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    characters = [chr(code) for code in (*range(0x21, 0x7F), *range(0xAC00, 0xD7A4))]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *characters, *("##" + c for c in characters), *MOUNTAINS, "apple"]
    backend = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    config = BertConfig(
        vocab_size=len(tokens), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return _assemble(
        BertModel(config, add_pooling_layer=False), PreTrainedTokenizerFast(tokenizer_object=backend, **special),
        SentenceTransformer, Transformer, Pooling, Normalize,
    )  # fmt: skip


def build_unigram_model(texts: list[str], size: int = 400, width: int = 32) -> TextEncoder:
    """An XLM-RoBERTa of 2 layers whose Unigram tokenizer is trained on ``texts``; laid out as multilingual-e5's is."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

    torch.manual_seed(0)
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(["<mask>"])  # the last id, as in XLM-R
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    special = {
        "bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>",
        "unk_token": "<unk>", "mask_token": "<mask>",
    }  # fmt: skip
    config = XLMRobertaConfig(
        vocab_size=backend.get_vocab_size() + 7, hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=66, type_vocab_size=1, initializer_range=0.3,
    )  # fmt: skip
    return _assemble(
        XLMRobertaModel(config, add_pooling_layer=False), PreTrainedTokenizerFast(tokenizer_object=backend, **special),
        SentenceTransformer, Transformer, Pooling, Normalize,
    )  # fmt: skip


def _assemble(backbone, tokenizer, sentence_transformer, transformer, pooling, normalize) -> TextEncoder:
    with tempfile.TemporaryDirectory() as folder:
        backbone.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        first = transformer(folder, max_seq_length=48)
    model = sentence_transformer(
        modules=[first, pooling(backbone.config.hidden_size, "mean"), normalize()], device="cpu"
    )
    return TextEncoder(model, name="tiny")
