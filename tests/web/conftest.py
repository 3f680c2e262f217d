"""A real run of a tiny model over a small data set with hostile texts in it, and the page over that run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from koret.config import TrainingConfig

SYLLABLES = [chr(code) for code in range(ord("가"), ord("가") + 28 * 40, 28)]
WORDS = [a + b for a in SYLLABLES[:20] for b in SYLLABLES[20:]]
HOSTILE = [
    "<script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    '"><svg onload=window.hacked=1>',
    "</textarea><iframe srcdoc='<script>parent.hacked=1</script>'></iframe>",
    '<a href="javascript:window.hacked=1">눌러</a>',
    "<style>body{display:none}</style>",
    "{{constructor.constructor('window.hacked=1')()}}",
    "<math><mi xlink:href='javascript:window.hacked=1'>",
    "&lt;script&gt;window.hacked=1&lt;/script&gt;",
    "<body onload=window.hacked=1>",
    "${window.hacked=1}",
    "' onmouseover='window.hacked=1",
]
HOSTILE_TITLE = "<img src=x onerror=window.hacked=1>"
HOSTILE_QUESTION = "어느 <b onclick=window.hacked=1>글</b>이 위험한가?"


def write_data(path: Path, articles: int = 24) -> None:
    """SQuAD JSON: paragraphs of made-up words, asked about by some of them; the first article is hostile."""
    data = []
    for a in range(articles):
        paragraphs = []
        for p in range(2):
            words = [WORDS[(a * 37 + p * 17 + i * 11) % len(WORDS)] for i in range(16)]
            text = " ".join(words)
            asked = f"{words[2]} {words[5]} {words[9]} {words[12]}?"
            if a % 6 == 0:
                text += " " + " ".join(HOSTILE)
                asked += f" {HOSTILE_QUESTION}"
            answer = {"text": words[0], "answer_start": 0}
            paragraphs.append({"context": text, "qas": [{"id": f"q{a}-{p}", "question": asked, "answers": [answer]}]})
        data.append({"title": HOSTILE_TITLE if a % 6 == 0 else f"문서 {a}", "paragraphs": paragraphs})
    path.write_text(json.dumps({"version": "1.0", "data": data}, ensure_ascii=False), encoding="utf-8")


def build_tiny_model(folder: Path) -> None:
    """A 2-layer BERT of width 32 with random weights, by a fixed seed."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "query", "passage", ":", *SYLLABLES, *(f"##{s}" for s in SYLLABLES)]
    words = {word: i for i, word in enumerate(names)}
    backend = Tokenizer(models.WordPiece(words, unk_token="[UNK]", max_input_chars_per_word=50))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **special).save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def log_dir(tmp_path_factory) -> Path:
    """A log directory with one finished run."""
    from koret.training.trainer import EmbeddingTrainer

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("web")
    build_tiny_model(folder / "tiny")
    write_data(folder / "data.json")
    config = TrainingConfig(
        model_name=str(folder / "tiny"), dataset_root=str(folder / "data.json"), max_seq_length=48, batch_size=8,
        num_epochs=4, learning_rate=5e-3, warmup_steps=0, precision="fp32", log_dir=str(folder / "runs"),
        log_every_n_steps=1, save_steps=100, num_workers=0, train_split=0.5, lora_r=4,
    )  # fmt: skip
    EmbeddingTrainer(config, console=Console(file=io.StringIO(), width=200), progress=False).train()
    return folder / "runs"


@pytest.fixture(scope="session")
def opened(log_dir):
    from koret.web.opening import open_page

    found = open_page(log_dir=log_dir)
    torch.set_num_threads(1)
    yield found
    found.close()


@pytest.fixture(scope="session")
def app(opened):
    from koret.web.app import make_app

    return make_app(opened, top_k=5)


@pytest.fixture(scope="session")
def address(app):
    """The page on a real socket: http://127.0.0.1:port."""
    from koret.web.server import Server, bind

    with bind("127.0.0.1", 0) as own, Server(app).serve_in_background(own) as where:
        yield where
