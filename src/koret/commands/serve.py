"""koret serve: a model behind an address that speaks OpenAI's embeddings interface."""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import time
from pathlib import Path

from koret import runs
from koret.commands.runs import find_address

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_serve(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="RUN", help="run, model directory, hub name, 'offline' or 'latest'")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    command.add_argument("--port", type=int, default=8080)
    command.add_argument("--allow-host", metavar="NAME", action="append", default=[], help="answer to this name too")
    command.add_argument(
        "--max-queue", type=int, default=4096, metavar="N",
        help="texts that may wait; beyond that a request is answered with 429 and when to come back (default 4096)",
    )  # fmt: skip
    command.add_argument(
        "--max-connections", type=int, default=256, metavar="N",
        help="connections held open; beyond that the one that has waited longest to ask is closed (default 256)",
    )  # fmt: skip
    command.add_argument("--api-key-env", metavar="NAME", help="ask for the key in this environment variable")
    command.add_argument("--served-name", metavar="NAME", help="what clients call the model (default: the run's name)")
    command.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16", "auto"], default="fp32",
        help="fp32 (default) gives what koret evaluates with; auto what is faster on this machine",
    )  # fmt: skip
    command.add_argument("--device", metavar="DEVICE", help="cpu or cuda (default: cuda when there is one)")


def serve_model(options: argparse.Namespace) -> None:
    """Take the port, load and check the model, say what is served and to whom, serve it."""
    began = time.perf_counter()
    needed = ("fastapi", "uvicorn", "prometheus_client")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"koret serve needs {' and '.join(missing)}: pip install 'koret[serve]'")
    for name, value in (("--max-queue", options.max_queue), ("--max-connections", options.max_connections)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    key = read_key(options.api_key_env)
    from koret.web import server as listening

    with listening.bind(options.host, options.port) as own:  # before the model: a taken port is known at once
        from koret.retrieval.encoder import load_encoder
        from koret.retrieval.probe import probe_encoder
        from koret.serving import app as serving
        from koret.serving import server

        encoder = load_encoder(options.model, device=options.device, precision=options.precision)
        agreement = probe_encoder(encoder)
        service = serving.Service(encoder, options.served_name or name_model(options.model), options.max_queue)
        public = options.host not in LOOPBACK
        names = (options.host, *options.allow_host, *((socket.gethostname(),) if public else ()))
        app = serving.make_app(service, hosts=names, open_to_network=public, key=key)
        listening.make_ready(own)
        print(
            f"{service.name}: {encoder.dimensions} dimensions, {encoder.max_seq_length} tokens, {encoder.precision} on "
            f"{encoder.device}, {encoder.path}; agrees with the plain forward to cosine {agreement:.6f} "
            f"(ready in {time.perf_counter() - began:.1f} s)"
        )
        _say_where(options, own.getsockname()[1], with_key=key is not None)
        server.serve(app, own, options.max_connections)
        service.batcher.close()
    print("stopped: every accepted request was answered", flush=True)


def read_key(variable: str | None) -> str | None:
    """The key in an environment variable; None where none is asked for. Raises ValueError where it is empty."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"--api-key-env names {variable}, but that environment variable is not set or empty")
    return key


def name_model(model: str) -> str:
    """What clients call a model: a run's own name, else what it was asked for by, a directory by its last part."""
    try:
        path = runs.resolve_model(model)
    except FileNotFoundError:
        return model
    return (
        path.resolve().parent.name if path.name == "model" and runs.is_run(path.parent) else Path(path).resolve().name
    )


def _say_where(options: argparse.Namespace, port: int, with_key: bool) -> None:
    everywhere = options.host in ("0.0.0.0", "::")
    own = "localhost" if options.host in LOOPBACK or everywhere else options.host
    print(f"  on this machine  http://{own}:{port}/v1/embeddings   (also /v1/models, /health, /metrics)")
    if options.host not in LOOPBACK:
        print(f"  on the network   http://{find_address() if everywhere else options.host}:{port}/v1/embeddings")
        if with_key:
            print("Without the key only /health answers. The key and the texts travel unencrypted: use a TLS proxy.")
        else:
            print(
                f"There is no password: anyone who can reach {options.host}:{port} can have texts embedded and\n"
                "see its name and the counters. Ask for a key: --api-key-env NAME; only for this machine: leave out\n"
                f"--host (and from elsewhere: ssh -L {port}:localhost:{port} THIS_MACHINE)."
            )
    print("Stop with Ctrl-C: what was accepted is answered first.", flush=True)
