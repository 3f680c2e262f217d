"""The words a query found are marked whatever their particles, and long passages are cut around them."""

from __future__ import annotations

import pytest

from koret.retrieval.excerpt import cut_excerpt, mark_words


@pytest.mark.parametrize(
    ("query", "text", "marked"),
    [
        ("대한민국의 수도는?", "대한민국은 서울을 수도로 한다", ["대한민국", "수도"]),
        ("수도", "수도가 수돗물 상수도", ["수도"]),
        ("대학교", "서울대학교는 크다", ["대학교"]),
        ("강", "강 한강 강물", ["강"]),
        ("Seoul", "SEOUL is seoul", ["SEOUL", "seoul"]),
        ("대한", "대한민국", ["대한"]),
        ("대한민국", "대한 제국", ["대한"]),
        ("없음", "서울", []),
        ("?!", "서울", []),
    ],
)
def test_words_are_marked(query, text, marked):
    assert [text[a:b] for a, b in mark_words(query, text)] == marked


def test_spans_ascend_and_do_not_overlap():
    text = "서울 서울의 서울은 부산 서울특별시 " * 50
    spans = mark_words("서울은 부산의 서울특별시", text)
    assert spans and all(a < b <= c for (a, b), (c, _) in zip(spans, spans[1:], strict=False))


def test_a_short_text_is_whole_and_a_long_one_is_cut_around_the_words():
    assert cut_excerpt("짧은 글", [(0, 2)]) == (0, 4)
    text = "가나 다라 " * 200 + "서울은 수도이다 " + "마바 사아 " * 200
    spans = mark_words("서울의 수도", text)
    start, end = cut_excerpt(text, spans, 120)
    assert end - start <= 120 and "서울은 수도이다" in text[start:end] and start > 1000
    assert text[start - 1] == " " and text[end] == " "
    assert cut_excerpt(text, [], 120)[0] == 0
