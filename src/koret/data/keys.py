"""When two texts count as the same: normalised answers, 64-bit text keys."""

from __future__ import annotations

from hashlib import blake2b
from unicodedata import is_normalized

from koret.data.markup import normalize_text
from koret.data.native import scan

# Particles that hardly ever end a noun. 이, 가, 의, 에, 와, 과, 도, 로, 만 often do (고양이, 국가, 회의, 학과, 제주도).
_PARTICLES = ("에서", "에게", "까지", "부터", "입니다", "이다")
_AFTER_CONSONANT = ("으로", "은", "을")
_AFTER_VOWEL = ("는", "를")


def normalize_answer(text: str) -> str:
    """An answer reduced to what makes it the same answer: NFKC, lower case, no spaces, no trailing particle.

    A particle is only removed where Korean phonology allows it and a stem of two characters remains, so that
    한라산은 equals 한라산 while 마을 and 가은 stay whole.
    """
    text = fold_text(text)
    for endings, final in ((_PARTICLES, None), (_AFTER_CONSONANT, True), (_AFTER_VOWEL, False)):
        for ending in endings:
            stem = text.removesuffix(ending)
            if stem != text and len(stem) >= 2 and (final is None or _ends_in_consonant(stem) in (final, None)):
                return stem
    return text


def fold_text(text: str) -> str:
    """NFKC, lower case, no white space: what answers are looked for in."""
    folded = scan.fold(text) if scan else None
    return "".join(normalize_text(text, "NFKC").lower().split()) if folded is None else folded


def text_key(text: str) -> int:
    """A signed 64-bit BLAKE2b hash of the text, NFC and with runs of white space as one space."""
    squeezed = scan.squeeze(text) if scan else None
    digest = blake2b(_squeeze(text) if squeezed is None else squeezed, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _squeeze(text: str) -> bytes:
    normal = text.replace("\n\n", " ").replace("\n", " ")
    if not (
        normal.isprintable() and "  " not in normal and normal.strip(" ") == normal and is_normalized("NFC", normal)
    ):
        normal = " ".join(normalize_text(text).split())
    return normal.encode("utf-8", "surrogatepass")


def _ends_in_consonant(text: str) -> bool | None:
    """Whether the last syllable has a final consonant; None where it is no Hangul."""
    code = ord(text[-1]) - 0xAC00
    return code % 28 > 0 if 0 <= code < 11172 else None
