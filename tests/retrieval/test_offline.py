"""The offline base reads every Hangul syllable, and no two alike."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from koret.retrieval import offline


@pytest.fixture(scope="module")
def encoder():
    from koret.retrieval.encoder import load_encoder

    return load_encoder("offline")


def test_every_syllable_is_one_token_in_either_place(encoder):
    for code in offline.SYLLABLES:
        assert encoder.tokenizer.tokenize(chr(code)) == [chr(code)]
    assert encoder.tokenizer.tokenize("값이 깎인 the sky") == ["값", "##이", "깎", "##인", "the", "sky"]


def test_rows_are_the_mean_of_their_letters_and_published_rows_are_untouched(encoder):
    published = load_file(offline.find_offline_base() / "model.safetensors")["embeddings.word_embeddings.weight"]
    weight = encoder.backbone.get_input_embeddings().weight.detach()
    assert torch.equal(weight[: len(published)], published)
    vocabulary = encoder.tokenizer.get_vocab()
    assert len(vocabulary) == len(weight) == len(published) + 2 * 11_172
    start = torch.stack([weight[vocabulary[piece]] for piece in ("ᄀ", "##ᅡ", "##ᆸ", "##ᄉ")]).mean(0)  # 값 lacks ㅄ
    assert torch.allclose(weight[vocabulary["값"]], start)
    inside = torch.stack([weight[vocabulary[piece]] for piece in ("##ᄀ", "##ᅡ")]).mean(0)
    assert torch.allclose(weight[vocabulary["##가"]], inside)


def test_no_two_syllables_are_spelled_alike():
    assert len({offline.spell(chr(code)) for code in offline.SYLLABLES}) == 11_172


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
