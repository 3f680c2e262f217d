"""Whole stories through the real command line: index, search, change, delete, kill and go on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from koret import cli
from koret.retrieval.folder import FolderStore

TOWNS = "서울 부산 대구 인천 광주 대전 울산 세종 수원 춘천".split()


def call(*arguments: str | Path) -> int:
    return cli.main([str(a) for a in arguments])


def write_folder(folder: Path, count: int = 10) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        town = TOWNS[i % 10] + (str(i // 10) if i >= 10 else "")
        (folder / f"{i:03d}.md").write_text(f"# {town}\n\n## 소개\n\n{town}은 {i}번째 도시이다. 사람이 많이 산다.\n")
    return folder


def read_ids(index: Path) -> dict[str, str]:
    store = FolderStore.open(index)
    store.verify()
    return {entry.id: entry.version for name in store.list_documents() for entry in store.read_document(name)}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("story")
    assert call("index", "offline", write_folder(folder / "docs"), "--out", folder / "i") == 0
    return folder / "i"


@pytest.mark.slow
def test_the_sample_is_indexed_and_searched_by_the_installed_command(tmp_path):
    command = [sys.executable, "-m", "koret.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    made = subprocess.run(
        [*command, "index", "offline", "sample", "--out", "i", "--passage-tokens", "128", "--dtype", "int8"],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "158 added" in made.stdout and "koret search i" in made.stdout
    found = subprocess.run(
        [*command, "search", "i", "독도는 어디에 있는 섬인가?", "--json", "--mode", "lexical"],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    hits = json.loads(found.stdout)
    assert [hit["rank"] for hit in hits] == [1, 2, 3, 4, 5] and hits[0]["document"] == "독도"
    assert [h["score"] for h in hits] == sorted((h["score"] for h in hits), reverse=True)


def test_results_show_title_section_and_marked_words(built, capsys):
    assert call("search", built, "춘천에는 누가 사나", "--top-k", "1") == 0
    said = capsys.readouterr().out
    assert "춘천 > 소개" in said and "춘천은 9번째 도시이다" in said and "lexical" in said
    assert call("search", built, "춘천", "--mode", "dense", "--where", "title=서울") == 0
    said = capsys.readouterr().out
    assert "서울 > 소개" in said and "춘천" not in said
    assert call("search", built, "춘천", "--where", "title=없음") == 0
    assert "no passage found" in capsys.readouterr().out


def test_change_add_remove_and_delete(tmp_path, capsys):
    docs, out = write_folder(tmp_path / "docs"), tmp_path / "i"
    assert call("index", "offline", docs, "--out", out) == 0
    (docs / "000.md").write_text("# 서울\n\n한강이 흐른다.\n")
    (docs / "new.txt").write_text("제주는 섬이다.")
    (docs / "001.md").unlink()
    capsys.readouterr()
    assert call("index", "offline", docs, "--out", out) == 0
    said = capsys.readouterr().out
    assert "1 added, 1 changed, 8 unchanged; 2 passages" in said
    assert (
        "1 documents of the index are not in this corpus and stay; the same command with --prune removes them" in said
    )
    assert "001.md#1" in read_ids(out)
    assert call("index", "offline", docs, "--out", out, "--prune", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["removed"], report["passages"], report["encoded"]) == (1, 10, 0)
    assert call("index", "--out", out, "--delete", "002.md", "없는것", "--verify") == 0
    said = capsys.readouterr().out
    assert "1 documents deleted (1 passages)" in said and "not in the index: 없는것" in said and "holds 9" in said
    assert sorted(read_ids(out)) == sorted([f"{i:03d}.md#1" for i in range(10) if i not in (1, 2)] + ["new.txt#1"])


@pytest.mark.parametrize("delay", [0.0, pytest.param(0.4, marks=pytest.mark.slow)])
def test_kill_and_the_same_command_again_ends_as_if_never_killed(tmp_path, delay):
    docs, out = write_folder(tmp_path / "docs", 60), tmp_path / "i"
    code = "import koret.retrieval.index as i; i.gather_segments.__defaults__ = (4,); from koret import cli; cli.main()"
    command = [sys.executable, "-c", code, "index", "offline", str(docs), "--out", str(out)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    manifest = out / "manifest.json"
    while time.monotonic() < until and process.poll() is None:
        if manifest.exists() and '"rows"' in manifest.read_text():  # something was kept
            break
        time.sleep(0.01)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    half = read_ids(out)
    assert 0 < len(half)
    assert call("index", "offline", docs, "--out", out) == 0
    assert call("index", "offline", docs, "--out", tmp_path / "whole") == 0
    assert read_ids(out) == read_ids(tmp_path / "whole")
    assert half.items() <= read_ids(out).items() and len(read_ids(out)) == 60


def test_skipped_records_are_counted_and_listed(tmp_path, capsys):
    records = [{"id": "a", "text": "하나이다."}, {"id": "a", "text": "둘이다."}, {"id": "b"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + "{\n")
    assert call("index", "offline", tmp_path / "c.jsonl", "--out", tmp_path / "i") == 0
    said = capsys.readouterr().out
    assert "3 records skipped" in said and "c.jsonl:2: the id came before (a)" in said and "c.jsonl:3: no text" in said


def test_a_run_gives_its_learned_weight_and_passages_no_longer_than_its_window_to_the_index(tmp_path, capsys):
    from koret.retrieval.encoder import load_encoder

    base, run = tmp_path / "run_2025", tmp_path / "run_2026"  # the base was trained too, and has other settings
    for path, tokens, weight, model in ((base, 64, 0.9, "offline"), (run, 512, 0.4, str(base))):
        load_encoder("offline", device="cpu").save(path / "model")
        config = {"passage_tokens": tokens, "max_seq_length": 256, "model_name": model}
        for name, content in (
            ("model/training_config.json", config),
            ("status.json", {"state": "finished"}),
            ("evaluation/report.json", {"data": {"fusion_weight": weight}}),
        ):
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text(json.dumps(content))
    assert call("index", run, write_folder(tmp_path / "docs", 2), "--out", tmp_path / "i", "--json") == 0
    info = json.loads(capsys.readouterr().out)["info"]
    assert info["passage_tokens"] == 256
    assert (info["hybrid_weight"], info["model"], info["encoder"]) == (0.4, "./../run_2026/model", "run_2026")


def test_mistakes_are_explained_without_a_traceback(built, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.txt").write_text("글")
    cases = [
        (("search", built, "  "), "question is empty"),
        (("search", built, "가" * 10_001), "10,001 characters"),
        (("search", built, "수도", "--where", "year"), "key=value"),
        (("search", built, "수도", "--weight", "2"), "weight"),
        (("search", "offline", "수도", "--mode", "hybrid"), "--mode needs an index"),
        (("index", "offline", tmp_path / "empty.jsonl", "--out", tmp_path / "e"), "no document"),
        (("index", "offline", tmp_path / "gone", "--out", tmp_path / "g"), "no such file"),
        (("index", "offline", tmp_path / "own", "--out", tmp_path / "own"), "is no index"),
        (("index", "offline", built.parent / "docs", "--out", built, "--dtype", "int8"), "made with dtype float16"),
        (("index", "--out", built), "name a model and a corpus"),
        (("index", "offline", "sample", "--out", built, "--delete", "x"), "without a corpus"),
        (("index", "--out", tmp_path / "own", "--verify"), "is no index"),
        (("index", "--out", built, "--verify", "--approximate"), "--approximate is for building"),
        (("index", "--out", built, "--delete", "000.md", "--prune"), "--prune is for building"),
        (("index", "--out", built, "--verify", "--passage-tokens", "0"), "--passage-tokens is for building"),
        (("index", "--out", "milvus:x.db", "--verify"), "is a database, and --verify checks the files of a folder"),
        (("index", "offline", built.parent / "docs", "--out", tmp_path / "g", "--passage-tokens", "8"), "16 and 256"),
        (("search", built, "수도", "--tokenizer", "kiwi"), "holds no kiwi words, only bigram"),
        (("search", built, "수도", "--tokenizer", "kiwi", "--mode", "dense"), "--mode dense compares vectors"),
        (("search", "offline", "수도", "--tokenizer", "kiwi"), "--tokenizer needs an index"),
    ]
    for arguments, message in cases:
        assert call(*arguments) == 2, arguments
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said, said
    assert not (tmp_path / "g").exists() and "000.md#1" in read_ids(built)


def test_verifying_says_what_it_compared(tmp_path, capsys):
    assert call("index", "offline", write_folder(tmp_path / "docs", 3), "--out", tmp_path / "i") == 0
    capsys.readouterr()
    assert call("index", "--out", tmp_path / "i", "--verify") == 0
    assert "every file is as it was written\n" in capsys.readouterr().out
    file = tmp_path / "i" / "index.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "seal"}))
    assert call("index", "--out", tmp_path / "i", "--verify") == 0
    assert "as it was written, but nothing is known of index.json: an older koret" in capsys.readouterr().out
    assert call("index", "--out", tmp_path / "i", "--verify", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["verified"] and said["unchecked"] == ["index.json"]


def test_a_damaged_index_names_the_file(tmp_path, capsys):
    assert call("index", "offline", write_folder(tmp_path / "docs", 3), "--out", tmp_path / "i") == 0
    (file,) = (tmp_path / "i" / "segments").rglob("vectors.npy")
    file.write_bytes(file.read_bytes()[:-10])
    capsys.readouterr()
    assert call("search", tmp_path / "i", "서울") == 2
    said = capsys.readouterr().err
    assert "damaged" in said and "vectors.npy" in said and "build it again" in said


def test_bits_say_their_recall_and_how_many_passages_are_scored(tmp_path, capsys):
    docs = write_folder(tmp_path / "docs", 120)
    assert call("index", "offline", docs, "--out", tmp_path / "i", "--dtype", "binary") == 0
    said = capsys.readouterr().out
    assert "binary vectors" in said and re.search(r"nearest \d+ passages for each result are scored, recall@10 ", said)
    assert call("index", "offline", docs, "--out", tmp_path / "i", "--json") == 0
    first = json.loads(capsys.readouterr().out)["info"]["bits"]
    assert 0.9 <= first["recall@10"] <= 1
    (tmp_path / "docs" / "새 문서.txt").write_text("완전히 새로운 문서이다. 한라산은 제주도에 있다.", encoding="utf-8")
    assert call("index", "offline", docs, "--out", tmp_path / "i", "--json") == 0
    assert json.loads(capsys.readouterr().out)["info"]["bits"]["generation"] > first["generation"]
    assert call("search", tmp_path / "i", "한라산은 어디에 있나?", "--json") == 0
    assert len({hit["id"] for hit in json.loads(capsys.readouterr().out)}) == 5
    assert call("index", "offline", docs, "--out", f"milvus:{tmp_path}/i.db", "--dtype", "binary") == 2
    assert "leave --dtype binary out" in capsys.readouterr().err
    assert not (tmp_path / "i.db").exists()


def test_approximate_says_its_recall(tmp_path, capsys):
    pytest.importorskip("faiss")
    docs = write_folder(tmp_path / "docs", 120)
    assert call("index", "offline", docs, "--out", tmp_path / "i", "--approximate") == 0
    assert "recall@10" in capsys.readouterr().out
