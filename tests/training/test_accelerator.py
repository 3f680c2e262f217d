"""What an accelerator asks of a program: no tensor on the wrong side, no waiting between records, its own random draws.

There need not be one: accelerator.py is a device that computes on the CPU and is strict about all of this. What its
kernels compute and what fits into its memory can be tested on a real one alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch takes no devices written in Python", allow_module_level=True)

PROGRAM = Path(__file__).with_name("accelerator_stories.py")
TRAININGS = (
    "padded, mined", "flat, in pieces, full", "bfloat16", "checkpointed", "taught", "another architecture",
)  # fmt: skip
# transformers looks whether a mask hides anything, once a forward pass
ASKED_BY_THE_LIBRARY = "aten::_local_scalar_dense in embed > _forward_padded > forward"


@pytest.fixture(scope="module")
def told(tiny_model, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("accelerator")
    shutil.copytree(tiny_model, folder / "model")
    file = folder / "model" / "config.json"
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    file.write_text(json.dumps(json.loads(file.read_text()) | no_dropout))
    ended = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout)


def test_every_story_was_told(told):
    assert set(told) == {*TRAININGS, "resumed", "chunks with dropout", "float16", "inference", "mixed"}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_is_that_of_the_cpu(told, name):
    cpu, device = told[name]["cpu"], told[name]["pretend"]
    assert (cpu["device"], device["device"]) == ("cpu", "pretend")
    close = 5e-3 if name == "bfloat16" else 1e-5  # there adapters are rounded before they are stacked, or after
    assert len(cpu["losses"]) >= 2 and device["losses"] == pytest.approx(cpu["losses"], rel=close)
    if name != "bfloat16":
        assert device["ndcg"] == pytest.approx(cpu["ndcg"], abs=1e-6) and told[name]["apart"] < 1e-5


@pytest.mark.parametrize("name", TRAININGS)
def test_steps_between_records_wait_for_nothing(told, name):
    waited = told[name]["waited"]
    if name == "another architecture":
        assert waited.pop(ASKED_BY_THE_LIBRARY) > 0
    assert waited == {}


def test_a_stopped_training_goes_on_with_the_devices_own_draws(told):
    assert told["resumed"] == {"stopped_at": 2, "steps": 4, "equal": True}


def test_chunks_are_embedded_twice_with_the_same_dropout(told):
    found = told["chunks with dropout"]
    assert found["apart"] < 1e-5 < 1e-2 < found["other_masks_apart"]


def test_float16_steps_ask_for_nothing_and_skip_what_overflows(told):
    found = told["float16"]
    assert found["pretend"] == [pytest.approx(values, rel=1e-6) for values in found["cpu"]]
    first, second, third = found["pretend"]
    assert first == second != third and found["waited"] == []


def test_inference_finds_the_same(told):
    assert told["inference"]["same"] and told["inference"]["apart"] < 1e-5


def test_what_must_not_happen_would_be_noticed(told):
    mixed = told["mixed"]
    assert mixed["sum"] == "expected all tensors on one device: aten::add of pretend got (4,) of the CPU"
    assert mixed["item"] == "aten::_local_scalar_dense" and mixed["mask"] == "aten::index"
    assert mixed["copy"] == "copy of (4,) from pretend to cpu"
    assert mixed["unpinned"] == "copy of (3,) from cpu to pretend, unpinned"
