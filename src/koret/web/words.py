"""What the server says to a person, in Korean and English."""

from __future__ import annotations

from typing import Any

_SENTENCES = {
    "host": (
        "이 주소로는 열 수 없습니다. http://localhost 로 여세요 (다른 이름은 koret web --allow-host 이름).",
        "This page does not answer to that host name. Open it at http://localhost (or start: koret web --allow-host).",
    ),
    "origin": ("다른 사이트에서 온 요청은 받지 않습니다.", "Requests from other sites are refused."),
    "method": ("이 요청 방식은 쓸 수 없습니다.", "This request method is not used here."),
    "content_type": ("요청은 JSON이어야 합니다.", "A request must be JSON (application/json)."),
    "too_large": ("요청이 너무 큽니다(최대 {most}KB).", "The request is too large (at most {most} KB)."),
    "slow": ("요청이 제때 다 오지 않았습니다.", "The request did not arrive in time."),
    "broken_off": ("요청이 도중에 끊겼습니다.", "The request broke off."),
    "bad_json": ("요청을 읽을 수 없습니다.", "The request cannot be read: it is not the JSON expected here."),
    "missing": ("그런 주소는 없습니다.", "There is nothing at this address."),
    "failed": (
        "서버에서 문제가 생겼습니다. 자세한 내용은 koret web을 켠 터미널에 있습니다.",
        "Something went wrong in the server. The terminal that runs koret web says what.",
    ),
    "busy": (
        "지금 질문이 너무 많습니다. 잠시 뒤 다시 해 보세요.",
        "Too many questions are waiting. Try again shortly.",
    ),
    "empty_query": ("질문을 적어 주세요.", "Write a question first."),
    "long_query": ("질문이 너무 깁니다(최대 {most:,}자).", "The question is too long (at most {most:,} characters)."),
    "columns": ("비교할 대상을 하나 이상 고르세요.", "Choose at least one column."),
    "no_passages": ("문단을 하나 이상 넣어 주세요.", "Paste at least one passage."),
    "many_passages": ("문단이 너무 많습니다(최대 {most}개).", "Too many passages (at most {most})."),
    "long_passage": (
        "{number}번째 문단이 너무 깁니다(최대 {most:,}자).",
        "Passage {number} is too long (at most {most:,} characters).",
    ),
    "no_report": (
        "이 모델에는 보고서가 없습니다. koret train으로 학습한 모델을 여세요.",
        "There is no report: these models come from no finished run of koret train.",
    ),
}


def explain(reason: str, **values: Any) -> dict[str, str]:
    """The sentence in both languages."""
    korean, english = _SENTENCES[reason]
    return {"ko": korean.format(**values), "en": english.format(**values)}
