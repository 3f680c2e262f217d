"""Fixtures of the export tests: a finished run of a tiny model, and questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from export_examples import build_wordpiece_model, write_questions

from koret.config import TrainingConfig
from koret.retrieval.encoder import TextEncoder, load_encoder


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions") / "questions.json")


@pytest.fixture(scope="session")
def run(tmp_path_factory, questions) -> Path:
    """A finished run: its base is another tiny model with the same tokenizer."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("runs")
    build_wordpiece_model(seed=1).save(home / "base")
    folder = home / "run_20260101_000000"
    build_wordpiece_model(seed=0).save(folder / "model")
    config = TrainingConfig(
        model_name=str(home / "base"), dataset_root=str(questions), max_seq_length=48, train_split=0.5, num_workers=0
    )
    (folder / "model" / "training_config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    (folder / "model" / "README.md").write_text("# tiny\n", encoding="utf-8")
    (folder / "status.json").write_text('{"state": "finished"}', encoding="utf-8")
    (folder / "data.json").write_text('{"fingerprint": "other"}', encoding="utf-8")
    return folder


@pytest.fixture
def tiny(run) -> TextEncoder:
    return load_encoder(run)
