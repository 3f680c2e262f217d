"""The logbook: two views of the same numbers, taken back to where a checkpoint was, never a NaN."""

import json
import math

import numpy as np
import pytest
from crashes import read_curves

from koret.training.logbook import Logbook, describe_config


def test_what_was_recorded_after_a_checkpoint_is_taken_back(tmp_path):
    book = Logbook(tmp_path)
    for step in (1, 2):
        book.record(step, {"train/loss": step / 4})
    book.record_histograms(2, {"gradients/x_weight": np.array([1.0, -2.0])})
    positions = book.flush()
    for step in (3, 4):
        book.record(step, {"train/loss": -1.0})
    book.flush()  # and then the process dies
    again = Logbook(tmp_path, step=2, positions=positions)
    for step in (3, 4):
        again.record(step, {"train/loss": step / 4})
    again.close()
    expected = [(step, step / 4) for step in (1, 2, 3, 4)]
    assert read_curves(tmp_path) == {"train/loss": expected}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == expected
    assert len(list(tmp_path.glob("events.*"))) == 2


def test_a_half_written_line_is_taken_back(tmp_path):
    book = Logbook(tmp_path)
    book.record(1, {"a": 1.0})
    positions = book.flush()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "a"')
    Logbook(tmp_path, step=1, positions=positions).close()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    Logbook(tmp_path).close()  # without a checkpoint: from the beginning
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"" and read_curves(tmp_path) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_never_written(tmp_path, value):
    book = Logbook(tmp_path)
    with pytest.raises(ValueError, match="train/loss is .* at step 3"):
        book.record(3, {"train/epoch": 0.5, "train/loss": value})
    book.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"" and read_curves(tmp_path) == {}


def test_settings_are_a_table():
    assert describe_config({"seed": 1}) == "| setting | value |\n|---|---|\n| seed | 1 |"
