"""How long people wait for `koret web`: concurrent users asking all columns, over 10,000 passages, by real HTTP.

    python benchmarks/web_load.py [--passages 10000] [--users 16] [--seconds 30]

Two models (the offline base twice, once with its prefixes exchanged, so that every query is encoded twice), BM25 and
hybrid; passages and questions drawn from the words of the embedded sample, every question different. The passages'
vectors are drawn at random (how long a search takes does not depend on them), the questions are really encoded. Users
are a process of their own. ``back to back`` users ask the next question as soon as one is answered, the hardest case;
``reading`` users look at an answer for a second. ``start`` is `koret web` from the
command to its first answer, with its vectors kept.
Writes results/web_load.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
SAMPLE = Path(__file__).resolve().parents[1] / "src/koret/data/sample/korquad2.1_sample.json"
COLUMNS = {"all four columns": ["m0", "m1", "bm25", "hybrid"], "one model": ["m1"], "BM25": ["bm25"]}


def draw_words(seed: int) -> tuple[random.Random, list[str]]:
    texts = re.findall(r"[가-힣]{2,}", SAMPLE.read_text(encoding="utf-8"))
    return random.Random(seed), texts


def write_corpus(folder: Path, passages: int) -> Path:
    """JSONL pairs: a passage of 40 to 70 words and a question of 6 of them."""
    rng, words = draw_words(0)
    path = folder / "corpus.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(passages):
            text = " ".join(rng.choices(words, k=rng.randint(40, 70)))
            question = " ".join(rng.sample(text.split(), 6)) + "?"
            file.write(json.dumps({"query": question, "positive": text}, ensure_ascii=False) + "\n")
    return path


def start_server(folder: Path, data: Path) -> tuple[subprocess.Popen, str, float]:
    """`koret web` as a user starts it; its address, and the seconds until it answers."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "koret.cli", "web", "offline", str(folder / "other"), "--dataset-root", str(data)]
    environment = {**os.environ, "KORET_CACHE": str(folder / "cache")}
    process = subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
    )
    for line in process.stdout:
        print("   ", line.rstrip(), flush=True)
        if found := re.search(r"http://localhost:\d+", line):
            address = found[0]
        if line.startswith("Stop"):
            return process, address, time.perf_counter() - began
    raise RuntimeError("koret web did not start")


async def ask_for(address: str, users: int, seconds: float, columns: list[str], pause: float) -> list[float]:
    """Milliseconds of every answer to ``users`` that ask for ``seconds``."""
    import httpx

    rng, words = draw_words(os.getpid())
    taken: list[float] = []
    until = time.perf_counter() + seconds

    async def use(client: httpx.AsyncClient) -> None:
        await asyncio.sleep(rng.random() * max(pause, 0.1))
        while time.perf_counter() < until:
            query = " ".join(rng.sample(words, rng.randint(4, 9))) + "?"
            began = time.perf_counter()
            answer = await client.post("/api/search", json={"query": query, "columns": columns, "k": 10})
            taken.append(1000 * (time.perf_counter() - began))
            assert answer.status_code == 200 and answer.json()["query"] == query, answer.text[:200]
            await asyncio.sleep(pause * rng.uniform(0.5, 1.5))

    limits = httpx.Limits(max_connections=users, max_keepalive_connections=users)
    async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:
        await asyncio.gather(*(use(client) for _ in range(users)))
    return taken


def measure(address: str, users: int, seconds: float, columns: list[str], pause: float) -> dict:
    asyncio.run(ask_for(address, users, 3, columns, pause))  # warm
    taken = np.array(asyncio.run(ask_for(address, users, seconds, columns, pause)))
    p50, p95, p99 = np.percentile(taken, [50, 95, 99])
    return {
        "answers": len(taken),
        "per_second": round(len(taken) / seconds, 1),
        "p50_ms": round(float(p50), 1),
        "p95_ms": round(float(p95), 1),
        "p99_ms": round(float(p99), 1),
        "max_ms": round(float(taken.max()), 1),
    }


def save_other_model(folder: Path) -> None:
    """A second encoder of the same size: the offline base under exchanged prefixes."""
    from koret.retrieval.encoder import load_encoder

    load_encoder("offline", query_prefix="passage: ", passage_prefix="query: ").save(folder)


def fill_indexes(folder: Path, data: Path) -> None:
    """Keep what a first start would encode, with random unit vectors in its place."""
    from koret.web import opening

    rng = np.random.default_rng(0)

    def draw(encoder, entries) -> np.ndarray:
        vectors = rng.standard_normal((len(entries), encoder.dimensions)).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    opening.encode_entries = draw
    opened = opening.open_page(["offline", str(folder / "other")], dataset_root=str(data), cache_dir=folder / "cache")
    opened.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=10_000)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--work", type=Path, help="keep data and vectors here for the next time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.work or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        data = write_corpus(folder, options.passages)
        if not (folder / "other").exists():
            save_other_model(folder / "other")
        fill_indexes(folder, data)
        process, address, start = start_server(folder, data)
        rows = []
        try:
            for name, columns in COLUMNS.items():
                for users, pause in ((1, 0.0), (options.users, 0.0), (options.users, 1.0)):
                    found = measure(address, users, options.seconds, columns, pause)
                    kind = "reading" if pause else "back to back"
                    rows.append({"columns": name, "users": users, "kind": kind, **found})
                    print(rows[-1], flush=True)
        finally:
            process.terminate()
            process.wait()
    record = {
        "passages": options.passages,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_average_at_end": round(os.getloadavg()[0], 2),
        "start_s": round(start, 1),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "web_load.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
