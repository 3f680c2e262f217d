"""Malformed data is read with what was left out counted, or refused by name, within 2 seconds and a gigabyte."""

import time
from pathlib import Path

import pytest
from malformed import CASES, Reads
from measured import Reader, read_measured

SECONDS, MEGABYTES = 2.0, 1024  # CPU time; the interpreter's own memory counts


@pytest.fixture(scope="module")
def reader():
    reader = Reader()
    yield reader
    reader.close()


@pytest.mark.parametrize("name", CASES)
def test_is_read_with_counts_or_refused_by_name(name, reader, tmp_path):
    case = CASES[name]
    (tmp_path / "cache").mkdir()
    (tmp_path / "in" / "here").mkdir(parents=True)
    path = case.make(tmp_path / "in" / "here")
    before = list_files(tmp_path / "in")
    wanted = case.outcome.texts if isinstance(case.outcome, Reads) else ()
    found = reader.read(path, tmp_path / "cache", wanted, **case.options)
    if found["seconds"] >= SECONDS:  # a busy machine charges more: the better of two counts
        found = reader.read(path, tmp_path / "again", wanted, **case.options)

    assert "crash" not in found, found["crash"]
    assert not found["signal"], found
    assert found["seconds"] < SECONDS and found["megabytes"] < MEGABYTES, found
    assert list_files(tmp_path / "in") == before and not Path("/tmp/koret-absolute.json").exists()
    if not isinstance(case.outcome, Reads):
        assert found.get("kind") in ("DataError", "FileNotFoundError"), found
        for part in case.outcome.says:
            assert part in found["refused"], found["refused"]
        return
    assert "report" in found, found
    report = found["report"]
    for kind, kept in (("articles", case.outcome.articles), ("questions", case.outcome.questions)):
        assert report[kind]["kept"] == kept, report
        assert report[kind]["seen"] == report[kind]["kept"] + report[kind]["rejected"], report
    assert report["reasons"] == case.outcome.reasons
    assert found["missing"] == [] and len(report["ignored"]) == case.outcome.ignored
    assert case.outcome.moved is None or report["moved_answers"] == case.outcome.moved


def list_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_there_are_enough_of_them():
    refused = sum(not isinstance(case.outcome, Reads) for case in CASES.values())
    counted = sum(isinstance(case.outcome, Reads) and bool(case.outcome.reasons) for case in CASES.values())
    assert len(CASES) >= 40 and refused >= 20 and counted >= 20


def test_the_measurement_itself_can_fail(tmp_path, monkeypatch):
    """A reader that takes long or breaks is seen as such: the checks above rely on it."""

    def burn(*_, **__):
        while time.process_time() < SECONDS + 0.1:
            pass
        raise ZeroDivisionError

    monkeypatch.setattr("koret.data.loader.load_dataset", burn)
    found = read_measured({"path": str(tmp_path), "cache": str(tmp_path), "texts": [], "options": {}})
    assert "ZeroDivisionError" in found["crash"] and found["seconds"] > SECONDS
