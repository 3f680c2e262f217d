"""Tokens made once and kept; every distinct text once a batch, and everybody finds theirs."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from koret.data.keys import normalize_answer, text_key
from koret.data.pairs import build_pairs
from koret.retrieval.encoder import load_encoder
from koret.training.batches import BatchMaker, TokenTable, tokenize_texts


@pytest.fixture(scope="module")
def pairs(toy_data):
    return build_pairs(toy_data, np.arange(8))


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


def test_what_only_shares_an_answer_is_spared_and_not_called_right(toy_data):
    columns = {field.name: toy_data.questions.column(field.name).to_pylist() for field in toy_data.questions.schema}
    for row in range(0, 48, 4):  # a question of every passage, answered by the same year
        columns["answers"][row], columns["answer_key"][row] = ["2011년"], text_key(normalize_answer("2011년"))
    schema = toy_data.questions.schema
    questions = pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
    table = build_pairs(dataclasses.replace(toy_data, questions=questions), np.arange(4), "passage")
    rows = np.arange(0, len(table), 4)
    tokens = fake_tokens(len(table), 1000), fake_tokens(len(table.texts), 0)
    batch = BatchMaker(table, *tokens, mask=True, several=True).make(rows)
    own = np.zeros_like(batch.known)
    own[np.arange(len(rows)), batch.positives] = True
    assert batch.known.all() and np.array_equal(batch.right, own)
    assert BatchMaker(table, *tokens, mask=True).make(rows).right is None


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
