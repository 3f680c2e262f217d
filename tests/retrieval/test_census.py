"""Pruning removes what left the corpus, and nothing that is there and cannot be read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from koret.retrieval.encoder import TextEncoder, load_encoder
from koret.retrieval.index import BuildReport, build_index, open_index

torch.set_num_threads(1)
NAMES = ("서울", "부산", "제주", "독도")


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return load_encoder("offline", device="cpu", max_seq_length=64)


def write_pages(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.txt").write_text(f"{name}에는 볼 것이 많다.")
    return folder


def write_records(path: Path, *records: object) -> Path:
    lines = (r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def update(encoder: TextEncoder, corpus: Path, out: Path, prune: bool = True) -> tuple[BuildReport, list[str]]:
    index = build_index(encoder, corpus, out, prune=prune)
    index.close()
    return index.report, sorted(open_index(out, encoder).store.list_documents())


@pytest.mark.parametrize(
    "content, reason",
    [("부산".encode("cp949"), "not UTF-8"), (b"", "no text"), (b"\n \n", "no text"), (b"\xef\xbb\xbf", "no text")],
)
def test_a_page_that_cannot_be_read_stays(encoder, tmp_path, content, reason):
    docs, out = write_pages(tmp_path / "docs"), tmp_path / "i"
    update(encoder, docs, out)
    (docs / "부산.txt").write_bytes(content)
    (docs / "제주.txt").unlink()
    report, kept = update(encoder, docs, out)
    assert kept == ["독도.txt", "부산.txt", "서울.txt"]
    assert (report.removed, report.rejected, report.unpruned) == (1, 1, "")
    assert (report.added, report.changed, report.unchanged, report.encoded) == (0, 0, 2, 0)
    assert report.rejects[0].id == "부산.txt" and reason in report.rejects[0].reason
    assert report.spared == 1


def test_a_record_that_lost_its_text_stays_by_its_id(encoder, tmp_path):
    records = [{"id": f"r{i}", "text": f"{name}의 이야기"} for i, name in enumerate(NAMES)]
    corpus, out = write_records(tmp_path / "c.jsonl", *records), tmp_path / "i"
    update(encoder, corpus, out)
    write_records(corpus, records[0], {"id": "r1", "text": " "}, {"id": "r2"})
    report, kept = update(encoder, corpus, out)
    assert kept == ["r0", "r1", "r2"] and (report.removed, report.spared) == (1, 2)


def test_a_title_stands_for_every_document_numbered_after_it(encoder, tmp_path):
    records = [{"title": "춘천", "text": f"{name} 근처이다."} for name in NAMES[:3]]
    other = {"title": "강릉", "text": "바다가 있다."}
    corpus, out = write_records(tmp_path / "c.jsonl", *records, other), tmp_path / "i"
    assert update(encoder, corpus, out)[1] == ["강릉", "춘천", "춘천 (2)", "춘천 (3)"]
    write_records(corpus, records[0], {"title": "춘천", "text": ""})
    report, kept = update(encoder, corpus, out)
    assert kept == ["춘천", "춘천 (2)", "춘천 (3)"] and (report.removed, report.spared) == (1, 2)


def test_nothing_is_removed_while_a_lost_record_may_be_any_document(encoder, tmp_path):
    records = [{"id": f"r{i}", "text": f"{name}의 이야기"} for i, name in enumerate(NAMES)]
    corpus, out = write_records(tmp_path / "c.jsonl", *records), tmp_path / "i"
    update(encoder, corpus, out)
    write_records(corpus, *records[:2], '{"id": "r2", "text": "잘린', records[3])
    report, kept = update(encoder, corpus, out)
    assert kept == ["r0", "r1", "r2", "r3"] and report.removed == 0
    assert "nothing removed" in report.unpruned and "c.jsonl:3" in report.unpruned and "--delete" in report.unpruned
    write_records(corpus, *records[:2], records[3])  # mended
    report, kept = update(encoder, corpus, out)
    assert kept == ["r0", "r1", "r3"] and (report.removed, report.unpruned) == (1, "")


def test_a_lost_record_matters_only_where_something_would_be_removed(encoder, tmp_path):
    records = [{"id": f"r{i}", "text": f"{name}의 이야기"} for i, name in enumerate(NAMES)]
    corpus = write_records(tmp_path / "c.jsonl", *records, "{broken")
    report, kept = update(encoder, corpus, tmp_path / "i")
    assert len(kept) == 4 and report.rejected == 1 and (report.removed, report.unpruned) == (0, "")


def test_question_pairs_with_a_broken_line_are_not_pruned(encoder, tmp_path):
    pairs = [{"query": f"{name}은 어떤 곳인가", "passage": f"{name}의 긴 이야기", "article": name} for name in NAMES]
    corpus, out = write_records(tmp_path / "c.jsonl", *pairs), tmp_path / "i"
    before = update(encoder, corpus, out)[1]
    write_records(corpus, *pairs[:3], "{broken")
    report, kept = update(encoder, corpus, out)
    assert kept == before and report.removed == 0 and "nothing removed" in report.unpruned


CRASH = """
import os, signal, sys
from koret import cli
from koret.retrieval import folder
store = folder.FolderStore
delete = store.delete
def die(self, documents):
    if sys.argv[-1] == "after":
        delete(self, documents)
    os.kill(os.getpid(), signal.SIGKILL)
store.delete = die
cli.main(sys.argv[1:-1])
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_while_pruning_the_same_command_ends_the_same(tmp_path, moment):
    encoder = load_encoder("offline", device="cpu")  # as the command loads it
    docs, out = write_pages(tmp_path / "docs"), tmp_path / "i"
    update(encoder, docs, out)
    (docs / "제주.txt").unlink()
    command = ["index", "offline", str(docs), "--out", str(out), "--prune"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", CRASH, *command, moment], env=environment, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    half = open_index(out, encoder)
    assert half.count() == (4 if moment == "before" else 3)
    half.close()
    report, kept = update(encoder, docs, out)
    assert kept == ["독도.txt", "부산.txt", "서울.txt"] and report.removed == (moment == "before")
    again = open_index(out, encoder)
    assert [hit.entry.document for hit in again.search(["제주"], 9)[0]].count("제주.txt") == 0
