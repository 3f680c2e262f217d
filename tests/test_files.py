"""Files and folders are whole or absent; a full disk is named."""

import errno
import io
import os

import pytest

from koret.files import DiskFull, remove_folder, remove_leftovers, stage_folder, write_file, write_json


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_replaced_in_one_piece(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    write_json(path, {"a": "가"})
    assert path.read_text() == '{\n  "a": "가"\n}\n'
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_file(path, b"new")
    assert path.read_text() == '{\n  "a": "가"\n}\n' and names(tmp_path) == ["status.json"]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    plain = io.open

    def full(path, mode="r", *rest, **options):
        if "w" in mode:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(path, mode, *rest, **options)

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(DiskFull, match="disk full while saving a"):
        write_file(tmp_path / "a", b"new")
    monkeypatch.undo()
    with pytest.raises(DiskFull, match="disk full while saving model"), stage_folder(tmp_path / "model") as staging:
        (staging / "part").write_text("x")
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # as safetensors says it
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "model"
    with pytest.raises(KeyError), stage_folder(target) as staging:
        (staging / "x").write_text("1")
        raise KeyError("wrong")
    assert not target.exists() and names(tmp_path / "deep") == []
    for content in ("first", "second"):
        with stage_folder(target) as staging:
            (staging / "sub").mkdir()
            (staging / "sub" / "x").write_text(content)
            assert target.exists() == (content == "second")
        assert (target / "sub" / "x").read_text() == content
    assert names(tmp_path / "deep") == ["model"]


def test_leftovers_go_and_the_rest_stays(tmp_path):
    (tmp_path / ".staging-model").mkdir()
    (tmp_path / ".trash-step-1").mkdir()
    (tmp_path / ".staging-status.json").write_text("")
    (tmp_path / "step-2").mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step-2"]
    remove_folder(tmp_path / "step-2")
    assert names(tmp_path) == []
