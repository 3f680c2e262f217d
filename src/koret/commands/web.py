"""koret web: the page that puts models side by side."""

from __future__ import annotations

import argparse
import importlib.util
import socket
import sys
import time

from koret.commands.runs import find_address

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_web(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "models", metavar="MODEL", nargs="*",
        help="run, model directory, hub name or 'offline'; none: the newest run and its base",
    )  # fmt: skip
    command.add_argument("--index", metavar="DIR", action="append", default=[], help="search this saved index")
    command.add_argument("--dataset-root", metavar="DATA", help="passages and questions (default: the run's own data)")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    command.add_argument("--port", type=int, default=8000)
    command.add_argument("--allow-host", metavar="NAME", action="append", default=[], help="answer to this name too")
    command.add_argument("--top-k", type=int, default=10, metavar="K", help="passages a column (default 10)")
    command.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16", "auto"], default="fp32",
        help="of the questions' encoding: fp32 (default) gives what koret evaluates with; auto what is faster here",
    )  # fmt: skip
    command.add_argument("--log-dir", default="./logs/tensorboard", metavar="DIR", help="where runs are looked for")


def show_page(options: argparse.Namespace) -> None:
    """Take the port, load models and passages, say where the page is and who can read it, serve it."""
    began = time.perf_counter()
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"koret web needs {' and '.join(missing)}: pip install 'koret[web]'")
    if not 1 <= options.top_k <= 50:
        raise ValueError(f"--top-k must lie between 1 and 50, not {options.top_k}")
    from koret.web import server

    with server.bind(options.host, options.port) as own:  # before the models: a taken port is known at once
        from koret.web.app import make_app
        from koret.web.opening import open_page

        opened = open_page(
            options.models, options.index, options.dataset_root, log_dir=options.log_dir, precision=options.precision,
            say=_say,
        )  # fmt: skip
        public = options.host not in LOOPBACK
        names = (options.host, *options.allow_host, *((socket.gethostname(),) if public else ()))
        app = make_app(opened, top_k=options.top_k, hosts=names, open_to_network=public)
        server.make_ready(own)
        _say_where(options, own.getsockname()[1], opened, time.perf_counter() - began)
        with server.share_often():
            server.Server(app).serve_until_stopped(own)
        opened.close()
    print("stopped", flush=True)


def _say_where(options: argparse.Namespace, port: int, opened, seconds: float) -> None:
    desk = opened.desk
    names = ", ".join(column.name for column in desk.columns)
    other = ", ".join(sorted({*desk.precisions} - {"fp32"}))
    encoded = other and f", questions in {other}"
    _say(f"{names} over {desk.passages:,} passages of {desk.corpus}{encoded} (ready in {seconds:.1f} s)")
    everywhere = options.host in ("0.0.0.0", "::")
    own = "localhost" if options.host in LOOPBACK or everywhere else options.host
    _say(f"  on this machine  http://{own}:{port}")
    if options.host not in LOOPBACK:
        _say(f"  on the network   http://{find_address() if everywhere else options.host}:{port}")
        _say(
            f"There is no password: anyone who can reach {options.host}:{port} can search and read these passages and\n"
            "questions, and the scores, curves and settings of the run. Only for this machine: leave out --host\n"
            f"(and from elsewhere: ssh -L {port}:localhost:{port} THIS_MACHINE)."
        )
    _say("Stop with Ctrl-C.")


def _say(text: str) -> None:
    print(text, flush=True, file=sys.stdout)
