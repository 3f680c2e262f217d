"""koret serve under load: speed beside plain sentence-transformers behind FastAPI, and no swapped answer.

    python benchmarks/serve_load.py speed [--model offline] [--seconds 8] [--rounds 3]
    python benchmarks/serve_load.py answers [--requests 100000] [--model offline]

``speed``: both servers run in processes of their own and are asked in turn, in interleaved rounds, by real clients: the
openai Python client in threads, and httpx over asyncio. The plain server is what one writes in ten lines: FastAPI, one
``SentenceTransformer.encode`` a request, in FastAPI's thread pool; it is defined below. Texts are questions and
passages of the embedded sample, three questions to a passage.
``answers``: 100,000 requests, each with a text of its own, from 32 connections; every vector is compared with the one
``E5KorQuADInference`` gave beforehand. Writes results/serve_load_*.json.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np

RESULTS = Path(__file__).parent / "results"
CLIENTS = (1, 4, 16, 64)


def run_plain_server(model: str, port: int) -> None:
    """The same model behind FastAPI the plain way."""
    import uvicorn
    from fastapi import FastAPI
    from sentence_transformers import SentenceTransformer

    from koret.retrieval.encoder import load_encoder

    with tempfile.TemporaryDirectory() as folder:
        load_encoder(model).save(folder)
        loaded = SentenceTransformer(folder)

    app = FastAPI()

    @app.post("/v1/embeddings")
    def embed(asked: dict) -> dict:
        texts = [asked["input"]] if isinstance(asked["input"], str) else asked["input"]
        vectors = loaded.encode([f"passage: {text}" for text in texts], show_progress_bar=False)
        if asked.get("encoding_format") == "base64":
            rows = [base64.b64encode(row.tobytes()).decode() for row in vectors]
        else:
            rows = vectors.tolist()
        data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
        usage = {"prompt_tokens": 0, "total_tokens": 0}
        return {"object": "list", "data": data, "model": asked["model"], "usage": usage}

    @app.get("/health")
    def show_health() -> dict:
        return {"status": "ready"}

    uvicorn.run(app, port=port, log_level="error")


@contextlib.contextmanager
def start_server(kind: str, model: str):
    """A server process that answers; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = [sys.executable, __file__, "plain", "--model", model, "--port", str(port)]
    koret = [sys.executable, "-m", "koret.cli", "serve", model, "--port", str(port), "--served-name", "model"]
    process = subprocess.Popen(koret if kind == "koret" else own, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            if process.poll() is not None:
                raise RuntimeError(f"the {kind} server ended with code {process.returncode}")
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def read_texts() -> list[str]:
    """Three questions of the embedded sample, then a passage, and so on."""
    from koret.data.loader import load_dataset

    data = load_dataset("sample")
    questions = itertools.cycle(data.questions.column("text").to_pylist())
    passages = data.passages.column("text").to_pylist()
    return [text for passage in passages for text in (next(questions), next(questions), next(questions), passage)]


def ask_with_openai(address: str, texts: list[str], clients: int, seconds: float) -> list[float]:
    """Seconds of every answer; ``clients`` threads, an openai client each."""
    import openai

    took, ends = [], time.perf_counter() + seconds

    def ask(number: int) -> None:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
            for i in itertools.count(number * 37):
                began = time.perf_counter()
                if began > ends:
                    return
                client.embeddings.create(model="model", input=texts[i % len(texts)])
                took.append(time.perf_counter() - began)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took


def ask_with_httpx(address: str, texts: list[str], clients: int, seconds: float) -> list[float]:
    """Seconds of every answer; ``clients`` tasks of one asyncio loop."""
    took: list[float] = []

    async def ask(client: httpx.AsyncClient, number: int, ends: float) -> None:
        for i in itertools.count(number * 37):
            began = time.perf_counter()
            if began > ends:
                return
            content = {"model": "model", "input": texts[i % len(texts)], "encoding_format": "base64"}
            (await client.post(f"{address}/v1/embeddings", json=content)).raise_for_status()
            took.append(time.perf_counter() - began)

    async def ask_all() -> None:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=clients)) as client:
            ends = time.perf_counter() + seconds
            await asyncio.gather(*(ask(client, number, ends) for number in range(clients)))

    asyncio.run(ask_all())
    return took


def measure_speed(model: str, seconds: float, rounds: int) -> dict:
    texts, rows = read_texts(), []
    asking = {"openai": ask_with_openai, "httpx": ask_with_httpx}
    with start_server("koret", model) as koret, start_server("plain", model) as plain:
        servers = {"koret": koret, "plain": plain}
        for address in servers.values():
            ask_with_httpx(address, texts, 4, 1.0)
        for (client, ask), clients in itertools.product(asking.items(), CLIENTS):
            took: dict[str, list[list[float]]] = {name: [] for name in servers}
            for turn in range(rounds):
                for name in sorted(servers, reverse=turn % 2 == 1):
                    began = time.perf_counter()
                    answers = ask(servers[name], texts, clients, seconds)
                    took[name].append([time.perf_counter() - began, *answers])
            row = {"client": client, "clients": clients}
            for name, turns in took.items():
                rates = [(len(turn) - 1) / turn[0] for turn in turns]
                answers = np.concatenate([turn[1:] for turn in turns])
                row[name] = {
                    "requests_per_second": float(np.median(rates)),
                    "rates": rates,
                    "p50_ms": float(np.percentile(answers, 50)) * 1000,
                    "p99_ms": float(np.percentile(answers, 99)) * 1000,
                    "answers": len(answers),
                }
            row["ratio"] = row["koret"]["requests_per_second"] / row["plain"]["requests_per_second"]
            rows.append(row)
            own, other = row["koret"], row["plain"]
            print(
                f"{client:6} x{clients:<3} koret {own['requests_per_second']:6.1f}/s p50 {own['p50_ms']:.0f} p99 "
                f"{own['p99_ms']:.0f} ms   plain {other['requests_per_second']:6.1f}/s p50 {other['p50_ms']:.0f} p99 "
                f"{other['p99_ms']:.0f} ms   {row['ratio']:.2f}x",
                flush=True,
            )
    return {"model": model, "seconds": seconds, "rounds": rounds, "load_before": os.getloadavg(), "rows": rows}


def check_answers(model: str, requests: int, connections: int = 32, tolerance: float = 1e-5) -> dict:
    """Ask for every text once and compare its vector with the one computed beforehand."""
    from koret.retrieval.exact import find_top_k
    from koret.retrieval.inference import E5KorQuADInference

    texts = [f"{n}번" for n in range(requests)]
    expected = E5KorQuADInference(model).encode_passages(texts)
    sample = np.random.default_rng(0).choice(requests, min(500, requests), replace=False)
    nearest = find_top_k(expected[sample], expected, 2)[0]
    twins = np.where(nearest[:, 0] == sample, nearest[:, 1], nearest[:, 0])
    apart = float(np.abs(expected[sample] - expected[twins]).max(axis=1).min())
    wrong, worst, took, statuses = [], 0.0, np.zeros(requests), {}

    async def ask(address: str, reader_writer, todo) -> None:
        nonlocal worst
        reader, writer = reader_writer
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: "
        for n in todo:
            body = json.dumps({"model": "model", "input": texts[n], "encoding_format": "base64"}).encode()
            began = time.perf_counter()
            writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
            answered = (await reader.readuntil(b"\r\n\r\n")).lower()
            status = int(answered.split(b" ", 2)[1])
            length = int(answered.split(b"content-length:")[1].split(b"\r\n")[0])
            content = json.loads(await reader.readexactly(length))
            took[n] = time.perf_counter() - began
            statuses[status] = statuses.get(status, 0) + 1
            if status != 200:
                wrong.append(n)
                continue
            vector = np.frombuffer(base64.b64decode(content["data"][0]["embedding"]), "<f4")
            away = float(np.abs(vector - expected[n]).max())
            worst = max(worst, away)
            if not away <= tolerance:
                wrong.append(n)

    async def ask_all(address: str) -> None:
        host, port = address.removeprefix("http://").split(":")
        todo = iter(np.random.default_rng(1).permutation(requests).tolist())
        opened = [await asyncio.open_connection(host, int(port)) for _ in range(connections)]
        await asyncio.gather(*(ask(f"{host}:{port}", one, todo) for one in opened))

    with start_server("koret", model) as address:
        began = time.perf_counter()
        asyncio.run(ask_all(address))
        seconds = time.perf_counter() - began
        lines = httpx.get(f"{address}/metrics").text.splitlines()
    counted = next(
        float(line.split()[1]) for line in lines if line.startswith('koret_texts_total{input_type="passage"}')
    )
    batches = next(float(line.split()[1]) for line in lines if line.startswith("koret_batch_texts_count"))
    result = {
        "model": model, "requests": requests, "connections": connections, "wrong": len(wrong), "statuses": statuses,
        "largest_difference": worst, "tolerance": tolerance, "nearest_two_texts_differ_by_at_least": apart,
        "texts_counted_by_server": int(counted), "texts_a_batch": counted / batches,
        "seconds": seconds, "requests_per_second": requests / seconds,
        "p50_ms": float(np.percentile(took, 50)) * 1000, "p99_ms": float(np.percentile(took, 99)) * 1000,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("speed", "answers", "plain"):
        parts.add_parser(name).add_argument("--model", default="offline")
    parts.choices["speed"].add_argument("--seconds", type=float, default=8)
    parts.choices["speed"].add_argument("--rounds", type=int, default=3)
    parts.choices["answers"].add_argument("--requests", type=int, default=100_000)
    parts.choices["plain"].add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    if options.part == "plain":
        run_plain_server(options.model, options.port)
        return
    if options.part == "speed":
        result = measure_speed(options.model, options.seconds, options.rounds)
    else:
        result = check_answers(options.model, options.requests)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"serve_load_{options.part}.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.part == "answers" and result["wrong"]:
        raise SystemExit(f"{result['wrong']} wrong answers")


if __name__ == "__main__":
    main()
