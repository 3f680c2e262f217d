"""Every pair once an epoch, in an order that only seed and epoch decide; articles and passages together if asked."""

import dataclasses
import re

import numpy as np
import pytest

from koret.data.pairs import Csr, PairTable, build_pairs
from koret.training.batches import BatchMaker, TokenTable
from koret.training.preparation import measure_epoch
from koret.training.schedule import Schedule, deal_articles
from koret.training.trainer import EmbeddingTrainer


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


# ---------------------------------------------------------------- article batching


def random_table(rng, answers=False):
    """A table with what ``Schedule`` reads: articles of very different sizes, passages with 1 to 20 questions."""
    article, passage, question = [], [], []
    for a in range(int(rng.integers(1, 30))):
        for _ in range(int(rng.integers(1, 12))):
            for _ in range(int(rng.integers(1, 20)) if rng.random() < 0.5 else 1):
                article.append(a), passage.append(int(rng.integers(0, 400))), question.append(len(question))
    table = {"article": article, "targets": passage, "question": question}
    if answers:  # as ``positives: both``: every question a second time, with a target of its own
        table = {name: np.repeat(values, 2) for name, values in table.items()}
        table["targets"][1::2] = 1000 + np.arange(len(question))
    table = {name: np.asarray(values) for name, values in table.items()}
    empty = Csr.from_lists([[]] * len(table["article"]))
    names = [f.name for f in dataclasses.fields(PairTable) if f.default is dataclasses.MISSING]
    return PairTable(**{**dict.fromkeys(names), "queries": list(table["article"]), "negatives": empty, **table})


@pytest.mark.parametrize("seed", range(25))
def test_article_batches_lose_and_repeat_nothing(seed):
    rng = np.random.default_rng(seed)
    table, size = random_table(rng, answers=seed % 2 == 0), int(rng.integers(2, 70))
    for epoch in range(3):
        order = deal_articles(table, size, np.random.default_rng([seed, epoch]))
        assert sorted(order.tolist()) == list(range(len(table)))
    settings = dict(batch_size=size, epochs=3, seed=seed, accumulate=2, batching="article")
    schedule = Schedule(table, **settings)
    steps = all_steps(schedule)
    assert len(steps) == schedule.total
    assert sum(len(rows) for *_, batches in steps for rows in batches) + schedule.dropped == 3 * len(table)
    for done in {0, 1, schedule.total // 2, schedule.total}:
        assert all_steps(Schedule(table, **settings), done) == steps[done:]


def test_article_batches_keep_passages_together_and_mix_articles():
    """40 articles of 6 passages of 6 questions, about as in KorQuAD 1.0, counted batch by batch."""
    count = 40 * 6 * 6
    table = random_table(np.random.default_rng(0))
    table = dataclasses.replace(
        table, queries=[""] * count, article=np.arange(count) // 36, targets=np.arange(count) // 6,
        question=np.arange(count), negatives=Csr.from_lists([[]] * count),
    )  # fmt: skip
    for size in (16, 32, 64, 128, 256):
        batches, _ = Schedule(table, batch_size=size, epochs=1, seed=1, batching="article").cut_epoch(0)
        assert [len(rows) for rows in batches[:-1]] == [size] * ((count - 1) // size)
        for rows in batches[:-1]:
            _, per_article = np.unique(table.article[rows], return_counts=True)
            _, per_passage = np.unique(table.targets[rows], return_counts=True)
            assert len(per_article) >= 4 and per_article.max() <= size // 4
            assert len(per_passage) >= 8 and per_passage.max() <= size // 8
            assert len(per_article) < len(per_passage) < size
        encoded = sum(len(np.unique(table.targets[rows])) for rows in batches)
        assert encoded <= 240 * -(-6 // (size // 8)) + len(batches)  # once a piece, and once more where a batch ends


def test_both_pairs_of_a_question_stand_in_one_batch_but_at_a_cut(toy_data):
    both = build_pairs(toy_data, np.arange(12), "both")
    batches, _ = Schedule(both, batch_size=32, epochs=1, seed=0, batching="article").cut_epoch(0)
    together = sum(len(rows) - len(np.unique(both.question[rows])) for rows in batches)
    assert together >= len(both) / 2 - len(batches)


def test_the_order_differs_by_epoch_and_seed_and_from_a_shuffle(pairs):
    settings = dict(batch_size=8, epochs=2, seed=0, batching="article")
    schedule, again = Schedule(pairs, **settings), Schedule(pairs, **settings)
    first, second = (np.concatenate(schedule.cut_epoch(epoch)[0]).tolist() for epoch in (0, 1))
    assert first == np.concatenate(again.cut_epoch(0)[0]).tolist()
    other = Schedule(pairs, **{**settings, "seed": 1}).cut_epoch(0)[0]
    shuffled = Schedule(pairs, **{**settings, "batching": "shuffle"}).cut_epoch(0)[0]
    assert len({tuple(order) for order in (first, second, np.concatenate(other), np.concatenate(shuffled))}) == 4


def test_a_single_article_and_a_single_passage_are_dealt_too(pairs):
    one = dataclasses.replace(pairs, article=np.zeros(len(pairs), np.int64))
    assert Schedule(one, batch_size=16, epochs=1, seed=0, batching="article").total == 6
    same = with_targets(one, np.zeros(len(pairs), np.int64))
    schedule = Schedule(same, batch_size=16, epochs=1, seed=0, batching="article")
    assert schedule.total == 0 and schedule.dropped == len(pairs)


def test_an_epoch_is_measured_by_what_its_batches_hold(pairs):
    """Against ``BatchMaker``, batch by batch: tokens of the distinct texts, and how many of them are targets."""
    tokens = [np.full(2 + i % 5, i, np.int32) for i in range(len(pairs) + len(pairs.texts))]
    queries, targets = (
        TokenTable(np.concatenate(rows), np.cumsum([0, *map(len, rows)]))
        for rows in (tokens[: len(pairs)], tokens[len(pairs) :])
    )
    batches, _ = Schedule(pairs, batch_size=10, epochs=1, seed=0, batching="article").cut_epoch(0)
    made = [BatchMaker(pairs, queries, targets, mask=True).make(rows) for rows in batches]
    found = measure_epoch(pairs, queries, targets, batches)
    assert found["tokens_of_an_epoch"] == sum(len(text) for batch in made for text in batch.texts)
    assert found["different_texts"] == pytest.approx(np.mean([len(batch.targets) for batch in made]), abs=0.005)
    assert found["pairs"] == pytest.approx(len(pairs) / len(batches), abs=0.005)


def test_training_on_article_batches_says_what_a_query_chooses_among(make_config, toy_data, silent):
    trainer = EmbeddingTrainer(make_config(batching="article"), dataset=toy_data, console=silent)
    trainer.explain_plan()
    found = re.search(
        r"batches \(article\): on average ([\d.]+) pairs of ([\d.]+) articles choose among ([\d.]+)",
        silent.file.getvalue(),
    )
    pairs, articles, texts = map(float, found.groups())
    assert pairs == 8 and 4 <= articles <= 8 and 4 <= texts <= 8
    trainer.train()
    made = [trainer.job.maker.make(rows) for step in trainer.job.schedule.steps_after(0) for rows in step.batches]
    masked = sum(int(batch.known.sum()) - len(batch.rows) for batch in made)  # a pair's own target is known too
    assert masked > 0 and f"{masked:,} known positives were kept out of the negatives" in silent.file.getvalue()
