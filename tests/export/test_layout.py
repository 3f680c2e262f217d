"""The merged folder against plain sentence-transformers, and the fields that other servers read."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from export_examples import build_unigram_model
from safetensors import safe_open
from sentence_transformers import SentenceTransformer

from koret.export import layout
from koret.export.runtime import PlainEncoder, open_exported

TEXTS = ["한라산의 높이는 얼마인가?", "제주도 사람들은 축제를 연다. " * 9, "e"]


@pytest.mark.parametrize("dims", [None, 12])
def test_the_folder_gives_the_cut_vectors_of_unit_length_in_plain_sentence_transformers(tiny, tmp_path, dims):
    expected = tiny.encode(TEXTS, "query")[:, :dims]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    layout.save_classic(layout.shape_output(tiny, dims), tmp_path / "model")
    plain = SentenceTransformer(str(tmp_path / "model"))
    vectors = plain.encode(TEXTS, prompt_name="query")
    assert vectors.shape == (3, dims or 32)
    assert np.allclose(vectors, expected, atol=2e-6)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert plain.max_seq_length == 48


@pytest.fixture(scope="module")
def unigram():
    return build_unigram_model(["한라산은 제주도에 있다. 세종은 훈민정음을 반포하였다."] * 40, 60)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("dims", [None, 8])
def test_other_servers_find_the_files_and_fields_they_read(family, dims, tiny, unigram, tmp_path):
    """By their own readers: router/src/lib.rs and backends/candle of text-embeddings-inference (serde: a field that is
    missing or of another type is an error), vllm/transformers_utils/config.py, sentence-transformers for infinity."""
    folder, encoder = tmp_path / "model", tiny if family == "bert" else unigram
    layout.save_classic(layout.shape_output(copy.deepcopy(encoder), dims), folder)
    last = "3_Normalize" if dims else "2_Normalize"
    dense = ["2_Dense/config.json", "2_Dense/model.safetensors"] if dims else []
    assert sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()) == sorted([
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json",
        f"{last}/config.json", *dense,
    ])  # fmt: skip

    modules = read(folder / "modules.json")
    kinds = ("Transformer", "Pooling", *(["Dense"] if dims else []), "Normalize")
    assert [module["type"] for module in modules] == [f"sentence_transformers.models.{kind}" for kind in kinds]
    assert [module["path"] for module in modules] == ["", "1_Pooling", *(["2_Dense"] if dims else []), last]

    config = read(folder / "config.json")
    whole = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
             "max_position_embeddings", "type_vocab_size", "pad_token_id")  # fmt: skip
    assert all(type(config[name]) is int for name in whole)
    numbers = ("hidden_dropout_prob", "initializer_range", "layer_norm_eps")
    assert all(isinstance(config[name], int | float) for name in numbers)
    assert config["model_type"] == family and config["hidden_act"] == "gelu"
    assert config["position_embedding_type"] == "absolute" and config["torch_dtype"] == "float32"
    assert config["architectures"] == [{"bert": "BertModel", "xlm-roberta": "XLMRobertaModel"}[family]]

    with safe_open(folder / "model.safetensors", "np") as weights:
        names = set(weights.keys())
        assert weights.get_slice("embeddings.word_embeddings.weight").get_shape() == [config["vocab_size"], 32]
    assert {"embeddings.LayerNorm.weight", "encoder.layer.1.attention.self.query.bias",
            "encoder.layer.0.output.dense.weight"} <= names  # fmt: skip
    assert not [name for name in names if not name.startswith(("embeddings.", "encoder.", "pooler."))]

    pooling = read(folder / "1_Pooling" / "config.json")
    chosen = [name for name, value in pooling.items() if name.startswith("pooling_mode_") and value]
    assert chosen == ["pooling_mode_mean_tokens"] and pooling["word_embedding_dimension"] == 32
    assert {"pooling_mode_cls_token", "pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens"} <= pooling.keys()
    if dims:
        assert read(folder / "2_Dense" / "config.json") == {
            "in_features": 32, "out_features": 8, "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }  # fmt: skip
        with safe_open(folder / "2_Dense" / "model.safetensors", "np") as weights:
            assert np.array_equal(weights.get_tensor("linear.weight"), np.eye(8, 32))
    assert read(folder / "sentence_bert_config.json")["max_seq_length"] == 48
    prompts = read(folder / "config_sentence_transformers.json")["prompts"]
    assert prompts == {"query": "query: ", "passage": "passage: ", "document": "passage: "}
    assert read(folder / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer = read(folder / "tokenizer.json")
    assert tokenizer["truncation"] is None and tokenizer["padding"] is None


def read(file):
    return json.loads(file.read_bytes())


def test_what_cannot_be_exported_is_refused_in_words(tiny):
    with pytest.raises(ValueError, match=r"--dims 33: .* has 32 dimensions"):
        layout.check_dims(tiny, 33)
    layout.check_modules(tiny)
    with pytest.raises(ValueError, match="cut to fewer dimensions already"):
        layout.check_modules(layout.shape_output(tiny, 8))


def test_an_exported_folder_is_opened_by_what_it_holds(tiny, tmp_path):
    layout.save_classic(layout.shape_output(tiny, None), tmp_path / "model")
    assert isinstance(open_exported(tmp_path / "model"), PlainEncoder)
    with pytest.raises(FileNotFoundError, match="koret export"):
        open_exported(tmp_path)
