"""TextEncoder and E5KorQuADInference against plain sentence-transformers, on the offline base."""

from __future__ import annotations

import hashlib
import itertools
import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from koret.retrieval import packed
from koret.retrieval.attention import AttentionPath
from koret.retrieval.encoder import TextEncoder, cut_by_tokens, load_encoder
from koret.retrieval.inference import E5KorQuADInference

TEXTS = [
    "한라산의 높이는 얼마인가?",
    "값이 깎인 외국 떡볶이의 뒷맛 " * 60,
    "e",
    "세종은 1446년에 훈민정음을 반포하였다.",
    "The quick brown fox, 빠른 갈색 여우",
]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.set_num_threads(1)
    return load_encoder("offline", max_seq_length=128)


@pytest.fixture(scope="module")
def plain(encoder, tmp_path_factory) -> SentenceTransformer:
    folder = tmp_path_factory.mktemp("plain")
    encoder.save(folder)
    return SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize("kind", ["query", "passage"])
def test_vectors_equal_those_of_sentence_transformers(encoder, plain, kind):
    prefixed = [f"{kind}: {text}" for text in TEXTS]
    assert np.allclose(encoder.encode(TEXTS, kind), plain.encode(prefixed), atol=2e-6)
    assert encoder.path.startswith("padding-free")


def test_saved_encoder_gives_the_same_vectors_in_plain_sentence_transformers(encoder, tmp_path):
    encoder.save(tmp_path / "model")
    plain = SentenceTransformer(str(tmp_path / "model"))
    assert plain.max_seq_length == 128
    expected = encoder.encode(TEXTS, "query")
    assert np.allclose(plain.encode(TEXTS, prompt_name="query"), expected, atol=2e-6)
    assert np.array_equal(load_encoder(tmp_path / "model").encode(TEXTS, "query"), expected)
    assert load_encoder(tmp_path / "model").fingerprint() == encoder.fingerprint()
    assert not list(tmp_path.rglob("*.bin"))


def test_fingerprint_is_the_digest_of_every_byte_in_order(encoder):
    expected = hashlib.sha256()
    for name, tensor in sorted(encoder.model.state_dict().items()):
        expected.update(name.encode() + tensor.numpy().tobytes())
    expected.update(encoder._describe_forward().encode())
    parts = json.loads(encoder.tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    expected.update(json.dumps(parts, ensure_ascii=False).encode())
    expected.update(repr((encoder.prefixes, encoder.max_seq_length)).encode())
    assert encoder.fingerprint() == expected.hexdigest()


def test_released_copies_are_made_again(encoder):
    expected = encoder.encode(TEXTS, "query")
    encoder.release()
    assert np.array_equal(encoder.encode(TEXTS, "query"), expected)


def test_fingerprint_follows_weights_and_length(encoder):
    before = encoder.fingerprint()
    weight = encoder.backbone.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight[0, 0] += 1
        changed = encoder.fingerprint()
        weight[0, 0] -= 1
    assert changed != before
    assert load_encoder("offline", max_seq_length=64).fingerprint() != before


def test_fingerprint_follows_what_the_weights_are_computed_with(encoder, tmp_path):
    encoder.save(tmp_path)
    again = load_encoder(tmp_path, max_seq_length=128)
    assert again.fingerprint() == encoder.fingerprint()
    for file, name, value in (
        ("1_Pooling/config.json", "pooling_mode", "cls"),
        ("config.json", "num_attention_heads", 6),
        ("config.json", "hidden_act", "relu"),
    ):
        written = (tmp_path / file).read_text()
        (tmp_path / file).write_text(json.dumps(json.loads(written) | {name: value}))
        changed = load_encoder(tmp_path, max_seq_length=128)
        (tmp_path / file).write_text(written)
        assert not np.allclose(changed.encode(TEXTS, "query"), encoder.encode(TEXTS, "query"), atol=1e-3)
        assert changed.fingerprint() != encoder.fingerprint(), name


def test_padded_path_gives_the_same_vectors(encoder):
    slow = TextEncoder(encoder.model, name="slow")
    slow.slow_path_reason = "forced"
    assert np.allclose(slow.encode(TEXTS, "passage"), encoder.encode(TEXTS, "passage"), atol=2e-6)


def test_the_plain_embedding_of_a_text_is_that_of_sentence_transformers(encoder, plain):
    for text in TEXTS:
        assert np.allclose(encoder.embed_plainly(text).numpy(), plain.encode(text), atol=1e-6)


def test_the_path_says_how_a_device_keeps_texts_apart(encoder, monkeypatch):
    words = "padded to the longest text (float32 has no variable-length kernel)"
    monkeypatch.setattr(packed, "choose_path", lambda *_: AttentionPath("padded", None, words))
    other = TextEncoder(encoder.model, name="other")
    assert other.path == words
    assert np.allclose(other.encode(TEXTS, "passage"), encoder.encode(TEXTS, "passage"), atol=2e-6)


def test_long_texts_are_clipped_before_tokenising_without_changing_their_ids(encoder):
    text = "제주도의 역사와 문화 " * 2000
    (clipped,) = encoder.tokenize([text], "passage")
    whole = encoder.tokenizer("passage: " + text, truncation=True, max_length=128)["input_ids"]
    assert clipped.tolist() == whole


def test_what_stands_behind_blanks_and_endless_words_is_read(encoder):
    texts = [
        "짧은 글",
        " " * 9000 + "제주도의 역사",
        "ㅋ" * 9000 + " 한라산",
        "a\n" * 5000,
        "가" + "\t" * 60_000 + "나",
    ]
    found = encoder.tokenize(texts, "passage")
    for text, ids in zip(texts, found, strict=True):
        whole = encoder.tokenizer("passage: " + text, truncation=True, max_length=128)["input_ids"]
        assert ids.tolist() == whole
    assert len(found[1]) > 6 and encoder.tokenize([], "query") == []


def test_non_finite_weights_are_refused_by_name():
    broken = load_encoder("offline", max_seq_length=32)
    with torch.no_grad():
        broken.backbone.embeddings.LayerNorm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="한라산"):
        broken.encode(TEXTS, "query")


@pytest.mark.parametrize("padded", [True, False])
def test_micro_batches_hold_every_text_once_within_the_budget(padded):
    rng = np.random.default_rng(0)
    ids = [np.zeros(n, np.int32) for n in rng.integers(1, 300, 200)]
    order = sorted(range(200), key=lambda i: -len(ids[i]))
    batches = cut_by_tokens(order, ids, 1000, padded=padded)

    def cost(batch):
        lengths = [len(ids[i]) for i in batch]
        return max(lengths) * len(lengths) if padded else sum(lengths)

    assert [i for batch in batches for i in batch] == order
    for batch, following in itertools.zip_longest(batches, batches[1:]):
        assert len(batch) == 1 or cost(batch) <= 1000
        assert following is None or cost([*batch, following[0]]) > 1000  # none is cut too early


def test_missing_models_and_impossible_lengths_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="--model-name offline"):
        load_encoder("nobody/no-such-model")
    with pytest.raises(ValueError, match="no model loads from it"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match="at most 512"):
        load_encoder("offline", max_seq_length=1024)


def test_inference_search_ranks_by_cosine_and_keeps_ties_in_order(encoder, tmp_path):
    encoder.save(tmp_path / "model")
    model = E5KorQuADInference(tmp_path / "model", device="cpu")
    passages = [TEXTS[3], TEXTS[0], TEXTS[3]]
    assert model.encode_query("질문").shape == (384,) and model.encode_passage("문단").shape == (384,)
    assert model.encode_queries(["가", "나"]).shape == model.encode_passages(["가", "나"]).shape == (2, 384)
    query = model.encode_query("훈민정음은 언제 반포되었는가?")
    scores = model.compute_similarity(query, model.encode_passages(passages))
    assert scores.shape == (3,) and model.compute_similarity(
        np.stack([query] * 2), model.encode_passages(passages)
    ).shape == (2, 3)
    assert np.isclose(np.linalg.norm(query), 1, atol=1e-6)
    hits = model.search("훈민정음은 언제 반포되었는가?", passages, top_k=10)
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    assert set(hits[0]) == {"rank", "passage", "score", "index"}
    assert [hit["index"] for hit in hits if hit["passage"] == TEXTS[3]] == [0, 2]
    for hit in hits:
        assert np.isclose(hit["score"], scores[hit["index"]], atol=1e-6)
    assert model.batch_search(["훈민정음은 언제 반포되었는가?"], passages, top_k=10) == [hits]
    assert model.search("질문", []) == []


def test_inference_refuses_what_is_not_text(encoder, tmp_path):
    encoder.save(tmp_path / "model")
    model = E5KorQuADInference(tmp_path / "model")
    with pytest.raises(ValueError, match="wrap it in a list"):
        model.encode_queries("한 질문")
    with pytest.raises(ValueError, match=r"passages\[1\]"):
        model.encode_passages(["가", None])
    with pytest.raises(ValueError, match="top_k"):
        model.search("질문", ["문단"], top_k=0)
    with pytest.raises(ValueError, match="do not fit"):
        model.compute_similarity(np.zeros(3), np.zeros((2, 4)))
