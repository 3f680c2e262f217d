"""What the trainings of these tests start from: the toy model and data of toys.py, on one thread, unseen."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from toys import SYLLABLES, build_tiny_model, make_dataset

from koret.config import TrainingConfig
from koret.data.loader import Dataset


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-bert")
    build_tiny_model(folder, ["query", "passage", ":", *SYLLABLES, *(f"##{s}" for s in SYLLABLES)])
    return folder


@pytest.fixture(scope="session")
def toy_data() -> Dataset:
    return make_dataset()


@pytest.fixture
def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def make_config(tiny_model, tmp_path):
    """Settings for a run of a few seconds; keywords win."""

    def make(**changes) -> TrainingConfig:
        values = dict(
            model_name=str(tiny_model), max_seq_length=48, batch_size=8, num_epochs=1, max_steps=5, learning_rate=1e-3,
            warmup_steps=0, precision="fp32", log_dir=str(tmp_path / "runs"), log_every_n_steps=1, save_steps=2,
            micro_batch_tokens=4096, num_workers=0, train_split=0.7, lora_r=4,
        )  # fmt: skip
        return TrainingConfig(**{**values, **changes})

    return make
