"""Whole trainings on a device that is strict about itself (accelerator.py), each beside the same one on the CPU.

A program of its own, for the device stays in the process: ``accelerator_stories.py FOLDER`` prints one JSON object,
what came of every story by its name. ``FOLDER`` is where the toy model lies in ``model`` and runs may be written.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import accelerator  # first: it makes itself known to torch
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from toys import make_dataset

from koret.config import TrainingConfig
from koret.retrieval import packed
from koret.retrieval.attention import AttentionPath
from koret.retrieval.encoder import TextEncoder, load_encoder
from koret.retrieval.inference import E5KorQuADInference
from koret.training import trainer as trainers
from koret.training.gradcache import embed_and_backward
from koret.training.lora import setup_lora_model
from koret.training.optimization import GuardedOptimizer
from koret.training.trainer import EmbeddingTrainer

DATA = make_dataset(articles=8, paragraphs=2)
STEPS, LOGGED = 4, 2  # optimizer steps, and how many of them are between two records


def attend(query, key, value, bounds, _bounds, _longest, _also):
    """softmax(Q K^T / sqrt(D)) V within each text, from the bounds as they are on the device: (T, H, D)."""
    owner = torch.bucketize(torch.arange(len(query), device=query.device), bounds[1:], right=True)
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * query.shape[-1] ** -0.5
    apart = owner[:, None] != owner[None, :]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(apart, float("-inf")).softmax(-1), value.float()).to(
        query.dtype
    )


FLAT, PADDED = AttentionPath("flat", attend, "flat"), AttentionPath("padded", None, "padded")
# Settings of each training beside the plain ones; ``path`` is how attention goes, None: the model pads by itself.
TRAININGS: dict[str, dict[str, Any]] = {
    "padded, mined": dict(log_gradient_histograms=True, remine_every=1, num_epochs=2, max_steps=None, batch_size=16),
    "flat, in pieces, full": dict(
        path=FLAT, micro_batch_tokens=100, use_lora=False, batching="article", mask_false_negatives=False
    ),
    "bfloat16": dict(path=FLAT, precision="bf16", positives="answer"),
    "checkpointed": dict(path=FLAT, gradient_checkpointing=True, lora_variant="dora", train_embeddings=True),
    "taught": dict(
        path=FLAT,
        gradient_accumulation_steps=2,
        guide_model="",
        distillation="kl",
        matryoshka_dims=[16, 32],
        learn_scale=True,
    ),
    "another architecture": dict(path=None, micro_batch_tokens=200),
}


def main(folder: Path) -> None:
    told: dict[str, Any] = {name: train_on_both(folder, name, changes) for name, changes in TRAININGS.items()}
    told["resumed"] = resume(folder)
    told["chunks with dropout"] = embed_chunks(folder)
    told["float16"] = step_in_float16()
    told["inference"] = search(folder)
    told["mixed"] = mix()
    print(json.dumps(told))


# ------------------------------------------------------------ trainings


@contextlib.contextmanager
def placed(device: str, path: AttentionPath | None) -> Iterator[None]:
    """Trainings go to ``device``, and attention goes as ``path`` says."""
    with (
        mock.patch.object(trainers, "choose_device", lambda process: device),
        mock.patch.object(packed, "choose_path", lambda *_: path),
        mock.patch.object(TextEncoder, "_explain_slow_path", lambda self: None if path else "made to pad"),
    ):
        yield


def make_config(folder: Path, **changes: Any) -> TrainingConfig:
    values = dict(
        model_name=str(folder / "model"), max_seq_length=48, batch_size=8, num_epochs=1, max_steps=STEPS,
        learning_rate=1e-3, warmup_steps=0, precision="fp32", log_dir=str(folder / "runs"), log_every_n_steps=LOGGED,
        save_steps=100, micro_batch_tokens=4096, num_workers=0, train_split=0.7, lora_r=4, lora_dropout=0.0,
    )  # fmt: skip
    if "guide_model" in changes:
        changes["guide_model"] = str(folder / "model")
    return TrainingConfig(**{**values, **changes})


def start(config: TrainingConfig) -> EmbeddingTrainer:
    return EmbeddingTrainer(config, dataset=DATA, console=Console(file=io.StringIO()), progress=False)


def train_on_both(folder: Path, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Losses and score of either device, how far the weights are apart, and what steps waited for between records."""
    changes = dict(changes)
    path = changes.pop("path", PADDED)
    found: dict[str, Any] = {}
    weights, waited = [], Counter()
    for device in ("cpu", accelerator.NAME):
        with placed(device, path), watch_steps(waited):
            trainer = start(make_config(folder, **changes))
            run = trainer.train()
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        found[device] = {
            "losses": [line["train/loss"] for line in lines if "train/loss" in line],
            "ndcg": run.final["ndcg@10"],
            "device": {p.device.type for p in trainer.parameters.values()}.pop(),
        }
        weights.append({name: p.detach().cpu() for name, p in trainer.parameters.items()})
    apart = [(weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0]]
    return {**found, "apart": max(apart), "waited": dict(waited)}


@contextlib.contextmanager
def watch_steps(waited: Counter) -> Iterator[None]:
    """Count what optimizer steps waited for, by operator and innermost functions; those that record are let off."""
    plain = EmbeddingTrainer._take_step

    def take_step(trainer: EmbeddingTrainer, step: Any) -> None:
        before = len(accelerator.waits)
        plain(trainer, step)
        if step.number % LOGGED and not step.ends_epoch:
            waited.update(f"{wait.what} in {' > '.join(wait.within[-3:])}" for wait in accelerator.waits[before:])

    with mock.patch.object(EmbeddingTrainer, "_take_step", take_step):
        yield


def resume(folder: Path) -> dict[str, Any]:
    """A training with dropout, stopped half-way and gone on with, beside one that was not stopped."""
    weights, plain = [], EmbeddingTrainer._take_step
    config = make_config(folder, lora_dropout=0.3)

    def stop_half_way(trainer: EmbeddingTrainer, step: Any) -> None:
        plain(trainer, step)
        if step.number == STEPS // 2:
            signal.raise_signal(signal.SIGINT)

    with placed(accelerator.NAME, FLAT), mock.patch.object(torch.cuda, "is_available", lambda: True):
        whole = start(config)
        whole.train()
        stopped = start(config)
        with mock.patch.object(EmbeddingTrainer, "_take_step", stop_half_way), contextlib.suppress(KeyboardInterrupt):
            stopped.train()
        gone_on = EmbeddingTrainer.resume(
            stopped.run_dir, dataset=DATA, console=Console(file=io.StringIO()), progress=False
        )
        gone_on.train()
    for trainer in (whole, gone_on):
        weights.append({name: p.detach().cpu() for name, p in trainer.parameters.items()})
    return {
        "stopped_at": stopped.at.step,
        "steps": gone_on.at.step,
        "equal": all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]),
    }


# ------------------------------------------------------------ parts


def embed_chunks(folder: Path) -> dict[str, Any]:
    """Gradients of chunks embedded twice, with dropout, beside those of the same chunks embedded once."""
    texts = [np.array([2, *range(5, 5 + n), 3], dtype=np.int32) for n in (3, 30, 7, 12, 1, 25, 7, 18)]
    chunks = [np.array([0, 2, 4]), np.array([3, 6, 7]), np.array([1, 5])]
    with placed(accelerator.NAME, FLAT):
        encoder = load_encoder(folder / "model", max_seq_length=48, device=accelerator.NAME)
        setup_lora_model(encoder, r=4, alpha=8, dropout=0.3)
        trained = [p for p in encoder.backbone.parameters() if p.requires_grad]
        for parameter in trained:
            torch.nn.init.normal_(parameter, std=0.1)
        encoder.model.train()

        def loss_of(vectors: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(20 * vectors[:4] @ vectors[4:].T, torch.arange(4).to(vectors.device))

        def once(embed: Callable, texts: list, chunks: list, loss_of: Callable) -> torch.Tensor:
            order = torch.from_numpy(np.argsort(np.concatenate(chunks))).to(accelerator.DEVICE)
            loss = loss_of(torch.cat([embed([texts[i] for i in chunk]) for chunk in chunks])[order])
            loss.backward()
            return loss.detach()

        gradients = []
        for way in (once, embed_and_backward, embed_and_backward):
            torch.manual_seed(11 if len(gradients) < 2 else 12)
            encoder.model.zero_grad()
            way(encoder.embed, texts, chunks, loss_of)
            gradients.append([p.grad.cpu() for p in trained])
    largest = max(g.abs().max().item() for g in gradients[0])

    def compare(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
        return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True)) / largest

    return {"apart": compare(*gradients[:2]), "other_masks_apart": compare(*gradients[1:])}


def step_in_float16() -> dict[str, Any]:
    """Steps of the optimizer behind float16's scale, the second of them overflowing, on either device."""
    found: list[list[list[float]]] = []
    for device in ("cpu", accelerator.NAME):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 8).to(device))
        optimizer = GuardedOptimizer({"weight": weight}, weight_decay=0.01, max_grad_norm=1.0, scaling=True)
        values = []
        before = len(accelerator.waits)
        for factor in (1.0, float("inf"), 2.0):
            loss = optimizer.scale((weight * weight * factor).sum())
            loss.backward()
            optimizer.unscale()
            optimizer.step(0.1, finite=torch.isfinite(loss))
            values.append(weight.detach().clone())
        waited = [wait.what for wait in accelerator.waits[before:]]
        found.append([value.cpu().tolist() for value in values])
    return {"cpu": found[0], accelerator.NAME: found[1], "waited": waited}


def search(folder: Path) -> dict[str, Any]:
    """The inference class on either device: the same ranks and scores."""
    texts = DATA.passages.column("text").to_pylist()
    questions = DATA.questions.column("text").to_pylist()[:5]
    found = []
    for device in ("cpu", accelerator.NAME):
        with placed(device, PADDED):
            found.append(E5KorQuADInference(folder / "model", device).batch_search(questions, texts, top_k=3))
    scores = [[hit["score"] for hits in each for hit in hits] for each in found]
    return {
        "same": [[hit["index"] for hit in hits] for hits in found[0]]
        == [[hit["index"] for hit in hits] for hits in found[1]],
        "apart": max(abs(a - b) for a, b in zip(*scores, strict=True)),
    }


def mix() -> dict[str, str]:
    """What the device says to tensors of the CPU, and what it notes: that the other stories could have failed."""
    x, said = torch.arange(4.0, device=accelerator.DEVICE), {}
    try:
        x + torch.arange(4.0)
    except RuntimeError as error:
        said["sum"] = str(error)
    for name, ask in (
        ("item", lambda: x.sum().item()),
        ("mask", lambda: x[x > 1]),
        ("copy", lambda: x.cpu()),
        ("unpinned", lambda: torch.ones(3).to(accelerator.DEVICE, non_blocking=True)),
    ):
        before = len(accelerator.waits)
        ask()
        said[name] = "; ".join(wait.what for wait in accelerator.waits[before:])
    return said


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
