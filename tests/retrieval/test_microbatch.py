"""TextBatcher: own rows for everybody, turns, a bounded queue, a drained end; against the encoder alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from koret.retrieval.encoder import TextEncoder, load_encoder
from koret.retrieval.microbatch import PIECE, Closed, QueueFull, TextBatcher

TEXTS = [f"{n}번째 문장이다. " + "한라산은 제주도에 있다. " * (n % 7) for n in range(40)]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.set_num_threads(1)
    return load_encoder("offline", max_seq_length=64)


class Gate:
    """Holds the encoder back until it is opened, and keeps what it was given."""

    def __init__(self, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.entered, self.batches = threading.Event(), threading.Event(), []
        plain = encoder.encode_ids

        def encode_when_open(ids):
            self.batches.append(len(ids))
            self.entered.set()
            assert self.opened.wait(30)
            return plain(ids)

        monkeypatch.setattr(encoder, "encode_ids", encode_when_open)


@pytest.fixture
def gate(encoder, monkeypatch) -> Gate:
    return Gate(encoder, monkeypatch)


def test_everybody_gets_the_rows_of_their_own_texts(encoder):
    expected = {kind: encoder.encode(TEXTS, kind) for kind in ("query", "passage")}
    lengths = {kind: [len(x) for x in encoder.tokenize(TEXTS, kind)] for kind in ("query", "passage")}
    batcher = TextBatcher(encoder, batch_tokens=256)
    rng = np.random.default_rng(0)
    asked = [(rng.permutation(40)[: rng.integers(1, 12)], ("query", "passage")[n % 2]) for n in range(16)]
    with ThreadPoolExecutor(8) as callers:
        futures = list(callers.map(lambda one: batcher.submit([TEXTS[i] for i in one[0]], one[1]), asked))
    for (rows, kind), future in zip(asked, futures, strict=True):
        vectors, tokens = future.result(30)
        assert np.allclose(vectors, expected[kind][rows], atol=1e-6)
        assert tokens.tolist() == [lengths[kind][i] for i in rows]
    batcher.close()


def test_what_waits_together_is_encoded_together_and_callers_take_turns(encoder, gate):
    seen = []
    batcher = TextBatcher(encoder, batch_tokens=1500, watch=seen.append)
    first = batcher.submit(["가"], "query")
    assert gate.entered.wait(30)
    corpus = batcher.submit(TEXTS, "passage")
    questions = [batcher.submit([text], "query") for text in ("나", "다", "라")]
    assert batcher.waiting == 43
    ended = []
    for future, name in ((corpus, "corpus"), *((question, "question") for question in questions)):
        future.add_done_callback(lambda _, name=name: ended.append(name))
    gate.opened.set()
    for future in (first, corpus, *questions):
        future.result(30)
    batcher.close()
    assert ended == ["question"] * 3 + ["corpus"]
    assert gate.batches[0] == 1 and gate.batches[1] > PIECE
    assert sum(batch.texts for batch in seen) == sum(gate.batches) == 44
    assert batcher.waiting == 0


def test_a_full_queue_refuses_and_says_when_to_come_back(encoder, gate):
    batcher = TextBatcher(encoder, max_waiting=3)
    running = batcher.submit(TEXTS[:5], "query")  # alone, more than may wait is taken too
    assert gate.entered.wait(30)
    waiting = batcher.submit(["가", "나"], "query")
    with pytest.raises(QueueFull, match="2 texts are waiting and at most 3 may") as refused:
        batcher.submit(["다", "라"], "query")
    assert 1 <= refused.value.retry_after <= 60
    last = batcher.submit(["마"], "query")
    gate.opened.set()
    assert [len(f.result(30).vectors) for f in (running, waiting, last)] == [5, 2, 1]
    batcher.close()


def test_closing_finishes_what_was_accepted_and_takes_no_more(encoder, gate):
    batcher = TextBatcher(encoder, batch_tokens=1)
    accepted = [batcher.submit([text], "query") for text in TEXTS[:5]]
    assert batcher.is_alive
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while batcher.is_alive:
        pass
    with pytest.raises(Closed):
        batcher.submit(["가"], "query")
    gate.opened.set()
    closing.join(30)
    assert all(future.done() and len(future.result().vectors) == 1 for future in accepted)


def test_a_caller_who_has_gone_frees_the_queue(encoder, gate):
    batcher = TextBatcher(encoder)
    running = batcher.submit(["가"], "query")
    assert gate.entered.wait(30)
    gone, staying = batcher.submit(TEXTS, "passage"), batcher.submit(["나"], "query")
    assert gone.cancel() and not running.cancelled()
    gate.opened.set()
    staying.result(30)
    batcher.close()
    assert sum(gate.batches) == 2 and batcher.waiting == 0


def test_a_text_that_breaks_harms_nobody_else(encoder, monkeypatch):
    plain = encoder.tokenize
    poison = {"infinite": np.nan, "failing": None}

    def encode_poisoned(ids):
        marks = [int(x[1]) for x in ids]
        if -2 in marks:
            raise RuntimeError("out of memory")
        vectors = encode(ids=[np.abs(x) for x in ids])
        vectors[[n for n, mark in enumerate(marks) if mark == -1]] = np.nan
        return vectors

    def mark(texts, kind):
        return [
            np.array([101, {"infinite": -1, "failing": -2}[text], 102]) if text in poison else plain([text], kind)[0]
            for text in texts
        ]

    encode = encoder.encode_ids
    opened = threading.Event()
    monkeypatch.setattr(encoder, "tokenize", lambda texts, kind: opened.wait(30) and mark(texts, kind))
    monkeypatch.setattr(encoder, "encode_ids", encode_poisoned)
    batcher = TextBatcher(encoder)
    good, infinite, failing = (batcher.submit(t, "query") for t in (TEXTS[:3], ["가", "infinite"], ["failing"]))
    opened.set()
    assert np.isfinite(good.result(30).vectors).all()
    with pytest.raises(FloatingPointError, match="for text 1"):
        infinite.result(30)
    with pytest.raises(RuntimeError, match="out of memory"):
        failing.result(30)
    assert batcher.submit(["나"], "query").result(30).vectors.shape == (1, 384)
    batcher.close()


def test_nothing_is_answered_with_nothing_and_bad_bounds_are_refused(encoder):
    batcher = TextBatcher(encoder)
    assert batcher.submit([], "query").result(1).vectors.shape == (0, 384)
    batcher.close()
    with pytest.raises(ValueError, match="max_waiting"):
        TextBatcher(encoder, max_waiting=0)
