"""The token budget: what is free, what a token costs, never absurd."""

import gc
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from koret.retrieval.encoder import load_encoder
from koret.retrieval.processes import Process
from koret.training import memory
from koret.training.lora import setup_lora_model


def test_room_follows_memory_cost_and_company(tiny_model, monkeypatch):
    encoder = load_encoder(tiny_model, max_seq_length=48, device="cpu")
    monkeypatch.setattr(memory, "read_free_memory", lambda device: 2 * 10_000 * 700)
    assert memory.count_free_tokens(encoder, 700) == 10_000
    assert memory.count_free_tokens(encoder, 700, Process(1, 4, 1, 2)) == 5000


@pytest.mark.parametrize(
    ("room", "heaviest", "chosen"),
    [
        (10_000, 50_000, 8192),
        (12_287, 50_000, 8192),
        (12_288, 50_000, 12_288),
        (16_383, 50_000, 12_288),
        (16_384, 50_000, 16_384),
        (0, 50_000, 1024),
        (10_000, 9000, 12_288),  # there is room for the heaviest: it is not cut
        (10_000, 10_001, 8192),
        (15_000, 14_000, 16_384),
        (15_000, 12_288, 12_288),
        (15_000, 100, 12_288),
    ],
)
def test_budgets_are_coarse_and_no_batch_is_cut_that_there_is_room_for(room, heaviest, chosen):
    assert memory.choose_micro_batch_tokens(room, heaviest) == chosen


def test_what_a_token_keeps_is_counted(tiny_model):
    """A frozen layer of width H and inner width F keeps nothing; with adapters it keeps some ten H + F numbers."""
    encoder = load_encoder(tiny_model, max_seq_length=48, device="cpu")
    assert memory.measure_bytes_per_token(encoder) == 1  # nothing trains: nothing is kept
    setup_lora_model(encoder, 4, 8, 0.1)
    state = torch.get_rng_state()
    plain = memory.measure_bytes_per_token(encoder)
    assert torch.equal(state, torch.get_rng_state())
    least, most = 2 * (5 * 32 + 64) * 4, 2 * (16 * 32 + 3 * 64) * 4  # layers x numbers x bytes
    assert least < plain < most
    encoder.recompute = 2
    lean = memory.measure_bytes_per_token(encoder)
    assert plain - lean >= 2 * 3 * 32 * 4  # q, k and v of two layers
    encoder.recompute = "layers"
    assert memory.measure_bytes_per_token(encoder) < min(lean, plain / 2)
    encoder.recompute = 0
    assert memory.measure_bytes_per_token(encoder) == plain  # whatever was measured before
    encoder.slow_path_reason = "asked for"
    assert memory.measure_bytes_per_token(encoder) > plain


def test_the_count_is_what_a_long_batch_really_takes(tiny_model):
    """Counted on texts of one length, true of a batch of many lengths: bytes of every tensor it keeps."""
    encoder = load_encoder(tiny_model, max_seq_length=48, device="cpu")
    setup_lora_model(encoder, 4, 8, 0.1)
    per_token, kept = memory.measure_bytes_per_token(encoder), {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    texts = [np.arange(4, 4 + n, dtype=np.int32) for n in (48, 47, 40, 33, 30, 22, 20, 12, 9) for _ in range(20)]
    encoder.model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        vectors = encoder.embed(texts)
    found = sum(kept.values()) / sum(map(len, texts))
    assert vectors.requires_grad and found == pytest.approx(per_token, rel=0.25)


def test_few_texts_give_the_count_of_many_and_nothing_of_them_stays(tiny_model):
    encoder = load_encoder(tiny_model, max_seq_length=64, device="cpu")
    setup_lora_model(encoder, 4, 8, 0.1)
    memory.measure_bytes_per_token(encoder)
    before = _count_graph_tensors()
    found = memory.measure_bytes_per_token(encoder)
    assert _count_graph_tensors() == before
    encoder.model.train()
    few, many = (memory._count_kept(encoder, texts, 64) for texts in (4, 12))
    assert found == (many - few) // (8 * 64)


def _count_graph_tensors():
    gc.collect()
    return sum(type(found) is torch.Tensor and found.grad_fn is not None for found in gc.get_objects())


def test_free_memory_is_read():
    assert 1 << 20 < memory.read_free_memory(torch.device("cpu")) < 1 << 45


@pytest.mark.skipif(sys.platform != "linux", reason="limits are read from /proc")
@pytest.mark.parametrize("limit,column", [("RLIMIT_AS", 0), ("RLIMIT_DATA", 5)])
def test_a_limit_of_the_process_is_respected(monkeypatch, limit, column):
    taken = int(Path("/proc/self/statm").read_text().split()[column]) * os.sysconf("SC_PAGE_SIZE")
    limits = {getattr(memory.resource, limit): taken + (64 << 20)}
    monkeypatch.setattr(memory.resource, "getrlimit", lambda kind: (limits.get(kind, memory.resource.RLIM_INFINITY), 0))
    assert memory.read_free_memory(torch.device("cpu")) == pytest.approx(64 << 20, rel=0.1)


TAKE_AND_FREE = """
import resource, sys
import torch
from koret.training import memory

def read():
    return memory.read_held(torch.device("cpu")), resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "kept":
    memory.keep_freed()
taken = torch.ones(6_000_000)  # 24 MB: more than the library keeps unless it is told to
full, _ = read()
del taken
freed, before = read()
taken = torch.ones(5_900_000)  # smaller by more than what aligned pieces need beside them (glibc's bug 14581)
_, after = read()
del taken
memory.return_freed()
print(full - freed, after - before, full - read()[0])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep what is freed")
def test_what_is_freed_is_kept_for_the_next_step_until_it_is_given_back():
    size, pages = 24_000_000, 24_000_000 // os.sysconf("SC_PAGE_SIZE")

    def take(how: str) -> list[int]:
        done = subprocess.run([sys.executable, "-c", TAKE_AND_FREE, how], capture_output=True, text=True, check=True)
        return [int(word) for word in done.stdout.split()]

    dropped, faults, returned = take("kept")
    assert dropped < size / 10 and faults < pages / 10 and returned > 0.9 * size
    dropped, faults, _ = take("as it comes")
    assert dropped > 0.9 * size and faults > 0.9 * pages  # cleared anew
