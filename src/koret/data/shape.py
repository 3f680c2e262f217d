"""What the articles of a KorQuAD 2.x file look like byte by byte, learnt from the first, to jump through the rest."""

from __future__ import annotations

import io

import msgspec

from koret.data.jsonstream import JsonStream
from koret.data.sources import DataError


class Shape(msgspec.Struct, frozen=True):
    """Byte strings between the parts of an article, as the first article of the file has them."""

    separator: bytes  # `}, {"title"`
    context: bytes  # `"context": "`
    raw_html: bytes  # `", "raw_html": "`
    questions: bytes  # `", "qas": [`
    closing: int  # bytes from the end of the questions to the end of the article


def learn_shape(article: bytes, gap: bytes) -> Shape | None:
    """The shape of an article, ``gap`` being what stands between it and the next; None: no such shape."""
    try:
        members = _list_members(article) if article.startswith(b"{") else []
    except DataError:
        return None
    names = [name for name, *_ in members]
    if names[-3:] != [b'"context"', b'"raw_html"', b'"qas"'] or names[0] != b'"title"' or len(set(names)) < len(names):
        return None
    context, raw_html, questions = members[-3:]
    opened = (article[context[2] : context[2] + 1], article[raw_html[2] : raw_html[2] + 1], article[questions[2]])
    if opened != (b'"', b'"', ord("[")) or article[questions[3] : -1].strip():
        return None
    return Shape(
        separator=article[questions[3] :] + gap + article[: members[0][1] + len(names[0])],
        context=article[context[1] : context[2] + 1],
        raw_html=article[context[3] - 1 : raw_html[2] + 1],
        questions=article[raw_html[3] - 1 : questions[2] + 1],
        closing=len(article) - questions[3],
    )


def _list_members(article: bytes) -> list[tuple[bytes, int, int, int]]:
    """(key, where the key starts, where its value starts, where its value ends) of an object known to be whole."""
    stream = JsonStream(io.BytesIO(article), "article")
    members, position = [], stream.skip_space(1)
    while stream.peek(position) != b"}":
        key_end = stream.skip_value(position)
        value = stream.skip_space(stream.skip_space(key_end) + 1)
        end = stream.skip_value(value)
        members.append((article[position:key_end], position, value, end))
        position = stream.skip_space(end)
        if stream.peek(position) == b",":
            position = stream.skip_space(position + 1)
    return members
