"""Conditions on metadata read as people write them."""

from __future__ import annotations

import operator

import pytest

from koret.retrieval.store import Condition, parse_condition, parse_value


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
        ("code=007", Condition("code", "=", "007")),
        ("document=001", Condition("document", "=", "001")),
        ("heading=1984", Condition("heading", "=", "1984")),
        ('heading="1984"', Condition("heading", "=", "1984")),
        ("title!=true", Condition("title", "!=", "true")),
        (" 발행 연도 >= 1990", Condition("발행 연도", ">=", 1990)),
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


@pytest.mark.parametrize(
    "text", ["007", "-01", "1_990", "+5", ".5", "5.", "２００１", "1e999", "9" * 400, "0x1", "inf", "True"]
)
def test_what_json_would_not_call_a_number_stays_text(text):
    assert parse_value(text) == text


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("-12", -12), ("1990 ", 1990), ("1.50", 1.5), ("1e3", 1000.0), ("-2.5E-1", -0.25)]
)
def test_numbers_are_read(text, value):
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


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


def test_truth_values_are_compared_with_truth_values_only():
    for own, other in ((True, 1), (1, True), (False, 0.0), (True, "true"), ("true", True)):
        assert Condition("open", "!=", other).accept({"open": own})
        assert not any(Condition("open", sign, other).accept({"open": own}) for sign in ("=", "<", "<=", ">", ">="))
    assert Condition("open", "=", True).accept({"open": True}) and Condition("open", "<", True).accept({"open": False})
