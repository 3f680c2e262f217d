"""Steps that cannot teach anything, or that float16 cannot hold, are left out, counted and said."""

import math

import numpy as np
import pytest
import torch

from koret.runs import read_run
from koret.training.batches import Batch
from koret.training.measurements import Measurements, NumericFault
from koret.training.trainer import EmbeddingTrainer


def make_batch(rows):
    one = np.zeros(len(rows), dtype=np.int64)
    return Batch(np.asarray(rows), [], one, one, one, None)


def test_batches_without_negatives_are_left_out_counted_and_said(make_config, toy_data, silent):
    """A step whose batch has no negative changes nothing, and the run goes on."""
    trainer = EmbeddingTrainer(make_config(save_steps=100), dataset=toy_data, console=silent)
    trainer._prepare()
    plain, spoilt = trainer.job.maker.make, []
    second = next(trainer.job.schedule.steps_after(1))

    def make(rows):
        batch = plain(rows)
        if np.array_equal(rows, second.batches[0]):
            batch.known[:] = True
            spoilt.append(len(rows))
        return batch

    trainer.job.maker.make = make
    weights = {}
    take_step = trainer._take_step

    def take(step):
        weights[step.number] = [p.detach().clone() for p in trainer.parameters.values()]
        take_step(step)

    trainer._take_step = take
    run = trainer.train()
    assert spoilt and run.state == "finished"
    assert all(map(torch.equal, weights[2], weights[3])) and not all(map(torch.equal, weights[3], weights[4]))
    said = silent.file.getvalue()
    assert f"{sum(spoilt)} times a question had no negative in its batch and was left out" in said


def test_overflow_of_float16_is_counted_and_recorded_and_a_bad_loss_still_stops():
    found = Measurements(lambda rows: [f"q{row}" for row in rows], scaling=True)
    found.add(1, [make_batch([1, 2])], torch.tensor([2.0, 0.0, 0.0, math.inf]))
    found.add(2, [make_batch([3, 4])], torch.tensor([1.0, 0.0, 0.0, 0.5]))
    found.collect()
    assert found.totals["overflows"] == 1 and found.summarize()["train/overflows"] == 1
    assert "1 steps overflowed in float16" in found.describe_losses()
    found.add(3, [make_batch([5])], torch.tensor([math.nan, 0.0, 0.0, math.inf]))
    with pytest.raises(NumericFault, match="step 3: the loss is nan.*q5"):
        found.collect()


def test_without_scaling_an_infinite_gradient_stops():
    found = Measurements(lambda rows: [f"q{row}" for row in rows], scaling=False)
    found.add(1, [make_batch([1, 2])], torch.tensor([2.0, 0.0, 0.0, math.inf]))
    with pytest.raises(NumericFault, match="step 1: the gradient norm is inf"):
        found.collect()
    assert found.describe_losses() == ""


def test_a_failed_run_says_why_and_shows_in_its_status(make_config, toy_data, silent):
    trainer = EmbeddingTrainer(make_config(), dataset=toy_data, console=silent)
    trainer._prepare()
    with torch.no_grad():
        next(iter(trainer.parameters.values())).fill_(math.nan)
    with pytest.raises(NumericFault):
        trainer.train()
    status = read_run(trainer.run_dir).status
    assert status["state"] == "failed" and "non-finite" in status["reason"]
