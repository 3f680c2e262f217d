"""How long people wait for `koret web`: concurrent users asking all columns, over 10,000 passages, by real HTTP.

    python benchmarks/web_load.py [--passages 10000] [--users 16] [--seconds 30]

Two models (the offline base twice, once with its prefixes exchanged, so that every query is encoded twice), BM25 and
hybrid; passages and questions drawn from the words of the embedded sample, every question different. The passages'
vectors are drawn at random (how long a search takes does not depend on them), the questions are really encoded. Users
are a process of their own. ``back to back`` users ask the next question as soon as one is answered, the hardest case;
``reading`` users look at an answer for a second. The page is started twice: with questions encoded in float32, its
default, and with ``--precision auto``. ``start`` is `koret web` from the command to its first answer, with its vectors
kept.
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
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

RESULTS = Path(__file__).parent / "results"
SAMPLE = Path(__file__).resolve().parents[1] / "src/koret/data/sample/korquad2.1_sample.json"
BOTH = ("fp32", "auto")
CASES = (  # name, columns asked for, precisions of the server
    ("all four columns, {}", ["m0", "m1", "bm25", "hybrid"], BOTH),
    ("one model, {}", ["m1"], BOTH),
    ("BM25", ["bm25"], ("fp32",)),
)


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


def start_server(folder: Path, data: Path, precision: str = "fp32") -> tuple[subprocess.Popen, str, float]:
    """`koret web` as a user starts it; its address, and the seconds until it answers."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "koret.cli", "web", "offline", str(folder / "other"), "--dataset-root", str(data)]
    command += ["--precision", precision]
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


class User:
    """A browser's open connection: it has the page and asks it one question after another.

    Bare streams, for the users share the server's two cores and a whole HTTP client would take a fifth of them.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> None:
        self._reader, self._writer, self._host = reader, writer, host

    @classmethod
    async def open(cls, address: str) -> User:
        host = urlsplit(address)
        user = cls(*await asyncio.open_connection(host.hostname, host.port), host.netloc)
        await user._send("GET / HTTP/1.1")
        return user

    async def ask(self, query: str, columns: list[str]) -> dict:
        body = json.dumps({"query": query, "columns": columns, "k": 10}).encode()
        head = f"POST /api/search HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        return json.loads(await self._send(head, body))

    def close(self) -> None:
        self._writer.close()

    async def _send(self, head: str, body: bytes = b"") -> bytes:
        """The body of the answer. Raises RuntimeError where it is not a good one."""
        self._writer.write(f"{head}\r\nHost: {self._host}\r\n\r\n".encode() + body)
        header = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        content = await self._reader.readexactly(int(re.search(r"(?i)content-length: (\d+)", header)[1]))
        if not header.startswith("HTTP/1.1 200 "):
            raise RuntimeError(f"{header.splitlines()[0]}: {content[:200]!r}")
        return content


async def ask_for(address: str, users: int, seconds: float, columns: list[str], pause: float) -> list[float]:
    """Milliseconds of every answer to ``users`` that ask for ``seconds``."""
    rng, words = draw_words(os.getpid())
    taken: list[float] = []
    opened = [await User.open(address) for _ in range(users)]
    until = time.perf_counter() + seconds

    async def use(user: User) -> None:
        await asyncio.sleep(rng.random() * max(pause, 0.1))
        while time.perf_counter() < until:
            query = " ".join(rng.sample(words, rng.randint(4, 9))) + "?"
            began = time.perf_counter()
            answer = await user.ask(query, columns)
            taken.append(1000 * (time.perf_counter() - began))
            assert answer["query"] == query, answer["query"]
            await asyncio.sleep(pause * rng.uniform(0.5, 1.5))
        user.close()

    await asyncio.gather(*map(use, opened))
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


def measure_kinds(address: str, name: str, columns: list[str], options: argparse.Namespace) -> Iterator[dict]:
    """One user, many back to back, and many who read."""
    for users, pause in ((1, 0.0), (options.users, 0.0), (options.users, 1.0)):
        found = measure(address, users, options.seconds, columns, pause)
        kind = "reading" if pause else "back to back"
        row = {"columns": name, "users": users, "kind": kind, **found}
        print(row, flush=True)
        yield row


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
        rows, starts = [], {}
        for precision in BOTH:
            process, address, starts[precision] = start_server(folder, data, precision)
            try:
                for name, columns, precisions in CASES:
                    if precision in precisions:
                        rows += measure_kinds(address, name.format(precision), columns, options)
            finally:
                process.terminate()
                process.wait()
    record = {
        "passages": options.passages,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_average_at_end": round(os.getloadavg()[0], 2),
        "start_s": round(starts["fp32"], 1),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "web_load.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
