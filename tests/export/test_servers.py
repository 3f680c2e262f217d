"""Merged folders in other people's servers: infinity and vLLM, started for real where they are installed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from export_examples import build_unigram_model

from koret.export import layout
from koret.retrieval.encoder import load_encoder

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def servers(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("check_servers")


@pytest.mark.slow
@pytest.mark.parametrize("server", ["infinity", "vllm"])
@pytest.mark.parametrize(("family", "dims"), [("bert", None), ("bert", 128), ("xlm-roberta", None)])
def test_a_server_gives_the_folders_vectors(servers, server, family, dims, tmp_path):
    if not servers.is_ready(server):
        pytest.skip(f"{server} is not in {servers.WORK / server}: python tools/check_servers.py FOLDER puts it there")
    if family == "bert":
        encoder = load_encoder("offline", max_seq_length=96)
    else:
        encoder = build_unigram_model(["한라산은 제주도에 있다. 세종은 훈민정음을 반포하였다."] * 40, 60, width=128)
    layout.save_classic(layout.shape_output(encoder, dims), tmp_path / "model")
    assert servers.check(server, tmp_path / "model") > servers.LEAST_COSINE
