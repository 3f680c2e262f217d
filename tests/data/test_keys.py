"""When two texts count as the same."""

import unicodedata

import pytest

from koret.data.keys import normalize_answer, text_key


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("세종 대왕", "세종대왕"),
        ("ＮＡＳＡ", "nasa"),
        (unicodedata.normalize("NFD", "한라산"), "한라산"),
        ("한라산은", "한라산"),
        ("세종대왕은", "세종대왕"),
        ("제주도를", "제주도"),
        ("제주도에서", "제주도"),
        ("1945년을", "1945년"),
        ("NASA는", "nasa"),
        ("동쪽으로", "동쪽"),
    ],
)
def test_same_answer(written, normal):
    assert normalize_answer(written) == normal


@pytest.mark.parametrize("noun", ["마을", "가을", "노을", "수은", "고양이", "국가", "회의", "학과", "제주도", "종로"])
def test_nouns_keep_their_end(noun):
    assert normalize_answer(noun) == noun


def test_text_key_ignores_form_and_spaces_only():
    assert text_key("한라산  정상\n") == text_key(unicodedata.normalize("NFD", "한라산 정상"))
    assert text_key("한라산") != text_key("한라 산")
    assert text_key("") == -5426141060434712860  # fixed: stored in prepared sets
    assert all(-(2**63) <= text_key(str(i)) < 2**63 for i in range(200))
    assert min(text_key(str(i)) for i in range(200)) < 0
