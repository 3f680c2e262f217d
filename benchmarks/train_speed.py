"""Training beside its peers: seconds a step, tokens a second, peak memory, share of the machine's arithmetic.

    python benchmarks/train_speed.py KorQuAD_v1.0_dev.json [--cases answer:64 passage:64 ...] [--threads 1]
                                     [--steps 2] [--rounds 2] [--arms koret naive ...] [--device cpu] [--limit-gb 10]
                                     [--beside 0] [--name MACHINE] [--lean-gb 1.55]
    python benchmarks/train_speed.py KorQuAD_v1.0_dev.json --curves

Everyone trains LoRA r=8 on query, key and value of the same model (multilingual-e5-small's layers, 12 of width 384,
with random weights and the offline base's tokenizer) on the same pairs, with dropout 0.1 on the adapters, AdamW and
clipping. Each arm is a process of its own in every round, the order turning; its first step is not counted, and no step
writes a log. Arms:

  koret         koret train, everything at its defaults, waiting threads as the command sets them (koret.cli)
  koret-lean    the same with --max-memory-gb at --lean-gb
  koret-small   the same with 2,048 tokens encoded at a time (GradCache)
  koret-compiled  the same as koret with --torch-compile true
  koret-fp32    the same as koret with --precision fp32
  koret-spin    the same as koret with threads that wait as OpenMP has them wait
  naive         the loop many people have: transformers, PEFT, padded batches tokenised as they come
  st            SentenceTransformerTrainer at its defaults, MultipleNegativesRankingLoss, float32
  st-bf16       the same with bf16=True
  st-sdpa       bf16 without the base's dropout
  st-eager      the same with attn_implementation="eager"
  st-sdpa-fp32, st-eager-fp32   these two in float32; the fastest of the four is the peer's best
  st-cached     st-sdpa with CachedMultipleNegativesRankingLoss, 32 texts at a time; st-cached-fp32 in float32

Seconds are CPU seconds of all threads (of the clock on CUDA), for others may use the machine; those of the clock are
kept beside them. --beside N keeps N other processes busy. A process may take --limit-gb of memory for data; an arm that
does not fit is reported as such. A run replaces the cases it measured in the results and keeps the others, so it can be
done in pieces.

Operations a token of n, with a frozen base of layers of P weights in products: 2 P forward and 2 P backward (no
weight needs a gradient but the adapters, left out as under 1 %), and 12 C n for attention forward and backward. The
limits are the fastest 2048 x 2048 products measured here, in float32 and bfloat16; an arm is held against its own
type's. Tokens are real ones, distinct texts of a step once. Writes results/train_speed.json (train_speed_cuda.json,
train_speed_NAME.json).

--curves trains koret and the peer on the same batches from the same adapters, no dropout, float32, and writes both
losses to results/train_curves.json. Table and pictures are in docs/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encode_speed import measure_products
from koret.cli import SPINS
from koret.retrieval.encoder import DTYPES, choose_precision

RESULTS = Path(__file__).parent / "results"
LENGTHS = {"answer": 64, "passage": 256}  # tokens a text is cut to
LAYERS, WIDTH, INNER = 12, 384, 1536
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["query", "key", "value"]}
Seconds = list[list[float]]  # of every step: by the clock, and of the CPU


def build_model(folder: Path) -> None:
    """The offline base's files with multilingual-e5-small's twelve layers of random weights."""
    from transformers import BertConfig, BertModel

    from koret.retrieval.encoder import load_encoder

    load_encoder("offline", device="cpu").save(folder)
    config = BertConfig.from_pretrained(folder)
    config.num_hidden_layers = LAYERS
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)


def make_config(data: str, model: Path, task: str, batch: int, steps: int, folder: Path) -> Any:
    from koret.config import TrainingConfig

    return TrainingConfig(
        model_name=str(model), dataset_root=data, max_seq_length=LENGTHS[task], positives=task, batch_size=batch,
        num_epochs=1, max_steps=steps, train_split=0.99, eval_samples=1, eval_corpus_size=1,
        log_gradients=False, save_steps=10**6, log_dir=str(folder), seed=1,
    )  # fmt: skip


def list_pairs(config: Any) -> tuple[list[list[tuple[str, str]]], list[int]]:
    """The pairs of every step as koret will take them, and the length in tokens of every distinct text of a step."""
    from koret.training.trainer import EmbeddingTrainer

    trainer = EmbeddingTrainer(config, progress=False)
    trainer._prepare()
    pairs, lengths = [], []
    for step in trainer.job.schedule.steps_after(0):
        (rows,) = step.batches
        table = trainer.job.pairs
        pairs.append([(table.queries[row], table.texts[table.targets[row]]) for row in rows.tolist()])
        lengths.append([len(text) for text in trainer.job.maker.make(rows).texts])
    return pairs, lengths


# ---------------------------------------------------------------- arms: seconds of every step


def read_clocks() -> list[float]:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return [time.perf_counter(), time.process_time()]


def train_koret(work: dict[str, Any], folder: Path, **settings: Any) -> Seconds:
    """The trainer's own loop; a step lasts from its first gradient to the first of the next, logging included."""
    from koret.training.batch_gradients import BatchGradients
    from koret.training.trainer import EmbeddingTrainer

    config = make_config(work["data"], work["model"], work["task"], work["batch"], work["steps"] + 1, folder)
    for setting, value in settings.items():
        setattr(config, setting, value)
    starts, add = [], BatchGradients.add

    def timed(self: BatchGradients, batches: Any) -> torch.Tensor:
        starts.append(read_clocks())
        return add(self, batches)

    BatchGradients.add = timed  # type: ignore[method-assign]
    EmbeddingTrainer(config, progress=False).train()
    return np.diff(starts[-work["steps"] - 1 :], axis=0).tolist()


def train_naive(work: dict[str, Any], folder: Path) -> Seconds:
    import torch.nn.functional as F
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, AutoTokenizer

    tokenizer, base = AutoTokenizer.from_pretrained(work["model"]), AutoModel.from_pretrained(work["model"])
    model = get_peft_model(base, LoraConfig(**LORA)).to(work["device"]).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def embed(texts: list[str]) -> torch.Tensor:
        inputs = tokenizer(
            texts, padding=True, truncation=True, max_length=LENGTHS[work["task"]], return_tensors="pt"
        ).to(work["device"])
        hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    seconds = []
    for pairs in work["pairs"]:
        began = read_clocks()
        asked = embed([f"query: {question}" for question, _ in pairs])
        found = embed([f"passage: {text}" for _, text in pairs])
        loss = F.cross_entropy(20 * asked @ found.T, torch.arange(len(pairs), device=asked.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append((np.array(read_clocks()) - began).tolist())
    return seconds


def train_peer(
    work: dict[str, Any], folder: Path, *, attention: str = "sdpa", lean: bool = False, bf16: bool = False,
    cached: bool = False,
) -> Seconds:  # fmt: skip
    """SentenceTransformerTrainer; a step lasts from the end of the one before to its own."""
    from datasets import Dataset
    from peft import LoraConfig
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    model = SentenceTransformer(
        str(work["model"]), device=work["device"], model_kwargs={"attn_implementation": attention}
    )
    model.max_seq_length = LENGTHS[work["task"]]
    model.add_adapter(LoraConfig(**LORA, task_type="FEATURE_EXTRACTION"))
    if lean:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Dropout) and "lora" not in name:
                module.p = 0.0
    loss = (
        CachedMultipleNegativesRankingLoss(model, mini_batch_size=32) if cached else MultipleNegativesRankingLoss(model)
    )
    rows = [pair for pairs in work["pairs"] for pair in pairs]
    columns = {"anchor": [f"query: {q}" for q, _ in rows], "positive": [f"passage: {text}" for _, text in rows]}
    ends: Seconds = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(read_clocks())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(read_clocks())

    settings = SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=work["steps"], per_device_train_batch_size=work["batch"], learning_rate=1e-3,
        bf16=bf16, use_cpu=work["device"] == "cpu", save_strategy="no", logging_strategy="no", report_to=[],
        disable_tqdm=True, seed=1,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model, args=settings, train_dataset=Dataset.from_dict(columns), loss=loss, callbacks=[Clock()]
    )
    trainer.train()
    return np.diff(ends, axis=0).tolist()


ARMS: dict[str, Callable[[dict[str, Any], Path], Seconds]] = {
    "koret": train_koret,
    "koret-lean": lambda work, folder: train_koret(work, folder, max_memory_gb=work["lean_gb"]),
    "koret-small": lambda work, folder: train_koret(work, folder, micro_batch_tokens=2048),
    "koret-compiled": lambda work, folder: train_koret(work, folder, torch_compile=True),
    "koret-fp32": lambda work, folder: train_koret(work, folder, precision="fp32"),
    "koret-spin": train_koret,
    "naive": train_naive,
    "st": train_peer,
    "st-bf16": lambda work, folder: train_peer(work, folder, bf16=True),
    "st-sdpa": lambda work, folder: train_peer(work, folder, lean=True, bf16=True),
    "st-eager": lambda work, folder: train_peer(work, folder, lean=True, bf16=True, attention="eager"),
    "st-sdpa-fp32": lambda work, folder: train_peer(work, folder, lean=True),
    "st-eager-fp32": lambda work, folder: train_peer(work, folder, lean=True, attention="eager"),
    "st-cached": lambda work, folder: train_peer(work, folder, lean=True, bf16=True, cached=True),
    "st-cached-fp32": lambda work, folder: train_peer(work, folder, lean=True, cached=True),
}
FLOAT32 = ("koret-fp32", "naive", "st", "st-sdpa-fp32", "st-eager-fp32", "st-cached-fp32")


def work(name: str, task: Path) -> None:
    """In a process of its own: train as arm ``name`` and print seconds of the steps and the peak of memory."""
    given = json.loads(task.read_text(encoding="utf-8"))
    torch.set_num_threads(given["threads"])
    if given["device"] == "cpu" and sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (int(given["limit_gb"] * 2**30),) * 2)
    with tempfile.TemporaryDirectory() as folder:
        seconds = ARMS[name](given, Path(folder))
    if given["device"] == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print("\n" + json.dumps({"seconds": seconds, "peak_bytes": peak}))


# ---------------------------------------------------------------- side by side


def count_operations(lengths: Sequence[int]) -> float:
    """Forward and backward of a step over texts of these lengths, as the module says."""
    n = np.array(lengths, dtype=np.float64)
    weights = 4 * WIDTH**2 + 2 * WIDTH * INNER
    return float(LAYERS * (4 * weights * n.sum() + 12 * WIDTH * (n**2).sum()))


def call(name: str, task: Path, threads: int, beside: int) -> dict[str, Any]:
    """One arm, once, beside so many busy processes; ``error`` with its last words where it did not come through."""
    given = json.loads(task.read_text(encoding="utf-8"))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)}
    if name.startswith("koret") and name != "koret-spin":
        environment.setdefault("GOMP_SPINCOUNT", SPINS)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--worker", name, str(task)], capture_output=True, text=True, env=environment
        )
    finally:
        for process in busy:
            process.kill()
            process.wait()
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        words = said[-1] if said else f"exit {done.returncode}"
        return {"error": f"does not fit into {given['limit_gb']} GB" if "allocate memory" in words else words}
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(options: argparse.Namespace, model: Path, task: str, batch: int, folder: Path, limits: dict) -> dict:
    config = make_config(str(options.data), model, task, batch, options.steps + 1, folder)
    pairs, lengths = list_pairs(config)
    given = {
        "data": str(options.data), "model": str(model), "task": task, "batch": batch, "steps": options.steps + 1,
        "pairs": pairs, "threads": options.threads, "device": options.device, "limit_gb": options.limit_gb,
        "lean_gb": options.lean_gb,
    }  # fmt: skip
    file = folder / f"{task}-{batch}.json"
    file.write_text(json.dumps(given), encoding="utf-8")
    tokens = float(np.mean([sum(step) for step in lengths[1:]]))
    operations = float(np.mean([count_operations(step) for step in lengths[1:]]))
    calls: dict[str, list[dict]] = {name: [] for name in options.arms}
    for turn in range(options.rounds):
        at = turn % len(options.arms)
        for name in options.arms[at:] + options.arms[:at]:
            if not any("error" in one for one in calls[name]):
                calls[name].append(call(name, file, options.threads, options.beside))
    rows, chosen = {}, choose_precision(options.device)
    for name, found in calls.items():
        if errors := [one["error"] for one in found if "error" in one]:
            rows[name] = {"error": errors[0]}
            print(f"  {name:14} {errors[0]}", flush=True)
            continue
        clock, cpu = np.array([s for one in found for s in one["seconds"][1:]]).T.tolist()
        seconds = clock if options.device == "cuda" else cpu
        took, peak = float(np.median(seconds)), max(one["peak_bytes"] for one in found)
        precision = "fp32" if name in FLOAT32 else chosen if name.startswith("koret") else "bf16"
        limit = limits[precision]
        rows[name] = {
            "seconds": seconds, "clock_seconds": clock, "median": took,
            "pairs_per_second": batch / took, "tokens_per_second": tokens / took,
            "peak_bytes": peak, "precision": precision, "share_of_limit": operations / took / limit,
        }  # fmt: skip
        print(f"  {name:14} {took:7.2f} s  {batch / took:7.1f} pairs/s  {peak / 2**20:7,.0f} MB", flush=True)
    return {
        "task": task, "batch": batch, "tokens": tokens, "operations": operations, "threads": options.threads,
        "beside": options.beside, "limits": limits, "rows": rows,
    }  # fmt: skip


def write_curves(data: Path, folder: Path, steps: int = 25, batch: int = 16) -> None:
    """Losses of koret and of the peer's model and loss, same batches and adapters: results/train_curves.json."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from koret.retrieval.encoder import load_encoder
    from koret.training.gradcache import embed_and_backward
    from koret.training.lora import setup_lora_model
    from koret.training.loss import info_nce

    build_model(folder / "model")
    pairs, _ = list_pairs(make_config(str(data), folder / "model", "answer", batch, steps, folder))
    encoders, none = [], torch.zeros(batch, batch, dtype=torch.bool)
    for _ in range(2):
        encoders.append(load_encoder(str(folder / "model"), device="cpu", max_seq_length=LENGTHS["answer"]))
        setup_lora_model(encoders[-1], r=LORA["r"], alpha=LORA["lora_alpha"], dropout=0.0)
        for module in encoders[-1].model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        encoders[-1].model.train()
    ours, twin = encoders
    set_peft_model_state_dict(twin.backbone, get_peft_model_state_dict(ours.backbone))
    theirs = SentenceTransformer(str(folder / "model"), device="cpu").train()
    theirs[0].model, theirs.max_seq_length = twin.backbone, twin.max_seq_length
    judge, losses = MultipleNegativesRankingLoss(theirs), {"koret": [], "sentence-transformers": []}
    optimizers = [
        torch.optim.AdamW([p for p in encoder.backbone.parameters() if p.requires_grad], lr=1e-3)
        for encoder in encoders
    ]
    used = 0
    for step in pairs:
        if len({text for _, text in step}) < batch:
            continue  # the peer would take a question's own answer for a negative
        used += 1
        texts = [*ours.tokenize([q for q, _ in step], "query"), *ours.tokenize([text for _, text in step], "passage")]
        chunks = np.array_split(np.arange(2 * batch), 3)
        loss = embed_and_backward(
            ours.embed, texts, chunks,
            lambda found: info_nce(found[:batch], found[batch:], torch.arange(batch), none, scale=20.0).value,
        )  # fmt: skip
        losses["koret"].append(loss.item())
        columns = [[f"query: {q}" for q, _ in step], [f"passage: {text}" for _, text in step]]
        loss = judge([theirs.preprocess(column) for column in columns], None)
        loss.backward()
        losses["sentence-transformers"].append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    gap = float(np.abs(np.subtract(*losses.values())).max())
    print(f"{used} steps, largest difference {gap:.2e}")
    found = {"batch": batch, "largest_difference": gap, "losses": losses}
    (RESULTS / "train_curves.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--cases", nargs="+", metavar="TASK:BATCH", default=["answer:64", "passage:64"])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--beside", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--limit-gb", type=float, default=10.0)
    parser.add_argument("--lean-gb", type=float, default=1.55)
    parser.add_argument("--name", help="of the machine, where its results are kept beside another one's")
    parser.add_argument("--curves", action="store_true")
    options = parser.parse_args()
    options.data = options.data.resolve()
    torch.set_num_threads(options.threads)
    if options.curves:
        with tempfile.TemporaryDirectory() as place:
            write_curves(options.data, Path(place))
        return
    limits = {name: measure_products(DTYPES[name], options.device) for name in ("fp32", "bf16")}
    device = None if options.device == "cpu" else options.device
    file = RESULTS / f"{'_'.join(filter(None, ('train_speed', device, options.name)))}.json"
    known = json.loads(file.read_text(encoding="utf-8"))["cases"] if file.is_file() else []
    result = {"device": options.device, "shape": [LAYERS, WIDTH, INNER]}
    with tempfile.TemporaryDirectory() as place:
        folder, cases = Path(place), []
        build_model(folder / "model")
        for task, batch in (case.split(":") for case in options.cases):
            print(f"question -> {task}, batch {batch}", flush=True)
            cases.append(measure(options, folder / "model", task, int(batch), folder, limits))
    for case in cases:
        known = [old for old in known if (old["task"], old["batch"]) != (case["task"], case["batch"])] + [case]
    known.sort(key=lambda case: (case["task"], case["batch"]))
    file.write_text(json.dumps({**result, "cases": known}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
