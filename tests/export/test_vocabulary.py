"""Trimmed vocabularies: the same tokens and vectors on the corpus, nothing unknown that was known."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from export_examples import MOUNTAINS, PLACES, build_unigram_model
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from koret.export import layout, vocabulary
from koret.retrieval.encoder import load_encoder

WORDS = [
    *MOUNTAINS,
    *PLACES,
    "축제를",
    "연다",
    "높이는",
    "얼마인가",
    "사람들은",
    "있는",
    "산이다",
    "1950미터",
    "query:",
]


def make_texts(count: int, words: list[str], seed: int = 0) -> list[str]:
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(words, k=12)) for _ in range(count)]


@pytest.fixture(scope="module")
def unigram():
    torch.set_num_threads(1)
    chooser = random.Random(1)
    foreign = make_texts(300, ["".join(chooser.choices("abcdeghilmnoprstuy", k=6)) for _ in range(60)])
    return build_unigram_model(make_texts(300, WORDS) + foreign + ["passage: query:"] * 50)


def test_a_unigram_model_keeps_tokens_and_vectors_of_the_corpus(unigram, tmp_path):
    texts = [("passage", text) for text in make_texts(60, WORDS, seed=1)] + [("query", "한라산의 높이는?")]
    everything = [text for _, text in texts] + ["apple over the dogs", "쉷 unknown ☃"]
    before = unigram.encode([text for _, text in texts], "passage")
    rows = unigram.backbone.get_input_embeddings().weight.detach().numpy().copy()
    old = Tokenizer.from_str(unigram.tokenizer.backend_tokenizer.to_str())
    trim = vocabulary.plan_trim(unigram, texts, anyway=True)
    proof = vocabulary.trim_encoder(unigram, trim, texts)
    assert proof == vocabulary.Proof(61, 61, 61, 0.0)
    assert len(trim.kept) < trim.tokens_before - 30, "the foreign words' tokens are gone"
    table = unigram.backbone.get_input_embeddings()
    assert np.array_equal(table.weight.detach().numpy(), rows[trim.kept])
    assert unigram.backbone.config.vocab_size == table.num_embeddings == len(trim.kept)
    assert unigram.backbone.config.pad_token_id == table.padding_idx == 1
    assert np.array_equal(unigram.encode([text for _, text in texts], "passage"), before)
    new = Tokenizer.from_str(trim.tokenizer)
    assert new.token_to_id("<mask>") == len(trim.kept) - 1, "the last special token moved with the rest"
    unknown = old.token_to_id("<unk>")
    assert new.token_to_id("<unk>") == unknown == 3
    for text in everything:  # cut finer perhaps, but unknown only where it was
        count = [ids.count(unknown) for ids in (old.encode(text).ids, new.encode(text).ids)]
        assert count[0] == count[1], text
    layout.save_classic(layout.shape_output(unigram, None), tmp_path / "model")
    plain = SentenceTransformer(str(tmp_path / "model"))
    assert np.allclose(plain.encode([t for _, t in texts], prompt_name="passage"), before, atol=2e-6)


def test_the_offline_base_loses_a_third_of_its_tokens_and_no_vector(tmp_path):
    encoder = load_encoder("offline", max_seq_length=64)
    texts = [("passage", text) for text in make_texts(500, WORDS)]
    sample = [text for _, text in texts[:5]] + ["뷁쉷 unaffordable antidisestablishmentarianism 1950년"]
    known = encoder.tokenize(sample, "query")
    before = encoder.encode(sample[:5], "passage")
    trim = vocabulary.plan_trim(encoder, texts)
    proof = vocabulary.trim_encoder(encoder, trim, texts, most_vectors=20)
    assert (proof.texts_tokenised_alike, proof.vectors_compared, proof.largest_difference) == (500, 20, 0.0)
    assert len(trim.kept) < 0.67 * trim.tokens_before
    assert np.array_equal(encoder.encode(sample[:5], "passage"), before)
    found = encoder.tokenize(sample, "query")
    unknown = encoder.tokenizer.unk_token_id
    assert unknown not in found[5] and len(found[5]) > len(known[5]), "rare words are cut finer, never unknown"
    layout.save_classic(layout.shape_output(encoder, None), tmp_path / "model")
    assert np.array_equal(load_encoder(tmp_path / "model").encode(sample[:5], "passage"), before)


def test_questions_are_cut_as_before_where_the_corpus_has_none(tiny):
    passages = [("passage", text) for text in ("한라산은 제주도에 있다.", "지리산은 남쪽에 있다.")]
    questions = ["한라산은?", "지리산은 남쪽에 있다."]
    before = tiny.encode(questions, "query")
    trim = vocabulary.plan_trim(tiny, passages, anyway=True)
    vocabulary.trim_encoder(tiny, trim, passages)
    assert np.array_equal(tiny.encode(questions, "query"), before)


def test_a_corpus_too_small_is_refused_with_the_reason(tiny):
    few = [("passage", "한라산은 제주도에 있다.")]
    with pytest.raises(ValueError, match=r"too small for a safe trim: \d+ tokens, at least 10,000 .* --trim-anyway"):
        vocabulary.plan_trim(tiny, few)
    assert len(vocabulary.plan_trim(tiny, few, anyway=True).kept) < tiny.backbone.config.vocab_size


def test_what_a_new_text_would_lose_is_estimated_and_limited(tiny, monkeypatch):
    # of 10 tokens seen, two were seen once, one of which stays anyway: 1 in 10
    counts, safe = np.array([5, 1, 1, 3, 0]), np.array([False, False, True, False, False])
    assert vocabulary.estimate_unseen(counts, safe) == 0.1
    texts = [("passage", " ".join([word, "산", "산"])) for word in MOUNTAINS]  # every mountain once
    monkeypatch.setattr(vocabulary, "LEAST_TOKENS", 10)
    with pytest.raises(ValueError, match="of the tokens of a new text would be among those removed"):
        vocabulary.plan_trim(tiny, texts)
    assert vocabulary.plan_trim(tiny, texts * 2).unseen == 0


def test_safe_tokens_are_those_that_keep_everything_known():
    tokens = ["[PAD]", "[UNK]", "a", "##a", "##b", "ab", "ba", "##ab", "가나", "##aa"]
    description = {"model": {"type": "WordPiece", "vocab": {t: i for i, t in enumerate(tokens)}}, "added_tokens": [
        {"id": 1, "content": "[UNK]"},
    ]}  # fmt: skip
    safe = vocabulary.mark_safe(description, vocabulary.list_tokens(description), 10, 0)
    # 'ba' could not be written without it (no 'b' at a word's start), nor 가나; 'ab', '##ab', '##aa' could
    assert [token for token, keep in zip(tokens, safe, strict=True) if not keep] == ["ab", "##ab", "##aa"]


def test_other_tokenizers_are_refused(tiny):
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    tiny.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])), unk_token="a", pad_token="b"
    )
    with pytest.raises(ValueError, match="of type BPE; only Unigram and WordPiece"):
        vocabulary.plan_trim(tiny, [("passage", "a")], anyway=True)


def test_a_broken_trim_is_found(tiny):
    texts = [("passage", "한라산은 제주도에 있다."), ("query", "지리산")]
    trim = vocabulary.plan_trim(tiny, texts, anyway=True)
    description = json.loads(trim.tokenizer)
    vocab = description["model"]["vocab"]
    vocab["한라산"], vocab["지리산"] = vocab["지리산"], vocab["한라산"]
    broken = vocabulary.Trim(**{**vars(trim), "tokenizer": json.dumps(description)})
    with pytest.raises(RuntimeError, match="cut into other tokens: '한라산은"):
        vocabulary.trim_encoder(tiny, broken, texts)
