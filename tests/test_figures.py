"""Plots write Hangul, without importing the font's package."""

import subprocess
import sys
import warnings

import pytest
from matplotlib import font_manager

from koret import figures


def test_korean_labels_have_glyphs(tmp_path):
    if figures._find_packaged_font() is None:
        pytest.skip("koreanize-matplotlib is not installed")
    assert figures.use_korean_font() == "NanumGothic"
    figure, axes = figures.make_figure(2, 1)
    axes[0].set_title("한글 제목 − 값")
    axes[1].bar(["무엇", "누구"], [1, -2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph is a warning
        path = figures.save_figure(figure, tmp_path / "plot.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_font_package_is_not_imported():
    code = (
        "import sys; from koret import figures; assert 'matplotlib' not in sys.modules; "
        "figures.use_korean_font(); assert 'koreanize_matplotlib' not in sys.modules; "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_font_is_said(monkeypatch, caplog):
    monkeypatch.setattr(figures, "_find_packaged_font", lambda: None)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    assert figures.use_korean_font() is None
    assert "install koreanize-matplotlib" in caplog.text
