"""koret's encoder beside sentence-transformers' encode and exported engines: tokens a second, share of the machine.

    python benchmarks/encode_speed.py [--threads 2] [--rounds 3] [--short 192] [--long 32] [--device cpu]

The same texts of the embedded sample for everyone: questions (short) and passages joined until they fill 256 tokens
(long). Every variant encodes them in each round, the order turning, so that a busy machine hits all alike; ratios are
medians over rounds of (sentence-transformers float32 in the same round / variant). Tokens are real ones, prefix and
special tokens included, padding not.

Operations per token: 2 per weight of a layer's products, 2 * (4 C^2 + 2 C F) a layer, and 4 C L for attention over a
text of L tokens (Kaplan et al. 2020, arXiv 2001.08361, table 1, both halves of attention counted over the whole text,
as an encoder attends). The limit is the fastest square matrix product (torch, 2048 x 2048) measured here in the same
type and number of threads; int8 has no such row. Writes results/encode_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from koret.data.loader import load_dataset
from koret.retrieval.encoder import TextEncoder, load_encoder
from koret.retrieval.products import can_order, multiply_ordered, order_weight

RESULTS = Path(__file__).parent / "results"
BASELINE = "sentence-transformers float32"
LENGTH = 256
Encode = Callable[[list[str]], np.ndarray]


def measure_products(dtype: torch.dtype, device: str, size: int = 2048) -> float:
    """Floating-point operations a second of the fastest of ten square products x W^T, fewer where one takes seconds.

    On CPU ten of every library at hand: torch's own choice, and oneDNN with W in its own order.
    """
    a = torch.randn(size, size).to(device, dtype)
    multiply = [lambda: torch.nn.functional.linear(a, a)]
    if can_order(dtype, [a]):
        ordered = order_weight(a)
        multiply.append(lambda: multiply_ordered(a, ordered))
    best, started = float("inf"), time.perf_counter()
    for _ in range(10):
        for way in multiply:
            began = time.perf_counter()
            way()[0, 0].item()  # waits for an accelerator
            best = min(best, time.perf_counter() - began)
        if time.perf_counter() - started > 10:
            break
    return 2 * size**3 / best


def count_operations(encoder: TextEncoder, lengths: np.ndarray) -> float:
    """Operations to encode texts of these lengths in tokens."""
    config = encoder.backbone.config
    width, inner = config.hidden_size, config.intermediate_size
    products = 2 * (4 * width**2 + 2 * width * inner) * lengths.sum()
    attention = 4 * width * (lengths.astype(np.float64) ** 2).sum()
    return float(config.num_hidden_layers * (products + attention))


def read_texts(encoder: TextEncoder, short: int, long: int) -> dict[str, list[str]]:
    data = load_dataset("sample")
    passages = data.passages.column("text").to_pylist()
    joined, at = [], 0
    while len(joined) < long:
        text = ""
        while len(encoder.tokenize([text], "passage")[0]) < LENGTH:
            text = f"{text} {passages[at % len(passages)]}".strip()
            at += 1
        joined.append(text)
    return {"short": data.questions.column("text").to_pylist()[:short], "long": joined}


def make_variants(encoder: TextEncoder, folder: Path, threads: int) -> dict[str, tuple[Encode, str]]:
    """Name -> (what encodes prefixed-alike texts, the type its limit is measured in or '')."""
    device = str(encoder.device)
    packed16 = load_encoder("offline", device=device, precision="bf16", max_seq_length=LENGTH)
    encoder.save(folder / "plain")
    from sentence_transformers import SentenceTransformer  # here: benchmarks that import this module do without it

    plain, half = (SentenceTransformer(str(folder / "plain"), device=device) for _ in range(2))
    half.bfloat16()

    def plainly(model) -> Encode:
        return lambda texts: model.encode([f"passage: {text}" for text in texts], show_progress_bar=False)

    variants: dict[str, tuple[Encode, str]] = {
        BASELINE: (plainly(plain), "fp32"),
        "sentence-transformers bfloat16": (plainly(half), "bf16"),
        "koret float32": (lambda texts: encoder.encode(texts, "passage"), "fp32"),
        "koret bfloat16": (lambda texts: packed16.encode(texts, "passage"), "bf16"),
    }
    if device == "cpu":
        for name, encode in make_engines(encoder, folder, threads).items():
            variants[name] = encode, {"float32": "fp32", "bfloat16": "bf16"}.get(name.split()[-1], "")
    return variants


def make_engines(encoder: TextEncoder, folder: Path, threads: int) -> dict[str, Encode]:
    """ONNX Runtime and OpenVINO, files by koret's own export, in sentence-transformers' batches of like lengths."""
    import onnxruntime
    import openvino

    from koret.export import conversion

    files = {"float32": folder / "model.onnx", "int8": folder / "model_int8.onnx"}
    conversion.write_onnx(encoder, files["float32"])
    conversion.quantize_onnx(files["float32"], files["int8"])
    engines: dict[str, Encode] = {}
    for kind, file in files.items():
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
        engines[f"ONNX Runtime {kind}"] = _batch(
            encoder, lambda ids, mask, s=session: s.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        )
    core = openvino.Core()
    for kind, hint in (("float32", "f32"), ("bfloat16", "bf16"), ("int8", "f32")):
        file = folder / f"openvino_{kind}.xml"
        conversion.write_openvino(files["float32"], file, int8=kind == "int8")
        own = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint}
        model = core.compile_model(str(file), "CPU", own)
        engines[f"OpenVINO {kind}"] = _batch(
            encoder, lambda ids, mask, m=model: m({"input_ids": ids, "attention_mask": mask})[0]
        )
    return engines


def _batch(encoder: TextEncoder, forward: Callable[[np.ndarray, np.ndarray], np.ndarray], size: int = 32) -> Encode:
    """Longest first, 32 at a time, mean pooling, unit length: what sentence-transformers does around its engines."""

    def encode(texts: list[str]) -> np.ndarray:
        rows = encoder.tokenize(texts, "passage")
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        vectors = np.empty((len(rows), encoder.dimensions), np.float32)
        for start in range(0, len(order), size):
            part = order[start : start + size]
            ids = np.zeros((len(part), len(rows[part[0]])), np.int64)
            mask = np.zeros_like(ids)
            for row, i in enumerate(part):
                ids[row, : len(rows[i])], mask[row, : len(rows[i])] = rows[i], 1
            pooled = (forward(ids, mask) * mask[..., None]).sum(1)
            vectors[part] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return vectors

    return encode


def measure(encoder: TextEncoder, variants: dict, texts: list[str], rounds: int, limits: dict[str, float]) -> dict:
    lengths = np.array([len(x) for x in encoder.tokenize(texts, "passage")])
    operations, names = count_operations(encoder, lengths), list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    vectors = {name: np.asarray(variants[name][0](texts), np.float32) for name in names}  # warms up as well
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter()
            variants[name][0](texts)
            seconds[name].append(time.perf_counter() - began)
    rows = {}
    for name, (_, kind) in variants.items():
        took = float(np.median(seconds[name]))
        ratios = np.array(seconds[BASELINE]) / seconds[name]
        cosines = (vectors[name] * vectors[BASELINE]).sum(1)
        rows[name] = {
            "seconds": seconds[name], "tokens_per_second": float(lengths.sum() / took),
            "ratio": float(np.median(ratios)), "ratios": ratios.tolist(),
            "share_of_limit": operations / took / limits[kind] if kind else None,
            "mean_cosine": float(cosines.mean()), "worst_cosine": float(cosines.min()),
        }  # fmt: skip
        share = f"{rows[name]['share_of_limit']:.0%} of the limit" if kind else ""
        print(f"  {name:32} {lengths.sum() / took:8.0f} tokens/s  {rows[name]['ratio']:.2f}x  {share}", flush=True)
    return {"texts": len(texts), "tokens": int(lengths.sum()), "operations": operations, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", type=int, default=192)
    parser.add_argument("--long", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder = load_encoder("offline", device=options.device, max_seq_length=LENGTH)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    limits = {kind: measure_products(dtype, options.device) for kind, dtype in kinds.items()}
    print({kind: f"{limit / 1e9:.0f} GFLOP/s" for kind, limit in limits.items()})
    result = {"device": options.device, "threads": options.threads, "load": os.getloadavg()[0], "limits": limits}
    with tempfile.TemporaryDirectory() as folder:
        variants = make_variants(encoder, Path(folder), options.threads)
        for name, texts in read_texts(encoder, options.short, options.long).items():
            print(name)
            result[name] = measure(encoder, variants, texts, options.rounds, limits)
    RESULTS.mkdir(exist_ok=True)
    name = "encode_speed" if options.device == "cpu" else f"encode_speed_{options.device}"
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
