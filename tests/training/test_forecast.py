"""What a training says beforehand: counted scorings, seconds in proportion to tokens, and the words at the end."""

import dataclasses
import re

import pytest
import torch

from koret.retrieval.encoder import load_encoder
from koret.training import forecast
from koret.training.forecast import Pace, PeakForecast, count_scorings
from koret.training.lora import merge_lora, setup_lora_model
from koret.training.trainer import EmbeddingTrainer

PEAK = PeakForecast(held=1000, per_token=10, tokens=20, pieces=3, state=30, scoring=50, saving=400)


@pytest.mark.parametrize(("step", "total", "every"), [(0, 66, 1000), (5, 66, 20), (20, 60, 20), (0, 5, 2), (59, 60, 7)])
def test_scorings_are_counted_as_the_loop_makes_them(step, total, every):
    due = [s for s in range(step + 1, total + 1) if s % every == 0 or s == total]
    assert count_scorings(step, total, every) == len(due) + 1  # and the saved model


def test_the_peak_is_what_is_held_and_the_largest_of_what_comes_and_goes():
    assert PEAK.peak == 1000 + 30 + 400
    assert PEAK.correct(1500, seen=20) == 1500  # more than the end will hold: 1000 + 30 + 400
    assert PEAK.correct(1200, seen=20) == PEAK.peak
    assert PEAK.correct(1500, seen=12) == 1500 + 8 * 10  # the heaviest batch is still to come
    holed = dataclasses.replace(PEAK, holes=0.5, passing=150, saving=0)
    assert holed.peak == 1000 + 30 + 200 * 1.5 + 150
    assert holed.correct(1500, seen=12) == 1500 + 8 * 10 * 1.5
    growing = dataclasses.replace(holed, growth=0.25)
    assert growing.peak == holed.peak + 200 * 0.25
    assert growing.correct(1500, seen=12) == holed.correct(1500, seen=12) + 200 * 0.25
    late = dataclasses.replace(growing, later=30)
    assert late.peak == growing.peak + 30 and late.correct(1500, seen=12) == growing.correct(1500, seen=12) + 30
    assert "75% more lost between tensors" in str(growing)
    assert "in up to 3 pieces by GradCache" in str(PEAK)


@pytest.mark.parametrize("train_embeddings", [False, True])
def test_what_a_merged_copy_takes_is_counted(tiny_model, train_embeddings):
    encoder = load_encoder(tiny_model, max_seq_length=48, device="cpu")
    setup_lora_model(encoder, 4, 8, 0.1, train_embeddings=train_embeddings)
    counted = forecast.count_merged(encoder)
    merged, ours = merge_lora(encoder).backbone, {p.data_ptr() for p in encoder.backbone.parameters()}
    assert counted == sum(p.numel() for p in merged.parameters() if p.data_ptr() not in ours)


def test_the_matrices_of_a_forward_are_those_it_keeps_reordered(tiny_model):
    encoder = load_encoder(tiny_model, max_seq_length=48, device="cpu")
    setup_lora_model(encoder, 4, 8, 0.1)
    encoder.encode(["무엇", "누구"], "query")
    kept = [held for key, held in encoder._packed[1]._frozen.items() if key[0] == "forward"]
    assert sum(p.numel() for p in forecast.find_products(encoder)) == sum(p.numel() for _, _, own in kept for p in own)


def test_seconds_follow_the_tokens_of_the_timed_steps(monkeypatch):
    class Batch:
        def __init__(self, tokens):
            self.texts = [[0] * tokens]

    clock = [100.0]
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: clock[0])
    pace = Pace(total=30, every=10, step_tokens=50, peak=PEAK, time_scorings=lambda: 2.0)
    said = None
    for step in range(1, 7):
        clock[0] += 10.0 if step <= 2 else 3.0  # the first two are slow, and no part of it
        said = pace.watch(step, [Batch(30 * step)], torch.device("cpu"), lambda: None) or said
    made = pace.forecast
    assert made.steps == 25 and made.scorings == 4
    assert made.step_seconds == pytest.approx(9.0 / (90 + 120 + 150) * 50)
    assert made.seconds == pytest.approx(25 * made.step_seconds + 4 * 2.0)
    assert said.startswith("forecast: 1.25 s a step, 25 steps to go")
    clock[0] += 2 * made.seconds - 3.0  # one step has passed already
    assert "took 1:18 (+100%)" in pace.compare(torch.device("cpu"))


def test_what_was_freed_is_given_back_where_more_is_held_than_was_forecast_and_than_a_step_needs(monkeypatch):
    held, given_back = {"now": 0, "least": 1200}, []

    def give_back():
        given_back.append(held["now"])
        held["now"] = min(held["now"], held["least"])

    monkeypatch.setattr(forecast, "read_held", lambda device: held["now"])
    monkeypatch.setattr(forecast, "return_freed", give_back)
    pace = Pace(total=30, every=10, step_tokens=50, peak=PEAK, time_scorings=lambda: 2.0)
    assert pace.expected == 1430
    # A step needs 1440, a tenth more is 1584.
    steps = (1400, 1430, 1431, 1440, 1500, 1584, 1585, 1300, 1430, 1431)
    for now in steps:
        held["now"] = now
        pace.hold_to(torch.device("cpu"))
    assert given_back == [1431, 1585, 1431]
    held["now"] = 2000
    pace.hold_to(torch.device("cpu"))  # the first step after giving back: it needs that
    held["now"] = 9000
    pace.hold_to(torch.device("cuda"))
    assert len(given_back) == 3


def test_near_a_limit_less_growth_is_let_stand(monkeypatch):
    held, given_back = {"now": 0}, []
    monkeypatch.setattr(forecast, "read_held", lambda device: held["now"])
    monkeypatch.setattr(forecast, "return_freed", lambda: given_back.append(held["now"]))
    peak = PeakForecast(held=100, per_token=10, tokens=190, pieces=1, state=0, scoring=0, saving=0)
    pace = forecast.Pace(50, 100, 100.0, peak, lambda: 1.0, limit=1200)
    for held["now"] in (1000, 1150, 1170, 1180, 1190, 1203, 1204):  # 97% of the limit are 1164; 1180 is needed anyway
        pace.hold_to(torch.device("cpu"))
    assert given_back == [1170, 1204]


@pytest.mark.parametrize(("limit", "returned"), [(None, 991), (950, 912)])
def test_gradients_of_the_next_step_come_on_top_of_what_is_held(limit, returned, monkeypatch):
    held, given_back = {"now": 0}, []
    monkeypatch.setattr(forecast, "read_held", lambda device: held["now"])
    monkeypatch.setattr(forecast, "return_freed", lambda: given_back.append(held["now"]))
    peak = PeakForecast(held=100, per_token=10, tokens=60, pieces=1, state=300, scoring=0, saving=0, gradients=10)
    assert peak.peak == 1000
    pace = forecast.Pace(50, 100, 100.0, peak, lambda: 1.0, limit=limit)
    for held["now"] in (800, 900, 911, 912, 921, 990, 991):
        pace.hold_to(torch.device("cpu"))
        if given_back:
            break
    assert given_back == [returned]


def test_a_short_run_is_not_forecast_and_a_longer_one_says_how_true_it_was(make_config, toy_data, silent):
    EmbeddingTrainer(make_config(), dataset=toy_data, console=silent).train()
    assert "forecast" not in silent.file.getvalue()
    config = make_config(num_epochs=4, max_steps=22, save_steps=100)
    EmbeddingTrainer(config, dataset=toy_data, console=silent).train()
    said = silent.file.getvalue()
    assert re.search(r"forecast: \d+\.\d\d s a step, 17 steps to go; .* to the end, \d+\.\d\d GB at the peak", said)
    assert re.search(r"forecast \d+:\d\d, took \d+:\d\d \([+-]\d+%\); memory forecast .* was \d+\.\d\d GB", said)
