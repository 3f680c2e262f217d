"""An index of documents: equal to brute force with the encoder, kept up to date, refused to other models."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from koret.data.sources import DataError
from koret.retrieval import index as index_module
from koret.retrieval.encoder import load_encoder
from koret.retrieval.exact import find_top_k
from koret.retrieval.index import build_index, open_index
from koret.retrieval.lexical import LexicalIndex, fuse_ranks, fuse_scores
from koret.retrieval.store import parse_condition

torch.set_num_threads(1)
TOPICS = "서울 부산 김치 한글 독도 소나무 윷놀이 한강 제주 판소리 태권도 온돌 한복 거북선 첨성대 무궁화".split()


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("offline", device="cpu", max_seq_length=64)


def write_corpus(path: Path, **changes: str) -> Path:
    records = [
        {"id": name, "title": name, "text": f"{name}은(는) 한국에서 {i + 3}번째로 이름난 것이다.", "number": i}
        for i, name in enumerate(TOPICS)
    ]
    records = [{**r, "text": changes.get(r["id"], r["text"])} for r in records if changes.get(r["id"], "x")]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return path


@pytest.fixture(scope="module")
def built(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    index = build_index(encoder, write_corpus(folder / "c.jsonl"), folder / "i", dtype="float32")
    index.close()
    return folder / "i"


def names(hits) -> list[str]:
    return [hit.entry.document for hit in hits]


QUERIES = ["김치는 어디서 이름났나", "한강", "거북선과 첨성대"]


def test_every_mode_equals_the_parts_it_is_made_of(built, encoder):
    index = open_index(built, encoder)
    entries = sorted((e for d in TOPICS for e in index.store.read_document(d)), key=lambda e: e.id)
    texts = [f"{e.heading}\n{e.text}" for e in entries]
    dense = find_top_k(encoder.encode(QUERIES, "query"), encoder.encode(texts, "passage"), len(texts))
    lexical = LexicalIndex(texts).search(QUERIES, len(texts))
    expected = {
        "dense": dense,
        "lexical": lexical,
        "hybrid": fuse_ranks([dense[0], lexical[0]], 5),
        0.3: fuse_scores(dense, lexical, 0.3, 5),
    }
    for mode, (rows, scores) in expected.items():
        weight = mode if isinstance(mode, float) else None
        found = index.search(QUERIES, 5, mode="hybrid" if weight else mode, weight=weight)
        for hits, row, score in zip(found, rows[:, :5], scores[:, :5], strict=True):
            assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
            assert [hit.score for hit in hits] == pytest.approx(score[row >= 0].tolist(), abs=1e-4)
            assert set(names(hits)[:2]) == {entries[r].document for r in row[:2] if r >= 0}


def test_hits_say_what_their_score_is_made_of(built, encoder):
    index = open_index(built, encoder)
    hit = index.search(["김치"], 1, mode="hybrid")[0][0]
    assert hit.entry.document == "김치" and set(hit.parts) == {"dense", "lexical"}
    assert hit.parts["lexical"] == pytest.approx(index.search_lexical(["김치"], 1)[0][0].score)


def test_conditions_hold_in_every_mode(built, encoder):
    index = open_index(built, encoder)
    for mode in ("dense", "lexical", "hybrid"):
        hits = index.search(["한국에서 이름난"], 20, mode=mode, where=[parse_condition("number<4")])[0]
        assert sorted(names(hits)) == sorted(TOPICS[:4])


def test_the_index_opens_with_the_model_it_names(built):
    index = open_index(built)
    assert index.info.model == "offline" and index.info.max_seq_length == 64
    assert names(index.search(["한강"], 1, mode="hybrid")[0]) == ["한강"]
    said = (built / "index.json").read_text()
    assert str(Path.home()) not in said and str(built) not in said


def test_another_model_is_refused_in_one_sentence(built, tmp_path):
    other = load_encoder("offline", device="cpu", max_seq_length=64, query_prefix="질문: ")
    with pytest.raises(ValueError, match=r"another model .* as it is now \(weights, prefixes or length\)"):
        open_index(built, other)
    with pytest.raises(ValueError, match="made with another model"):
        build_index(other, write_corpus(tmp_path / "c.jsonl"), built)


def test_a_model_directory_is_named_relative_to_the_index(encoder, tmp_path):
    encoder.save(tmp_path / "mine")
    own = load_encoder(tmp_path / "mine", device="cpu", max_seq_length=64)
    build_index(own, write_corpus(tmp_path / "c.jsonl"), tmp_path / "i").close()
    (tmp_path / "moved").mkdir()
    for name in ("mine", "i"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    info = json.loads((tmp_path / "moved" / "i" / "index.json").read_text())
    assert info["model"] == "./../mine" and info["encoder"] == "mine"
    assert names(open_index(tmp_path / "moved" / "i").search(["한강"], 1, mode="hybrid")[0]) == ["한강"]
    (tmp_path / "moved" / "mine").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="--model"):
        open_index(tmp_path / "moved" / "i").search(["한강"])
    assert open_index(tmp_path / "moved" / "i", tmp_path / "elsewhere").search(["한강"], 1)


def test_only_what_changed_is_encoded_again(encoder, tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl")
    build_index(encoder, corpus, tmp_path / "i").close()
    write_corpus(corpus, 김치="김치는 배추로 담근다.", 독도="")  # changed; gone
    with build_closing(encoder, corpus, tmp_path / "i") as index:
        report = index.report
        assert (report.added, report.changed, report.unchanged, report.encoded) == (0, 1, len(TOPICS) - 2, 1)
        assert index.count() == len(TOPICS) and report.gone == 1
        assert index.search_lexical(["배추"], 1)[0][0].entry.document == "김치"
    with build_closing(encoder, corpus, tmp_path / "i", prune=True) as index:
        assert (index.report.removed, index.report.gone) == (1, 0) and index.count() == len(TOPICS) - 1
        assert "독도" not in names(index.search(["독도"], 20)[0])


class build_closing:
    def __init__(self, *arguments, **options) -> None:
        self.index = build_index(*arguments, **options)

    def __enter__(self):
        return self.index

    def __exit__(self, *error) -> None:
        self.index.close()


def test_a_build_broken_off_goes_on_and_ends_the_same(encoder, tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "c.jsonl")
    monkeypatch.setattr(index_module, "SEGMENT", 4)
    monkeypatch.setattr(index_module.gather_segments, "__defaults__", (4,))
    with build_closing(encoder, corpus, tmp_path / "whole") as index:
        whole = sorted((e.entry.id, e.entry.version) for e in index.search(["한국"], 99)[0])
    calls = []

    def break_off(encoder, entries, progress=False):
        calls.append(len(entries))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(encoder, entries, progress)

    encode = index_module.encode_entries
    monkeypatch.setattr(index_module, "encode_entries", break_off)
    with pytest.raises(KeyboardInterrupt):
        build_index(encoder, corpus, tmp_path / "i")
    with build_closing(encoder, corpus, tmp_path / "i") as index:
        assert index.report.unchanged == 8 and index.report.added == len(TOPICS) - 8
        assert sorted((e.entry.id, e.entry.version) for e in index.search(["한국"], 99)[0]) == whole


def test_other_settings_than_the_index_has_are_refused(built, encoder, tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl")
    for settings in ({"dtype": "int8"}, {"lexical": ("kiwi",)}, {"passage_tokens": 32}):
        with pytest.raises(ValueError, match=f"made with {next(iter(settings))}"):
            build_index(encoder, corpus, built, **settings)


@pytest.mark.parametrize("tokens", [-1, 0, 15, 65, 100_000])
def test_passages_the_model_cannot_read_whole_are_refused_and_leave_nothing(encoder, tmp_path, tokens):
    corpus = write_corpus(tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match=f"between 16 and 64, the tokens of a text that the model reads, not {tokens}"):
        build_index(encoder, corpus, tmp_path / "i", passage_tokens=tokens)
    assert not (tmp_path / "i").exists()
    for fit in (16, 64):
        build_index(encoder, corpus, tmp_path / f"i{fit}", passage_tokens=fit).close()


def test_a_build_that_fails_before_anything_is_kept_fixes_no_settings(encoder, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of memory")

    corpus = write_corpus(tmp_path / "c.jsonl")
    monkeypatch.setattr(index_module.gather_segments, "__defaults__", (4,))
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="out of memory"):
        broken.setattr(index_module, "encode_entries", fail)
        build_index(encoder, corpus, tmp_path / "i", dtype="float32", lexical=())
    assert not (tmp_path / "i").exists()

    def fail_later(*arguments):
        encoded.append(1)
        return encode(*arguments) if len(encoded) == 1 else fail()

    encoded, encode = [], index_module.encode_entries
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="out of memory"):
        broken.setattr(index_module, "encode_entries", fail_later)
        build_index(encoder, corpus, tmp_path / "i", dtype="int8")
    with build_closing(encoder, corpus, tmp_path / "i") as index:  # what was kept stays
        assert (index.info.dtype, index.report.unchanged) == ("int8", 4)


def test_an_index_of_two_kinds_of_words_is_searched_by_either(encoder, tmp_path):
    records = [{"id": "a", "text": "나는 학교에 갔다"}, {"id": "b", "text": "학생이 걷는다"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    with build_closing(encoder, tmp_path / "c.jsonl", tmp_path / "i", lexical=("bigram", "kiwi")) as index:
        assert index.search(["가다"], mode="lexical") == index.search(["가다"], mode="lexical", tokenizer="bigram")
        assert names(index.search(["가다"], mode="lexical")[0]) == []  # 갔다 shares no pair of characters with it
        assert names(index.search(["가다"], mode="lexical", tokenizer="kiwi")[0]) == ["a"]
        (hits,) = index.search(["가다"], mode="hybrid", tokenizer="kiwi")
        assert [hit.entry.document for hit in hits if "lexical" in hit.parts] == ["a"]
    with build_closing(encoder, tmp_path / "c.jsonl", tmp_path / "one") as index:
        for mode in ("lexical", "hybrid"):
            with pytest.raises(ValueError, match="holds no kiwi words, only bigram"):
                index.search(["가다"], mode=mode, tokenizer="kiwi")


def test_an_index_without_words_says_so(encoder, tmp_path):
    with build_closing(encoder, write_corpus(tmp_path / "c.jsonl"), tmp_path / "i", lexical=()) as index:
        for mode in ("lexical", "hybrid"):
            with pytest.raises(ValueError, match="no lexical part"):
                index.search(["김치"], mode=mode)
        assert names(index.search(["김치"], 1)[0])


@pytest.mark.parametrize("queries", [[""], ["  \n"], ["김치", ""]])
def test_an_empty_query_is_refused(built, encoder, queries):
    for mode in ("dense", "lexical", "hybrid"):
        with pytest.raises(ValueError, match="empty"):
            open_index(built, encoder).search(queries, mode=mode)


def test_an_enormous_query_is_clipped(built, encoder):
    index = open_index(built, encoder)
    (hits,) = index.search(["김치 " * 100_000], 1, mode="hybrid")
    assert names(hits) == ["김치"]


def test_an_empty_corpus_is_an_error_and_is_explained(encoder, tmp_path):
    (tmp_path / "c.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(DataError, match="no document.*c.jsonl.*no text"):
        build_index(encoder, tmp_path / "c.jsonl", tmp_path / "i")
    assert not (tmp_path / "i").exists()  # else its settings would be fixed, though nobody chose them
    (tmp_path / "c.jsonl").write_text('{"id": "a", "text": "한라산"}\n')
    with build_closing(encoder, tmp_path / "c.jsonl", tmp_path / "i", dtype="int8") as index:
        assert index.count() == 1
    (tmp_path / "c.jsonl").write_text('{"id": "b"}\n')
    with pytest.raises(DataError, match="no document"):
        build_index(encoder, tmp_path / "c.jsonl", tmp_path / "i")
    assert open_index(tmp_path / "i", encoder).count() == 1  # one that was there stays


def test_long_texts_are_cut_and_counted(encoder, tmp_path):
    (tmp_path / "long.txt").write_text("아주 긴 글이 이어진다. " * 200)
    with build_closing(encoder, tmp_path / "long.txt", tmp_path / "i") as index:
        assert index.report.cut_texts == 1 and index.count() == index.report.encoded > 10


def test_many_threads_get_the_answers_of_one(built, encoder):
    index = open_index(built, encoder)
    expected = {q: names(index.search([q], 5, mode="hybrid")[0]) for q in TOPICS}
    wrong = []

    def ask(queries) -> None:
        wrong.extend(q for q in queries if names(index.search([q], 5, mode="hybrid")[0]) != expected[q])

    threads = [threading.Thread(target=ask, args=(TOPICS[i:] + TOPICS[:i],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_learned_weight_is_used(encoder, tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl")
    with build_closing(encoder, corpus, tmp_path / "i", hybrid_weight=1.0) as index:
        hits = index.search(["김치"], 5, mode="hybrid")[0]
        assert names(hits) == names(index.search(["김치"], 5, mode="dense")[0])
        assert np.isclose(hits[0].score, 1.0)
