"""Whole, keeping less, or in pieces: what is chosen, and that the forecast of it stays below a limit."""

import copy

import pytest

from koret.retrieval.encoder import load_encoder
from koret.training import memory
from koret.training.forecast import forecast_peak
from koret.training.lora import setup_lora_model
from koret.training.memory import SHARE, measure_bytes_per_token
from koret.training.memory_plan import plan_memory

HEAVIEST = 400_000  # tokens
LAYERS = 5


@pytest.fixture
def encoder(tiny_model):
    encoder = load_encoder(tiny_model, max_seq_length=48, device="cpu")
    layers = encoder.backbone.encoder.layer
    layers.extend(copy.deepcopy(layers[0]) for _ in range(LAYERS - len(layers)))
    encoder.backbone.config.num_hidden_layers = LAYERS
    setup_lora_model(encoder, 4, 8, 0.1)
    return encoder


@pytest.fixture
def costs(encoder):
    """Bytes a token of each way."""
    found = {}
    for encoder.recompute in (0, LAYERS):
        found[encoder.recompute] = measure_bytes_per_token(encoder)
    encoder.recompute = 0
    assert found[LAYERS] < 0.8 * found[0]
    return found


def plan(encoder, heaviest=HEAVIEST, **settings):
    return plan_memory(encoder, heaviest, merges=True, **settings)


def test_a_batch_goes_whole_then_keeps_less_then_goes_in_pieces(encoder, costs, monkeypatch):
    def free(bytes_):
        monkeypatch.setattr(memory, "read_free_memory", lambda device: int(bytes_ / SHARE))
        encoder.recompute = 0
        return plan(encoder)

    found = free(4 * HEAVIEST * costs[0])
    assert (encoder.recompute, found.per_token, found.fits) == (0, costs[0], True)
    assert found.budget >= HEAVIEST
    found = free(HEAVIEST * costs[LAYERS] * 1.01)
    assert (encoder.recompute, found.per_token, found.fits) == (LAYERS, costs[LAYERS], True)
    found = free(300_000 * costs[LAYERS])
    assert (encoder.recompute, found.per_token, found.fits) == (0, costs[0], False)
    assert found.budget < 300_000


def test_a_limit_does_the_same(encoder, costs):
    def peak(budget=HEAVIEST):
        return forecast_peak(encoder, measure_bytes_per_token(encoder), budget, HEAVIEST, True).peak

    peaks = []
    for encoder.recompute in range(LAYERS + 1):
        peaks.append(peak())
    assert peaks == sorted(peaks, reverse=True)
    for limit in range(peaks[-1] + (1 << 24), int(peaks[0] * 1.02), (peaks[0] - peaks[-1]) // 20):
        encoder.recompute = 0
        assert plan(encoder, limit=limit).fits
        fewest = min(number for number, needed in enumerate(peaks) if needed <= limit)
        near = min(abs(needed - limit) for needed in peaks) < 1 << 24  # what is held changes while this is measured
        assert encoder.recompute == fewest or near
    encoder.recompute = 0
    limit = int(peak(50_000) * 1.01)
    pieces = plan(encoder, limit=limit)
    assert not pieces.fits and encoder.recompute == 0 and 1024 < pieces.budget < HEAVIEST
    assert peak(pieces.budget) < limit * 1.02


def test_pieces_are_the_largest_that_stay_below_the_limit(encoder):
    """Brute force over the coarse numbers; of few tokens also what passes through a layer is less."""
    coarse = [1024 * 2**n for n in range(9)]
    coarse = sorted([*coarse, *(n * 3 // 2 for n in coarse)])
    per_token, heaviest = measure_bytes_per_token(encoder), 40_000
    peaks = {n: forecast_peak(encoder, per_token, n, heaviest, True).peak for n in coarse}
    for share in (0.05, 0.2, 0.5, 0.9):
        limit = int(peaks[1024] + share * (peaks[49_152] - peaks[1024]))
        encoder.recompute = 0
        found = plan(encoder, heaviest, limit=limit)
        if encoder.recompute == 0:
            assert found.budget == max(n for n in coarse if peaks[n] <= limit), share
        else:
            assert found.fits and found.budget >= heaviest
    assert encoder.recompute > 0  # some of both


def test_what_cannot_be_held_is_planned_as_small_as_can_be(encoder):
    found = plan(encoder, limit=1 << 20)
    assert (found.budget, found.fits, encoder.recompute) == (memory.LEAST, False, 0)
    small = plan(encoder, heaviest=100, limit=1 << 20)
    assert not small.fits


def test_what_was_asked_for_stays(encoder, costs, monkeypatch):
    found = plan(encoder, asked=2048)
    assert (found.budget, found.fits, encoder.recompute) == (2048, True, 0)
    found = plan(encoder, asked=2048, limit=1 << 20)  # keeps less than it could, at least
    assert (found.budget, found.fits, encoder.recompute) == (2048, False, LAYERS)
    encoder.recompute = "layers"  # gradient checkpointing
    assert plan(encoder, limit=1 << 20).per_token < costs[LAYERS] and encoder.recompute == "layers"
    encoder.recompute, encoder.slow_path_reason = 0, "asked for"
    plan(encoder, limit=1 << 20)
    assert encoder.recompute == 0
