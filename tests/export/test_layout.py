"""The merged folder against plain sentence-transformers, and the fields that other servers read."""

from __future__ import annotations

import json

import numpy as np
import pytest
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


def test_other_servers_find_the_fields_they_read(tiny, tmp_path):
    folder = tmp_path / "model"
    layout.save_classic(layout.shape_output(tiny, 8), folder)
    modules = json.loads((folder / "modules.json").read_bytes())
    assert [module["type"] for module in modules] == [
        f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling", "Dense", "Normalize")
    ]
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Dense", "3_Normalize"]
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_bytes())
    assert pooling["pooling_mode_mean_tokens"] is True and pooling["pooling_mode_cls_token"] is False
    assert pooling["word_embedding_dimension"] == 32
    assert json.loads((folder / "2_Dense" / "config.json").read_bytes())["out_features"] == 8
    assert json.loads((folder / "sentence_bert_config.json").read_bytes())["max_seq_length"] == 48
    prompts = json.loads((folder / "config_sentence_transformers.json").read_bytes())["prompts"]
    assert prompts == {"query": "query: ", "passage": "passage: ", "document": "passage: "}
    assert json.loads((folder / "tokenizer_config.json").read_bytes())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert json.loads((folder / "config.json").read_bytes())["torch_dtype"] == "float32"
    assert (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()
    assert not list(folder.rglob("*.bin"))


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
