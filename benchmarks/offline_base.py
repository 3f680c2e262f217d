"""What reading Hangul does for the offline base: words lost, length in tokens, retrieval before and after training.

Three readings of the same published weights, same data, same steps:
  published   the tokenizer as it comes: a missing jamo turns its word into [UNK]
  spelled     missing jamo written with those the vocabulary has
  syllables   one token per syllable, its row the mean of its letters' rows (what koret does)

    python benchmarks/offline_base.py DATA.json [--steps 60] [--seeds 0 1 2]

DATA is a SQuAD-style file (KorQuAD 1.0 dev for the figures in docs/RESULTS.md), split by article.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer

from koret.evaluation.metrics import average, compute_metrics
from koret.retrieval import offline
from koret.retrieval.bundle import open_bundle
from koret.retrieval.encoder import TextEncoder
from koret.retrieval.exact import find_top_k
from koret.training.lora import setup_lora_model

RESULTS = Path(__file__).parent / "results"


def build_encoder(reading: str, max_seq_length: int) -> TextEncoder:
    model = SentenceTransformer(str(offline.find_offline_base()), device="cpu")
    if reading == "spelled":
        from tokenizers import normalizers

        backend = model.tokenizer.backend_tokenizer
        steps = [normalizers.Replace(jamo, spelled) for jamo, spelled in offline.SPELLINGS.items()]
        backend.normalizer = normalizers.Sequence([backend.normalizer, *steps])
    if reading == "syllables":
        offline.add_syllables(open_bundle(model))
    model.max_seq_length = max_seq_length
    return TextEncoder(model, name=reading)


def read_split(path: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[str]]:
    """(question, paragraph) pairs of 100 of 140 articles, those of the others, and every distinct paragraph."""
    articles = sorted(json.loads(path.read_text(encoding="utf-8"))["data"], key=lambda a: a["title"])
    random.Random(0).shuffle(articles)
    cut = round(len(articles) * 100 / 140)
    pairs = [
        [(q["question"], p["context"]) for a in part for p in a["paragraphs"] for q in p["qas"]]
        for part in (articles[:cut], articles[cut:])
    ]
    corpus = list(dict.fromkeys(p["context"] for a in articles for p in a["paragraphs"]))
    return pairs[0], pairs[1], corpus


def measure_reading(encoder: TextEncoder, texts: list[str]) -> dict[str, float]:
    unknown = encoder.tokenizer.unk_token
    words = [word for text in texts for word in text.split()]
    lost = sum(unknown in encoder.tokenizer.tokenize(word) for word in words)
    pieces = sum(len(encoder.tokenizer.tokenize(text)) for text in texts)
    return {"words_lost": lost / len(words), "tokens_per_character": pieces / sum(map(len, texts))}


def score(encoder: TextEncoder, pairs: list[tuple[str, str]], corpus: list[str]) -> dict[str, float]:
    row_of = {text: row for row, text in enumerate(corpus)}
    vectors = encoder.encode(corpus, "passage")
    rows, _ = find_top_k(encoder.encode([question for question, _ in pairs], "query"), vectors, 100)
    return average(compute_metrics(rows, [[row_of[context]] for _, context in pairs]))


def train(encoder: TextEncoder, pairs: list[tuple[str, str]], steps: int, batch: int, seed: int) -> float:
    """Plain in-batch InfoNCE, LoRA r=8, 1e-3 with warm-up and decay; returns CPU seconds."""
    torch.manual_seed(seed)
    setup_lora_model(encoder)
    parameters = [p for p in encoder.backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    order = random.Random(seed).sample(range(len(pairs)), len(pairs))
    encoder.model.train()
    began = time.process_time()
    for step in range(steps):
        chosen = [pairs[order[(step * batch + i) % len(order)]] for i in range(batch)]
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min((step + 1) / 10, 1) * (1 - step / steps)
        texts = encoder.tokenize([q for q, _ in chosen], "query") + encoder.tokenize([p for _, p in chosen], "passage")
        vectors = encoder.embed(texts)
        loss = F.cross_entropy(20 * vectors[:batch] @ vectors[batch:].T, torch.arange(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-seq-length", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=500, help="held-out questions asked")
    options = parser.parse_args()
    training, held_out, corpus = read_split(options.data)
    held_out = random.Random(0).sample(held_out, min(options.questions, len(held_out)))
    rows = []
    for reading in ("published", "spelled", "syllables"):
        row = {"reading": reading, **measure_reading(build_encoder(reading, 256), corpus[:200])}
        row["zero_shot"] = score(build_encoder(reading, options.max_seq_length), held_out, corpus)["ndcg@10"]
        row["trained"], row["cpu_seconds"] = [], []
        for seed in options.seeds:
            encoder = build_encoder(reading, options.max_seq_length)
            row["cpu_seconds"].append(train(encoder, training, options.steps, options.batch, seed))
            row["trained"].append(score(encoder, held_out, corpus)["ndcg@10"])
            print(row, flush=True)
        rows.append(row)
    settings = {k: v if k != "data" else v.name for k, v in vars(options).items()}
    RESULTS.mkdir(exist_ok=True)
    result = {"settings": settings, "threads": torch.get_num_threads(), "corpus": len(corpus), "rows": rows}
    (RESULTS / "offline_base.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(
            f"{row['reading']:<10} words lost {row['words_lost']:6.1%}  tokens/character "
            f"{row['tokens_per_character']:.2f}  nDCG@10 zero-shot {row['zero_shot']:.4f}  "
            f"trained {np.mean(row['trained']):.4f} {[round(v, 4) for v in row['trained']]}  "
            f"CPU {np.mean(row['cpu_seconds']):.0f} s"
        )


if __name__ == "__main__":
    main()
