"""What can still be said about a record that could not be read, and what only a complete parse shows."""

from __future__ import annotations

import json
import re

import msgspec


def find_fault(raw: bytes) -> str | None:
    """What only a complete parse shows: duplicate keys, NaN, a wrong html_answer_start."""

    def refuse_twins(members: list[tuple[str, object]]) -> dict:
        made = dict(members)
        if len(made) < len(members):
            names = [name for name, _ in members]
            raise ValueError(f"duplicate key {next(n for n in names if names.count(n) > 1)!r}")
        return made

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        article = json.loads(raw, object_pairs_hook=refuse_twins, parse_constant=refuse_constant)
        json.dumps(article, ensure_ascii=False).encode()
    except RecursionError:
        return "nested too deeply"
    except ValueError as error:
        return f"not valid: {error}"
    page = article.get("raw_html") if isinstance(article, dict) else None
    asked = article.get("qas") if isinstance(page, str) else None
    for question in asked if isinstance(asked, list) else ():
        answer = question.get("answer") if isinstance(question, dict) else None
        if not isinstance(answer, dict):
            continue
        start, text = answer.get("html_answer_start"), answer.get("html_answer_text")
        if isinstance(start, int) and isinstance(text, str) and not page.startswith(text, start):
            return f"html_answer_text of question {question.get('id')} is not at html_answer_start"
    return None


def peek_title(raw: bytes) -> str:
    """The first title in the bytes of an article, or nothing."""
    found = re.search(rb'"title"\s*:\s*("(?:[^"\\]|\\.){0,500}")', raw)
    return _decode_or_empty(found[1] if found else b"")


def peek_id(raw: msgspec.Raw) -> str:
    """The first id in the bytes of a question, or nothing."""
    found = re.search(rb'"id"\s*:\s*("(?:[^"\\]|\\.){0,200}"|\d{1,30})', bytes(raw))
    return _decode_or_empty(found[1] if found else b"")


def _decode_or_empty(raw: bytes) -> str:
    try:
        return str(msgspec.json.decode(raw))
    except ValueError:
        return ""
