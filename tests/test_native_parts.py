"""Loading the compiled parts: of the present version, or not at all."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from koret.data import native as scan
from koret.native import load_extension
from koret.retrieval import compiled

PARTS = pytest.mark.parametrize(
    ("name", "user"), [("koret.data._scan", scan), ("koret.retrieval._kernels", compiled)], ids=["scan", "kernels"]
)


def load(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"{name} is not built")


@PARTS
def test_what_was_built_is_of_this_version(name, user):
    source = (Path(user.__file__).parent / "csrc" / "module.c").read_text(encoding="utf-8")
    assert f"#define VERSION {user.VERSION} " in source
    assert load(name).VERSION == user.VERSION, "it was built from older C: make setup builds it anew"


@PARTS
def test_another_version_is_left_alone(name, user, monkeypatch):
    monkeypatch.delenv("KORET_PURE_PYTHON", raising=False)
    assert load_extension(name, user.VERSION) is load(name)
    assert load_extension(name, user.VERSION + 1) is None


@PARTS
@pytest.mark.parametrize(("value", "wanted"), [("1", False), ("0", True), ("", True)])
def test_the_variable_chooses_python(name, user, value, wanted, monkeypatch):
    load(name)
    monkeypatch.setenv("KORET_PURE_PYTHON", value)
    assert (load_extension(name, user.VERSION) is not None) == wanted


def test_a_part_that_was_not_built_is_no_error():
    assert load_extension("koret.data._missing", 1) is None
