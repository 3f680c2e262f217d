"""Search by words in Milvus against the folder index: the same passages, order and scores, to the last bit."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from koret import cli
from koret.retrieval import milvus_words
from koret.retrieval.folder import FolderStore
from koret.retrieval.index import Index, build_index, open_index
from koret.retrieval.milvus import INFO, MilvusStore
from koret.retrieval.milvus_words import CAPACITY
from koret.retrieval.store import Condition, Entry, Found

pytest.importorskip("milvus_lite")

SIZE = 8
BOTH = {"dtype": "float16", "lexical": ["bigram", "kiwi"]}
PAIRS = {"dtype": "float16", "lexical": ["bigram"]}
NOUNS = "한강 서울 김치 한글 독도 도서관 박물관 대학교 기차역 바다 산길 시장 임금 장군 학자".split()
VERBS = "흐른다 세웠다 만들었다 보았다 지켰다 썼다 팔았다".split()
QUERIES = [
    "한강은 어디로 흐르나",
    "김치 김치 김치를 만들었다",
    "서울 대학교 도서관",
    "임금",
    "없는말 zzz",
    "?!",
    "산길 시장 xyz",
]


def make_corpus(documents: int, seed: int = 0, version: str = "1", words: int = 12) -> list[Entry]:
    """Documents of one to three passages of uneven length; some equal, some without a word, one in five headed."""
    rng = np.random.default_rng(seed)
    entries = []
    for i in range(documents):
        for part in range(1, int(rng.integers(1, 4)) + 1):
            chosen = np.minimum(rng.zipf(1.4, int(rng.integers(1, words))), len(NOUNS)) - 1
            text = " ".join(f"{NOUNS[n]}{'은를의에'[rng.integers(4)]} {VERBS[rng.integers(7)]}" for n in chosen)
            text = ("임금은 서울을 보았다", "… !", text, text, text)[rng.integers(5)]
            heading = NOUNS[i % 15] if i % 5 == 0 else ""
            entries.append(Entry(f"문서{i}#{part}", f"문서{i}", heading, text, version, {"year": int(rng.integers(5))}))
    return entries


def make_vectors(count: int) -> np.ndarray:
    vectors = np.random.default_rng(count).standard_normal((count, SIZE)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def add(stores: Sequence[MilvusStore | FolderStore], entries: Sequence[Entry]) -> None:
    for store in stores:
        store.add(entries, make_vectors(len(entries)))


def assert_same(
    theirs: MilvusStore, ours: FolderStore, queries: Sequence[str] = QUERIES, depths: Sequence[int] = (3, 1000)
) -> list[Found]:
    """Equal entries and equal floats; the deepest results."""
    for tokenizer in theirs.info["lexical"]:
        for k in depths:
            for where in ((), [Condition("year", ">=", 2)], [Condition("document", "!=", "문서3")]):
                found = theirs.search_lexical(queries, k, where, tokenizer)
                assert found == ours.search_lexical(queries, k, where, tokenizer), (tokenizer, k, where)
    return theirs.search_lexical(queries, max(depths))


def test_scores_what_the_folder_scores(url: str, tmp_path: Path) -> None:
    stores = theirs, ours = MilvusStore.create(url, BOTH, SIZE), FolderStore.create(tmp_path / "i", BOTH, SIZE)
    assert theirs.search_lexical(QUERIES, 3) == [[]] * len(QUERIES)
    add(stores, make_corpus(60))
    found = assert_same(theirs, ours)
    scores = [score for _, score in found[3]]
    assert len(scores) > 20 and len(set(scores)) < len(scores)  # ties were among them
    assert found[4] == found[5] == [] and found[0]
    assert theirs.search_lexical(QUERIES, 3) == theirs.search_lexical(QUERIES, 3, tokenizer="bigram")
    add(stores, make_corpus(40, seed=1, version="2"))  # replaces two thirds
    assert_same(theirs, ours)
    for store in stores:
        store.delete([f"문서{i}" for i in range(20, 55)])
    assert_same(theirs, ours)
    theirs.close()
    reopened = MilvusStore.open(url)
    assert_same(reopened, ours)
    for store in (reopened, ours):
        store.delete([f"문서{i}" for i in range(60)])
        assert store.search_lexical(QUERIES, 3) == [[]] * len(QUERIES)


def test_counting_word_by_word_is_the_same(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = theirs, ours = MilvusStore.create(url, PAIRS, SIZE), FolderStore.create(tmp_path / "i", PAIRS, SIZE)
    monkeypatch.setattr(milvus_words, "WHOLE", 0)
    theirs._connection.is_lite = False  # as a server is asked
    call, asked = theirs._connection.call, []
    monkeypatch.setattr(
        theirs._connection, "call", lambda name, **kw: asked.append(kw.get("filter")) or call(name, **kw)
    )
    add(stores, make_corpus(30))
    assert_same(theirs, ours)
    counts = [text for text in asked if text and text.startswith("array_contains")]
    assert len(counts) > 30 and len(set(counts)) == len(counts)  # remembered
    add(stores, make_corpus(5, seed=3))
    assert_same(theirs, ours)


def test_goes_as_deep_as_a_changed_mean_length_asks(url: str, tmp_path: Path) -> None:
    """The first passages are short, the rest are long: by the weights made then, 100 short ones come first."""
    stores = theirs, ours = MilvusStore.create(url, PAIRS, SIZE), FolderStore.create(tmp_path / "i", PAIRS, SIZE)
    short = [Entry(f"s{i:03d}#1", f"s{i:03d}", "", "독도 나라 마을", "1") for i in range(100)]
    filler = " ".join(NOUNS[n] for n in np.random.default_rng(0).integers(5, 15, 150))
    long = [Entry(f"l{i:03d}#1", f"l{i:03d}", "", filler, "1") for i in range(200)]
    best = Entry("z#1", "z", "", f"{filler} {'독도 ' * 12}", "1")
    add(stores, short)
    add(stores, [*long, best])
    (found,) = theirs.search_lexical(["독도"], 5)
    assert found[0][0] == best and len(found) == 5
    assert found == ours.search_lexical(["독도"], 5)[0]
    assert_same(theirs, ours, ["독도 나라", "도서관 독도"])


def test_orders_ties_by_id_however_many(url: str) -> None:
    store = MilvusStore.create(url, PAIRS, SIZE)
    entries = [Entry(f"{i}#1", f"{i}", "", "같은 글", "1") for i in range(150)]
    add([store], entries)
    (found,) = store.search_lexical(["같은"], 5)
    assert [entry.id for entry, _ in found] == sorted(entry.id for entry in entries)[:5]


def test_many_threads_get_their_own_answers(url: str) -> None:
    store = MilvusStore.create(url, PAIRS, SIZE)
    add([store], make_corpus(40))
    expected = store.search_lexical(QUERIES, 9)
    fresh = MilvusStore.open(url)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: fresh.search_lexical(QUERIES[i % 7 :], 9), range(28)))
    assert answers == [expected[i % 7 :] for i in range(28)]


def test_calls_to_an_embedded_engine_take_turns(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loses sight of passages, and may lose those written, while another thread makes it seal what was written."""
    from pymilvus import MilvusClient

    store = MilvusStore.create(url, PAIRS, SIZE)
    add([store], make_corpus(20))
    reader = MilvusStore.open(url)
    running: list[str] = []
    together: set[tuple[str, ...]] = set()
    done: set[str] = set()

    def watch(name: str) -> None:
        real = getattr(MilvusClient, name)

        def watched(self: MilvusClient, *arguments: object, **options: object) -> object:
            running.append(name)
            together.add(tuple(running))
            time.sleep(0.005)
            result = real(self, *arguments, **options)
            running.remove(name)
            done.add(name)
            return result

        monkeypatch.setattr(MilvusClient, name, watched)

    for name in ("upsert", "delete", "search", "query", "get", "flush"):
        watch(name)

    def work(i: int) -> None:
        if i % 3:
            reader.search_lexical(QUERIES, 9)
            store.search(make_vectors(1), 3)
        else:
            add([store], make_corpus(20, seed=i, version=f"{i}"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(12)))
    assert done == {"upsert", "delete", "search", "query", "get", "flush"}
    assert {len(names) for names in together} == {1}


def test_every_store_sees_what_another_wrote(url: str, tmp_path: Path) -> None:
    theirs, ours = MilvusStore.create(url, PAIRS, SIZE), FolderStore.create(tmp_path / "i", PAIRS, SIZE)
    reader = MilvusStore.open(url)
    for seed in range(3):
        add([theirs, ours], make_corpus(10 + 5 * seed, seed=seed, version=str(seed), words=4 + 20 * seed))
        assert_same(reader, ours)
    for store in (reader, ours):
        store.delete(["문서1", "문서2"])
    assert_same(theirs, ours)


def test_a_writer_that_dies_leaves_true_statistics(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = theirs, ours = MilvusStore.create(url, PAIRS, SIZE), FolderStore.create(tmp_path / "i", PAIRS, SIZE)
    reader = MilvusStore.open(url)
    old = [Entry(f"문서90#{i}", "문서90", "", f"서울 바다 임금 {i}", "1") for i in range(1, 5)]
    new = [Entry(f"문서90#{i}", "문서90", "", "한강 김치", "2") for i in range(1, 3)]
    add(stores, [*make_corpus(10), *old])
    assert_same(reader, ours)
    monkeypatch.setattr("koret.retrieval.milvus.ROWS", 1)
    call = theirs._connection.call

    def break_off(name: str, **options: object) -> object:
        if name == "delete":
            raise KeyboardInterrupt
        if name == "upsert":
            reader.search_lexical(QUERIES, 3)  # what is counted now is not believed for long
        return call(name, **options)

    monkeypatch.setattr(theirs._connection, "call", break_off)
    with pytest.raises(KeyboardInterrupt):
        add([theirs], new)
    monkeypatch.setattr(theirs._connection, "call", call)
    monkeypatch.setattr(milvus_words, "SETTLE", 0.0)
    add([ours], [*new, *old[2:]])  # what is there: the new passages, and what is left of the old ones
    assert_same(theirs, ours)
    assert_same(reader, ours)
    add(stores, new)
    assert_same(theirs, ours)
    assert_same(reader, ours)


def test_refuses_in_words(url: str) -> None:
    store = MilvusStore.create(url, PAIRS, SIZE)
    many = " ".join(chr(0xAC00 + i) for i in range(CAPACITY))
    with pytest.raises(
        ValueError, match=r"'b#1' has 4,096 different words \(bigram\).*--passage-tokens.*--lexical none"
    ):
        add([store], [Entry("a#1", "a", "", "짧은 글", "1"), Entry("b#1", "b", "", many, "1")])
    assert store.count() == 0
    add([store], [Entry("b#1", "b", "", many[: 2 * (CAPACITY - milvus_words.BITS)], "1")])
    assert len(store.search_lexical([many], 3)[0]) == 1
    with pytest.raises(ValueError, match="without kiwi lexical part"):
        store.search_lexical(["글"], 3, tokenizer="kiwi")
    for k in (0, 16_385):
        with pytest.raises(ValueError, match="k must"):
            store.search_lexical(["글"], k)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 9])
def test_words_are_added_up_in_pieces(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus_words, "TOGETHER", 3)
    lists = [list(range(i % 4, i % 4 + i)) for i in range(size)]
    rows, terms, counts = milvus_words._add_up(iter(lists))
    expected = Counter(term for own in lists for term in own)
    assert rows == size and dict(zip(terms.tolist(), counts.tolist(), strict=True)) == expected
    assert terms.tolist() == sorted(expected)


# ---- through the index and the command line


def test_a_document_the_engine_cannot_hold_is_listed_and_the_others_are_kept(database: str, tmp_path: Path) -> None:
    place = f"{database}?collection=unfit"
    records = [{"id": f"d{i}", "text": f"{NOUNS[i]}이 있다"} for i in range(5)]
    records[1]["note"] = "가" * 20_000  # fits: 60,000 bytes as UTF-8
    records[2]["note"] = "가" * 30_000
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(own, ensure_ascii=False) + "\n" for own in records))
    index = build_index("offline", tmp_path / "c.jsonl", place)
    assert index.count() == 4 and index.report.added == 4
    (lost,) = index.report.rejects
    assert lost.id == "d2" and "Milvus holds at most 65,535" in lost.reason
    index.close()


def write_corpus(path: Path, count: int = 24) -> Path:
    records = [
        {"id": f"d{i}", "title": NOUNS[i % 15], "text": f"{NOUNS[i % 7]}은 {VERBS[i % 7]}. {NOUNS[i % 4]} {i}", "n": i}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def test_old_collections_have_no_lexical_part(database: str, tmp_path: Path) -> None:
    """They say that they have one, for an index said so before a collection could."""
    url = f"{database}?collection=old"
    corpus = write_corpus(tmp_path / "c.jsonl")
    built = build_index("offline", corpus, url, lexical=())
    store = built.store
    old = json.dumps({**store.info, "lexical": ["bigram"]}, ensure_ascii=False)
    store._connection.call("alter_collection_properties", properties={INFO: old})
    built.close()
    index = open_index(url, built.encoder)
    assert not index.has_words and len(index.search(["한강"], 3)[0]) == 3
    for mode in ("lexical", "hybrid"):
        with pytest.raises(ValueError, match="has no lexical part.*--lexical"):
            index.search(["한강"], 3, mode=mode)
    index.close()
    with pytest.raises(ValueError, match="was made with lexical"):
        build_index(built.encoder, corpus, url, lexical=("bigram",))
    again = build_index(built.encoder, write_corpus(corpus, 30), url)
    assert (again.count(), again.report.added) == (30, 6)
    again.close()


def test_command_line_fuses_as_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl")
    places = [f"milvus:{tmp_path}/x.db", f"{tmp_path}/folder"]
    for place in places:
        command = ["index", "offline", str(corpus), "--out", place, "--lexical", "both", "--dtype", "float32"]
        assert cli.main(command) == 0
        assert "bigram and kiwi words" in capsys.readouterr().out
    for more in (["--mode", "lexical"], ["--weight", "0.3", "--where", "n>=9"]):
        found = []
        for place in places:
            assert cli.main(["search", place, "한강은 서울에 흐른다", "--json", "--top-k", "8", *more]) == 0
            found.append(json.loads(capsys.readouterr().out))
        assert len(found[0]) == 8 and found[0][0]["scores"]
        for theirs, ours in zip(*found, strict=True):
            assert theirs["id"] == ours["id"] and theirs["scores"].keys() == ours["scores"].keys()
            assert theirs["score"] == pytest.approx(ours["score"], abs=1e-6)  # dense scores agree to that
            assert theirs["scores"].get("lexical") == ours["scores"].get("lexical")


def test_the_index_keeps_its_weight(database: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl")
    url = f"{database}?collection=weighted"
    settings = {"hybrid_weight": 0.25, "dtype": "float32"}
    with_url = build_index("offline", corpus, url, **settings)
    folder = build_index(with_url.encoder, corpus, tmp_path / "i", **settings)
    with_url.close()
    opened: Index = open_index(url, folder.encoder)
    assert opened.info.hybrid_weight == 0.25 and opened.has_words
    found, expected, other = (
        {hit.entry.id: hit.score for hit in index.search(["김치 시장"], 10, mode="hybrid", weight=weight)[0]}
        for index, weight in ((opened, None), (folder, 0.25), (folder, 0.9))
    )
    assert list(found) == list(expected) and found == pytest.approx(expected, abs=1e-6)
    assert found != pytest.approx(other, abs=1e-3)


def test_the_page_has_its_columns_from_the_collection(database: str, tmp_path: Path) -> None:
    pytest.importorskip("starlette")
    from koret.web.opening import open_page

    url = f"{database}?collection=page"
    built = build_index("offline", write_corpus(tmp_path / "c.jsonl"), url)
    expected = [hit.entry.id for hit in built.search(["한강에 세웠다"], 3, mode="lexical")[0]]
    built.close()
    page = open_page(indexes=[url])
    answer = asyncio.run(page.desk.search("한강에 세웠다", ["m0", "bm25", "hybrid"], 3))
    shown = {key: passage["id"] for key, passage in answer["passages"].items()}
    hits = {column["id"]: [shown[hit["passage"]] for hit in column["hits"]] for column in answer["columns"]}
    assert hits["bm25"] == expected and len(hits["m0"]) == len(hits["hybrid"]) == 3
    page.close()
