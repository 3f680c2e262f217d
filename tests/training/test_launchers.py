"""torchrun and accelerate launch start one training in two processes, which ends as that of one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from koret.runs import find_runs

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "alone": [sys.executable, "-m", "koret"],
    "torchrun": [BIN / "torchrun", "--nproc-per-node", "2", "-m", "koret"],
    "accelerate": [BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "-m", "koret"],
}
SMALL = [
    "--model-name", "offline", "--dataset-root", "sample", "--train-split", "0.9", "--max-seq-length", "32",
    "--passage-tokens", "512", "--max-steps", "3", "--eval-samples", "16", "--eval-corpus-size", "20",
    "--batch-size", "8", "--learning-rate", "2e-3", "--lora-dropout", "0", "--log-every-n-steps", "1",
    "--num-workers", "0", "--precision", "fp32",
]  # fmt: skip


def train(launcher: str, folder: Path) -> list[dict]:
    """The lines of the one run that the command leaves, by step."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_CONFIG_FILE": str(folder / "none.yaml")}
    command = [*map(str, LAUNCHERS[launcher]), "train", *SMALL, "--log-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert ("2 processes encode a share" in done.stdout) == (launcher != "alone")
    assert done.stdout.count("what to try next") == 1  # one of them speaks
    (run,) = find_runs(folder)
    assert run.state == "finished"
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[dict]:
    return train("alone", tmp_path_factory.mktemp("alone"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_of_a_launcher_train_what_one_trains(launcher, alone, tmp_path):
    together = train(launcher, tmp_path)
    assert [line["step"] for line in together] == [line["step"] for line in alone]
    compared = 0
    for ours, theirs in zip(together, alone, strict=True):
        for name in (n for n in theirs if n.startswith(("train/loss", "gradients/", "eval"))):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-5), (ours["step"], name)
            compared += 1
    assert compared >= 6
