"""Conditions on metadata read as people write them."""

from __future__ import annotations

import operator

import pytest

from koret.retrieval.store import Condition, parse_condition


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind=도시", Condition("kind", "=", "도시")),
        ("year>=1990", Condition("year", ">=", 1990)),
        (" year != 1990 ", Condition("year", "!=", 1990)),
        ("score<0.5", Condition("score", "<", 0.5)),
        ("open=true", Condition("open", "=", True)),
        ('code="1990"', Condition("code", "=", "1990")),
        ("title=가=나", Condition("title", "=", "가=나")),
        ("name=nan", Condition("name", "=", "nan")),
    ],
)
def test_conditions_are_read(text, expected):
    assert parse_condition(text) == expected
    assert type(parse_condition(text).value) is type(expected.value)


@pytest.mark.parametrize("text", ["", "year", "=1990", "year=", "year=="])
def test_unreadable_conditions_show_the_forms(text):
    if text == "year==":
        assert parse_condition(text) == Condition("year", "=", "=")  # a value may begin with a sign
        return
    with pytest.raises(ValueError, match="key=value"):
        parse_condition(text)


@pytest.mark.parametrize("sign", ["=", "!=", "<", "<=", ">", ">="])
def test_signs_compare_as_python_does(sign):
    same = {"=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt}
    own = same.get(sign, operator.ge)
    for value in (1989, 1990, 1990.5):
        assert Condition("year", sign, 1990).accept({"year": value}) == own(value, 1990)


def test_a_missing_key_or_another_type_meets_only_unequal():
    for values in ({}, {"year": "1990"}):
        assert Condition("year", "!=", 1990).accept(values)
        assert not any(Condition("year", sign, 1990).accept(values) for sign in ("=", "<", "<=", ">", ">="))
