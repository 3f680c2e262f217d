"""The offline base reads every Hangul syllable, and no two alike."""

from __future__ import annotations

import pytest

from koret.retrieval import offline


@pytest.fixture(scope="module")
def encoder():
    from koret.retrieval.encoder import load_encoder

    return load_encoder("offline")


def test_every_syllable_is_spelled_without_unknown_pieces_and_without_collisions(encoder):
    spellings = {}
    for code in range(0xAC00, 0xD7A4):
        pieces = tuple(encoder.tokenizer.tokenize(chr(code)))
        assert "[UNK]" not in pieces, chr(code)
        assert spellings.setdefault(pieces, code) == code, (chr(code), chr(spellings[pieces]))


def test_nfd_text_reads_like_nfc_text(encoder):
    import unicodedata

    text = "값이 깎인 떡볶이"
    assert encoder.tokenizer.tokenize(unicodedata.normalize("NFD", text)) == encoder.tokenizer.tokenize(text)


def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setattr(offline, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match="refusing"):
        offline.find_offline_base()


def test_absent_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(offline, "PACKAGE", "no_such_package")
    with pytest.raises(RuntimeError, match=r"koret\[offline\]"):
        offline.find_offline_base()
