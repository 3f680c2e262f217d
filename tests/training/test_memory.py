"""The token budget: what is free, what a token costs, never absurd."""

import torch

from koret.retrieval.encoder import load_encoder
from koret.training import memory


def test_budget_follows_memory_and_cost(tiny_model, monkeypatch):
    encoder = load_encoder(tiny_model, max_seq_length=48, device="cpu")
    cost = memory.estimate_bytes_per_token(encoder)
    assert cost == 2 * (10 * 32 + 3 * 64) * 4  # layers x numbers x bytes
    monkeypatch.setattr(memory, "read_free_memory", lambda device: 2 * 10_000 * cost)
    assert memory.choose_micro_batch_tokens(encoder) == 8192
    monkeypatch.setattr(memory, "read_free_memory", lambda device: 0)
    assert memory.choose_micro_batch_tokens(encoder) == 1024
    encoder.slow_path_reason = "asked for"
    assert memory.estimate_bytes_per_token(encoder) > 2 * cost


def test_free_memory_is_read():
    assert 1 << 20 < memory.read_free_memory(torch.device("cpu")) < 1 << 45
