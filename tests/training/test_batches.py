"""Every pair once an epoch, in an order that only seed and epoch decide; every distinct text once a batch."""

import dataclasses

import numpy as np
import pytest

from koret.data.pairs import Csr, build_pairs
from koret.retrieval.encoder import load_encoder
from koret.training.batches import BatchMaker, Schedule, TokenTable, tokenize_texts


@pytest.fixture(scope="module")
def pairs(toy_data):
    return build_pairs(toy_data, np.arange(8))


def all_steps(schedule, after=0):
    return [(s.number, s.epoch, s.ends_epoch, [b.tolist() for b in s.batches]) for s in schedule.steps_after(after)]


def test_every_pair_is_used_once_an_epoch(pairs):
    schedule = Schedule(pairs, batch_size=7, epochs=3, seed=5)
    steps = list(schedule.steps_after(0))
    for epoch in range(3):
        rows = np.concatenate([b for s in steps if s.epoch == epoch for b in s.batches])
        assert sorted(rows) == list(range(len(pairs)))
    assert [s.number for s in steps] == list(range(1, schedule.total + 1))
    assert sum(s.ends_epoch for s in steps) == 3
    assert all_steps(schedule) == all_steps(Schedule(pairs, batch_size=7, epochs=3, seed=5))
    assert all_steps(schedule) != all_steps(Schedule(pairs, batch_size=7, epochs=3, seed=6))
    orders = [np.concatenate([b for s in steps if s.epoch == e for b in s.batches]).tolist() for e in range(3)]
    assert orders[0] != orders[1] != orders[2]


def test_going_on_after_any_step_gives_the_rest(pairs):
    schedule = Schedule(pairs, batch_size=8, epochs=2, seed=1, accumulate=3, max_steps=7)
    steps = all_steps(schedule)
    assert len(steps) == schedule.total == 7
    for done in range(8):
        assert all_steps(schedule, done) == steps[done:]


def test_accumulated_batches_make_one_step(pairs):
    plain, summed = (Schedule(pairs, batch_size=10, epochs=1, seed=1, accumulate=n) for n in (1, 4))
    batches = [b.tolist() for s in plain.steps_after(0) for b in s.batches]
    assert [b.tolist() for s in summed.steps_after(0) for b in s.batches] == batches
    assert summed.total == -(-len(batches) // 4)


def with_targets(pairs, targets):
    return dataclasses.replace(pairs, targets=np.asarray(targets))


def test_a_last_batch_with_one_target_is_dropped_and_counted_a_usable_one_kept(pairs):
    many = len(pairs)  # 96: batches of 5 leave a last one of a single pair
    schedule = Schedule(pairs, batch_size=5, epochs=2, seed=0)
    assert many % 5 == 1 and schedule.dropped == 2
    assert schedule.total == 2 * (many // 5)
    schedule = Schedule(pairs, batch_size=20, epochs=1, seed=0)  # a last one of 16
    assert schedule.dropped == 0 and len(list(schedule.steps_after(0))[-1].batches[0]) == 16


def test_batches_whose_positives_are_all_the_same_are_dropped(pairs):
    same = with_targets(pairs, np.zeros(len(pairs), dtype=np.int64))
    schedule = Schedule(same, batch_size=8, epochs=1, seed=0)
    assert schedule.total == 0 and schedule.dropped == len(pairs)
    curated = [[3]] + [[] for _ in range(len(pairs) - 1)]
    schedule = Schedule(dataclasses.replace(same, negatives=Csr.from_lists(curated)), batch_size=8, epochs=1, seed=0)
    assert schedule.total == 1  # a curated negative is a negative


def test_epochs_done(pairs):
    schedule = Schedule(pairs, batch_size=8, epochs=2, seed=0)  # 12 steps an epoch
    assert [schedule.epochs_done(n) for n in (0, 6, 12, 18, 24)] == [0.0, 0.5, 1.0, 1.5, 2.0]


def fake_tokens(count, start):
    rows = [np.full(1 + i % 3, start + i, np.int32) for i in range(count)]
    return TokenTable(np.concatenate(rows), np.cumsum([0, *map(len, rows)]))


def test_identical_texts_are_encoded_once_and_everybody_finds_theirs(pairs):
    asked = ["같은 질문" if i % 4 == 0 else query for i, query in enumerate(pairs.queries)]
    repeated = dataclasses.replace(pairs, queries=asked)
    queries, targets = fake_tokens(len(pairs), 1000), fake_tokens(len(pairs.texts), 0)
    rows = np.array([0, 4, 8, 1, 2, 50])
    batch = BatchMaker(repeated, queries, targets, mask=True).make(rows)
    assert len(set(batch.queries[:3])) == 1 and len(set(batch.queries)) == 4
    assert len(batch.targets) == len(set(pairs.targets[rows]))
    for i, row in enumerate(rows):
        target = batch.texts[batch.targets[batch.positives[i]]]
        assert target.tolist() == targets[pairs.targets[row]].tolist()
        if i >= 3:
            assert batch.texts[batch.queries[i]].tolist() == queries[row].tolist()
    assert batch.known[np.arange(6), batch.positives].all()
    assert BatchMaker(repeated, queries, targets, mask=False).make(rows).known is None


def test_both_positives_of_a_question_never_serve_as_its_negatives(toy_data):
    both = build_pairs(toy_data, np.arange(8), "both")
    maker = BatchMaker(both, fake_tokens(len(both), 1000), fake_tokens(len(both.texts), 0), mask=True)
    batch = maker.make(np.arange(8))
    for i in range(8):
        siblings = both.question[batch.rows] == both.question[batch.rows[i]]
        assert siblings.sum() == 2
        assert batch.known[i, batch.positives[siblings]].all()
    assert batch.has_negatives


def test_a_batch_whose_every_negative_is_known_has_none(pairs):
    rows = np.flatnonzero(pairs.targets == pairs.targets[0])
    maker = BatchMaker(pairs, fake_tokens(len(pairs), 1000), fake_tokens(len(pairs.texts), 0), mask=True)
    assert not maker.make(rows).has_negatives and maker.make(np.arange(len(pairs))).has_negatives


def test_tokens_are_made_once_and_kept(tiny_model, pairs, tmp_path, monkeypatch):
    encoder = load_encoder(tiny_model, max_seq_length=32)
    table = tokenize_texts(encoder, pairs.queries, "query", tmp_path)
    for i, ids in enumerate(encoder.tokenize(pairs.queries, "query")):
        assert table[i].tolist() == ids.tolist()
    assert table.lengths.sum() == len(table.ids) and len(list(tmp_path.iterdir())) == 1

    monkeypatch.setattr(encoder, "tokenize", lambda *_: pytest.fail("tokenised again"))
    again = tokenize_texts(encoder, pairs.queries, "query", tmp_path)
    assert np.array_equal(again.ids, table.ids) and np.array_equal(again.offsets, table.offsets)
    monkeypatch.undo()

    others = [
        tokenize_texts(encoder, pairs.queries, "passage", tmp_path),
        tokenize_texts(encoder, pairs.queries[:-1], "query", tmp_path),
        tokenize_texts(load_encoder(tiny_model, max_seq_length=8), pairs.queries, "query", tmp_path),
    ]
    assert len(list(tmp_path.iterdir())) == 4 and max(others[2].lengths) == 8


def test_a_damaged_token_cache_is_made_again(tiny_model, pairs, tmp_path):
    encoder = load_encoder(tiny_model, max_seq_length=32)
    table = tokenize_texts(encoder, pairs.queries, "query", tmp_path)
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:100])
    assert np.array_equal(tokenize_texts(encoder, pairs.queries, "query", tmp_path).ids, table.ids)
