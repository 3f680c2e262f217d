"""The folder index: equal to brute force, incremental, and whole whenever its writer is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from koret.retrieval import compaction
from koret.retrieval import folder as folder_module
from koret.retrieval import segment as segment_module
from koret.retrieval.folder import Damaged, FolderStore
from koret.retrieval.lexical import LexicalIndex
from koret.retrieval.store import Entry, parse_condition

DIMENSIONS = 16
WORDS = "한국어 문장을 찾는 색인 서울 부산 김치 학교 나무 바다 하늘 역사 음악 영화 과학 수학".split()


def make_entries(documents: int, passages: int = 3, version: str = "1", first: int = 0, seed: int = 0) -> list[Entry]:
    rng = np.random.default_rng([seed, int(version)])
    return [
        Entry(
            f"문서{d}#{p}", f"문서{d}", f"제목{d} > 절{p}", " ".join(rng.choice(WORDS, 12)), version,
            {"year": 1990 + d % 20, "kind": "짝" if d % 2 else "홀", "open": d % 3 == 0},
        )
        for d in range(first, first + documents)
        for p in range(1, passages + 1)
    ]  # fmt: skip


def make_vectors(count: int, seed: int = 0, dimensions: int = DIMENSIONS) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, dimensions)) + 1.5  # crowded, as embeddings are
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def make_store(path: Path, dtype: str = "float32", lexical: tuple[str, ...] = ()) -> FolderStore:
    return FolderStore.create(path, {"dtype": dtype, "lexical": list(lexical)}, DIMENSIONS)


def rank_brutally(entries, vectors, query, k, accept=lambda entry: True):
    scored = [
        (-float(np.dot(query.astype(np.float64), v.astype(np.float64))), e.id)
        for e, v in zip(entries, vectors, strict=True)
        if accept(e)
    ]
    return [name for _, name in sorted(scored)[:k]]


def ids(found) -> list[str]:
    return [entry.id for entry, _ in found]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("wide", [True, False])
def test_search_equals_brute_force(tmp_path, dtype, wide, monkeypatch):
    if not wide:
        monkeypatch.setattr(folder_module, "WIDE_BYTES", 0)
    entries, vectors = make_entries(400), make_vectors(1200)
    store = make_store(tmp_path / "i", dtype)
    for start in range(0, 1200, 300):
        store.add(entries[start : start + 300], vectors[start : start + 300])
    kept = vectors if dtype == "float32" else vectors.astype(np.float16)
    queries = make_vectors(20, seed=1)
    for query, found in zip(queries, store.search(queries, 25), strict=True):
        assert ids(found) == rank_brutally(entries, kept, query, 25)
        by_id = {e.id: v for e, v in zip(entries, kept, strict=True)}
        assert [s for _, s in found] == pytest.approx([float(query @ by_id[e.id].astype(np.float32)) for e, _ in found])


def test_equal_scores_are_ordered_by_id_across_segments(tmp_path):
    entries = make_entries(60, 1)
    vectors = np.tile(make_vectors(1), (60, 1))
    store = make_store(tmp_path / "i")
    for start in (40, 0, 20):
        store.add(entries[start : start + 20], vectors[start : start + 20])
    assert ids(store.search(vectors[:1], 30)[0]) == sorted(e.id for e in entries)[:30]


@pytest.mark.parametrize(
    ("text", "accept"),
    [
        ("year>=2005", lambda e: e.metadata["year"] >= 2005),
        ("kind=짝", lambda e: e.metadata["kind"] == "짝"),
        ("open!=true", lambda e: not e.metadata["open"]),
        ("document=문서7", lambda e: e.document == "문서7"),
        ("heading=제목3 > 절2", lambda e: e.heading == "제목3 > 절2"),
        ("unknown=1", lambda e: False),
    ],
)
def test_filters_are_exact(tmp_path, text, accept):
    entries, vectors = make_entries(100), make_vectors(300)
    store = make_store(tmp_path / "i", "int8", ("bigram",))
    store.add(entries[:150], vectors[:150])
    store.add(entries[150:], vectors[150:])
    store.delete(["문서7"] if "document" not in text else ["문서8"])
    gone = {"문서7"} if "document" not in text else {"문서8"}
    (query,) = make_vectors(1, seed=2)
    where = [parse_condition(text)]
    found = store.search(query[None], 40, where)[0]
    kept = vectors.astype(np.float16)
    assert ids(found) == rank_brutally(entries, kept, query, 40, lambda e: accept(e) and e.document not in gone)
    assert all(accept(entry) for entry, _ in store.search_lexical(["서울 김치 바다"], 300, where)[0])


def test_documents_are_replaced_deleted_and_found_again_after_opening(tmp_path):
    store = make_store(tmp_path / "i")
    store.add(make_entries(10), make_vectors(30))
    assert store.find_versions(["문서3", "없는 문서"]) == ["1", None]
    store.add(make_entries(1, 2, version="2", first=3), make_vectors(2, seed=5))  # shorter than it was
    assert store.delete(["문서0", "없는 문서"]) == 3
    store.close()
    store = FolderStore.open(tmp_path / "i")
    assert store.count() == 30 - 3 + 2 - 3
    assert store.find_versions(["문서0", "문서3", "문서4"]) == [None, "2", "1"]
    assert sorted(store.list_documents()) == sorted(f"문서{d}" for d in range(1, 10))
    assert [e.id for e in store.read_document("문서3")] == ["문서3#1", "문서3#2"]
    assert store.delete(["없는 문서"]) == 0


def test_files_of_others_harm_nobody(tmp_path):
    store = make_store(tmp_path / "i")
    store.add(make_entries(3), make_vectors(9))
    store.close()
    (tmp_path / "i" / "segments" / ".DS_Store").write_bytes(b"desktop")
    (next((tmp_path / "i" / "segments").glob("0*")) / "thumbnails").mkdir()
    store = FolderStore.open(tmp_path / "i")
    store.add(make_entries(3, first=3), make_vectors(9, seed=1))
    assert store.count() == 18
    assert (tmp_path / "i" / "segments" / ".DS_Store").exists()


def test_compaction_changes_no_result_and_keeps_segments_few(tmp_path):
    store = make_store(tmp_path / "i", "float16", ("bigram",))
    entries, vectors = make_entries(60), make_vectors(180)
    for start in range(0, 180, 3):
        store.add(entries[start : start + 3], vectors[start : start + 3])
    assert len(list((tmp_path / "i" / "segments").iterdir())) <= compaction.MANY + 1
    store.delete([f"문서{d}" for d in range(0, 60, 3)])
    queries = make_vectors(5, seed=3)
    before = store.search(queries, 20), store.search_lexical(["서울 바다", "수학"], 50)
    store.compact()
    assert len(list((tmp_path / "i" / "segments").iterdir())) == 1
    after = store.search(queries, 20), store.search_lexical(["서울 바다", "수학"], 50)
    assert before == after
    assert after == (FolderStore.open(tmp_path / "i").search(queries, 20), after[1])
    assert store.count() == 120


@pytest.mark.parametrize(
    "records, everything, merged",
    [
        ([(9, None)] * 8, False, []),  # few small ones stay
        ([(9, None)] * 8, True, range(8)),
        ([(9, None)] * 9, False, range(9)),
        ([(9, None)] * 5 + [(20_000, None)] + [(9, None)] * 4, False, [0, 1, 2, 3, 4, 6, 7, 8, 9]),
        ([(16_000, None)] * 9, False, [0, 1]),  # no more than 32,768 passages at a time
        ([(9, None)], True, []),
        ([(9, 8)], True, [0]),  # nothing to join it with, but something to forget
        ([(65, 33), (20_000, None)], False, []),
        ([(65, 32), (20_000, None)], False, [0]),  # mostly deleted
        ([(64, 1)], False, []),  # too small to matter
        ([(40_000, 100)], False, [0]),
        ([(40_000, 30_000)], True, []),
    ],
)
def test_segments_are_chosen_for_merging_by_their_size_and_what_lives_in_them(records, everything, merged):
    """Pairs of passages and of those that are not deleted, None: none is."""
    named = [
        {"name": str(i), "rows": rows, "deleted": None}
        | ({} if live is None else {"deleted": ["x", "y"], "live": live})
        for i, (rows, live) in enumerate(records)
    ]
    chosen = compaction.choose_segments(named, everything)
    assert [int(record["name"]) for record in chosen] == list(merged)


@pytest.mark.parametrize("tokenizer", ["bigram", "kiwi"])
def test_lexical_scores_are_those_of_the_index_in_memory(tmp_path, tokenizer):
    store = make_store(tmp_path / "i", "float16", (tokenizer,))
    entries, vectors = make_entries(90), make_vectors(270)
    for start in range(0, 270, 90):
        store.add(entries[start : start + 90], vectors[start : start + 90])
    store.delete([f"문서{d}" for d in range(0, 90, 4)])
    for _ in range(2):
        live = sorted((e for e in entries if int(e.document[2:]) % 4), key=lambda e: e.id)
        reference = LexicalIndex([f"{e.heading}\n{e.text}" for e in live], tokenizer)
        queries = ["서울에서 김치를", "역사 역사 과학 제목5", "zzz", "바다"]
        rows, scores = reference.search(queries, 30)
        for found, row, score in zip(store.search_lexical(queries, 30), rows, scores, strict=True):
            row, score = row[row >= 0], score[row >= 0]
            assert [s for _, s in found] == pytest.approx(score.tolist(), rel=1e-5)
            own = dict(zip((live[r].id for r in row), score, strict=True))
            above = [e.id for e, s in found if s > score[-1] * (1 + 1e-5)] if len(score) else []
            assert set(above) <= set(own)
        store.compact()


def test_a_store_without_words_says_so(tmp_path):
    store = make_store(tmp_path / "i")
    store.add(make_entries(2), make_vectors(6))
    with pytest.raises(ValueError, match="lexical"):
        store.search_lexical(["서울"], 3)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (make_vectors(5), "do not fit"),
        (make_vectors(6) * 2, "unit length"),
        (np.full((6, DIMENSIONS), np.nan), "finite"),
    ],
)
def test_unusable_vectors_are_refused(tmp_path, vectors, message):
    store = make_store(tmp_path / "i")
    with pytest.raises(ValueError, match=message):
        store.add(make_entries(2), vectors)
    assert store.count() == 0


def test_two_writers_are_refused_and_readers_see_the_old_state(tmp_path):
    writer = make_store(tmp_path / "i")
    writer.add(make_entries(5), make_vectors(15))
    reader, other = FolderStore.open(tmp_path / "i"), FolderStore.open(tmp_path / "i")
    with pytest.raises(RuntimeError, match="another process is writing"):
        other.add(make_entries(1, first=9), make_vectors(3))
    writer.add(make_entries(5, version="2"), make_vectors(15, seed=9))
    writer.compact()
    query = make_vectors(1, seed=4)
    assert {e.version for e, _ in reader.search(query, 15)[0]} == {"1"}
    writer.close()
    other.add(make_entries(1, first=9), make_vectors(3))  # sees what the first wrote meanwhile
    assert other.count() == 18
    assert {e.version for e, _ in other.search(query, 15)[0]} == {"1", "2"}


def test_searching_from_many_threads_while_writing(tmp_path):
    store = make_store(tmp_path / "i", "float16", ("bigram",))
    entries, vectors = make_entries(200), make_vectors(600)
    store.add(entries, vectors)
    queries = make_vectors(8, seed=6)
    expected = [ids(found) for found in store.search(queries, 5, [parse_condition("year<3000")])]
    wrong: list[object] = []

    def search() -> None:
        for i in list(range(8)) * 5:
            found = ids(store.search(queries[i : i + 1], 5, [parse_condition("year<3000")])[0])
            if found != expected[i]:
                wrong.append((i, found))

    threads = [threading.Thread(target=search) for _ in range(8)]
    for thread in threads:
        thread.start()
    far = -make_vectors(30, seed=7)  # opposite to every query: never among the results
    for d in range(10):
        store.add(make_entries(1, first=1000 + d), far[3 * d : 3 * d + 3])
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", ["vectors.npy", "passages.arrow", "bigram.rows.npy", "codes.npy"])
@pytest.mark.parametrize("how", ["cut", "gone", "changed"])
def test_damage_is_found_and_named(tmp_path, name, how):
    store = make_store(tmp_path / "i", "int8", ("bigram",))
    store.add(make_entries(20), make_vectors(60))
    store.verify()
    store.close()
    (file,) = (tmp_path / "i" / "segments").rglob(name)
    content = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    else:
        content[len(content) // 2] ^= 255
        file.write_bytes(content[:-7] if how == "cut" else content)
    with pytest.raises(Damaged, match=name):
        FolderStore.open(tmp_path / "i").verify()
    if how != "changed":
        with pytest.raises(Damaged, match=name):
            FolderStore.open(tmp_path / "i")


@pytest.mark.parametrize("name", ["manifest.json", "index.json"])
def test_damage_to_the_manifest_is_found(tmp_path, name):
    store = make_store(tmp_path / "i")
    store.add(make_entries(3), make_vectors(9))
    store.delete(["문서1"])
    file = tmp_path / "i" / name
    good = file.read_bytes()
    for bad in (good[: len(good) // 2], b"", good.replace(b'"rows": 9', b'"rows": 8') if b"rows" in good else b"[]"):
        file.write_bytes(bad)
        with pytest.raises(Damaged, match=name):
            FolderStore.open(tmp_path / "i")
    file.write_bytes(good)
    (bits,) = (tmp_path / "i" / "segments").rglob("deleted-*")
    bits.write_bytes(b"\xff" * bits.stat().st_size)
    with pytest.raises(Damaged, match="deleted-"):
        FolderStore.open(tmp_path / "i")


def test_an_edited_index_json_is_found_and_an_old_one_is_named_as_unchecked(tmp_path):
    store = make_store(tmp_path / "i")
    store.add(make_entries(3), make_vectors(9))
    store.update_info(hybrid_weight=0.4)
    assert store.verify() == [] and "seal" not in FolderStore.open(tmp_path / "i").info
    file = tmp_path / "i" / "index.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "hybrid_weight": 0.5}))
    with pytest.raises(Damaged, match="index.json: its content changed"):
        FolderStore.open(tmp_path / "i").verify()
    del said["seal"]
    file.write_text(json.dumps(said))
    assert FolderStore.open(tmp_path / "i").verify() == ["index.json"]


def test_only_an_index_that_nobody_filled_is_discarded(tmp_path):
    empty, mine = make_store(tmp_path / "e"), make_store(tmp_path / "i")
    empty.discard()
    assert not (tmp_path / "e").exists()
    other = FolderStore.open(tmp_path / "i")
    other.add(make_entries(1), make_vectors(3))
    with pytest.raises(RuntimeError, match="another process is writing"):
        mine.discard()
    other.close()
    mine.discard()  # what it knew when it was opened is not what lies there now
    assert FolderStore.open(tmp_path / "i").count() == 3


def test_what_is_no_index_is_left_alone(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "diary.txt").write_text("오늘")
    with pytest.raises(ValueError, match="no index"):
        make_store(tmp_path / "own")
    with pytest.raises(FileNotFoundError, match="no index"):
        FolderStore.open(tmp_path / "own")
    assert (tmp_path / "own" / "diary.txt").read_text() == "오늘"


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_folder import make_entries, make_store, make_vectors
from koret.retrieval.folder import FolderStore
path = Path(sys.argv[1])
store = FolderStore.open(path) if (path / "manifest.json").exists() else make_store(path, "int8", ("bigram",))
print("ready", flush=True)
for round in range(40):
    store.add(make_entries(4, 3, "1", 4 * round), make_vectors(12, seed=round))
    print("kept", round, flush=True)
    if round % 5 == 4:
        store.delete([f"문서{{4 * round}}"])
        print("deleted", round, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.11, 0.2])
def test_a_killed_writer_loses_nothing_acknowledged_and_half_writes_nothing(tmp_path, delay):
    script = WRITER.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", script, str(tmp_path / "i")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    said = [process.stdout.readline()]
    while len(said) < 3:
        said.append(process.stdout.readline())
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    said += process.stdout.readlines()
    process.wait()
    kept = {int(line.split()[1]) for line in said if line.startswith("kept") and line.endswith("\n")}
    deleted = {int(line.split()[1]) for line in said if line.startswith("deleted") and line.endswith("\n")}
    store = FolderStore.open(tmp_path / "i")
    store.verify()
    there = set(store.list_documents())
    for d in range(160):
        if d // 4 in kept and not (d % 20 == 16):
            assert f"문서{d}" in there
    assert not {f"문서{4 * r}" for r in deleted} & there
    assert all(len(store.read_document(name)) == 3 for name in there)
    assert max(int(name[2:]) // 4 for name in there) <= max(kept) + 1  # at most the unacknowledged round
    store.add(make_entries(1, first=999), make_vectors(3))  # the next writer cleans up
    named = {r["name"] for r in json.loads((tmp_path / "i" / "manifest.json").read_bytes())["manifest"]["segments"]}
    assert {p.name for p in (tmp_path / "i" / "segments").iterdir()} == named


@pytest.mark.parametrize(("rows", "characters"), [(40, 1 << 20), (1 << 20, 1500), (10, 1 << 20)])
def test_results_read_again_are_the_same_and_nobody_can_change_them(tmp_path, monkeypatch, rows, characters):
    monkeypatch.setattr(segment_module, "RECENT_ROWS", rows)
    monkeypatch.setattr(segment_module, "RECENT_CHARACTERS", characters)
    entries, vectors = make_entries(60), make_vectors(180)
    expected = {entry.id: entry for entry in entries}
    writer = make_store(tmp_path / "index", lexical=("whitespace",))
    for piece in (slice(0, 90), slice(90, 150), slice(150, 180)):
        writer.add(entries[piece], vectors[piece])
    store = FolderStore.open(tmp_path / "index")
    assert len(store._segments) > 1
    most = 0

    def search_often(seed: int) -> None:
        nonlocal most
        for query in make_vectors(40, seed):
            for found in (store.search(query[None], 15)[0], store.search_lexical(["서울 김치"], 15)[0]):
                assert all(entry == expected[entry.id] for entry, _ in found)
                kept = list(store._recent.strings.values())  # of all segments together
                assert len(kept) <= rows and sum(len(text) for row in kept for text in row) <= characters
                most = max(most, len(kept))
                found[0][0].metadata.clear()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(search_often, range(4)))
    assert most > 0
