"""koret export from end to end: files that other engines load, proofs that can fail, folders whole or absent."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import numpy as np
import pytest

from koret import cli
from koret.export import exporting, parity
from koret.export.runtime import open_exported
from koret.retrieval.encoder import load_encoder

TEXTS = ["한라산의 높이는 얼마인가?", "제주도 사람들은 축제를 연다. " * 9, "e"]


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    monkeypatch.setattr(parity, "SPEED_QUERIES", 8)


def export(run: Path, to: str, out: Path, **given):
    return exporting.export_model(run, to, out=out, num_workers=0, **given)


def test_onnx_runtime_alone_gives_the_vectors(run, tmp_path):
    import onnxruntime

    done = export(run, "onnx", tmp_path / "out")
    assert done.parity.passed and done.folder == tmp_path / "out"
    session = onnxruntime.InferenceSession(str(done.folder / "onnx" / "model.onnx"))
    encoder = load_encoder(run)
    for kind in ("query", "passage"):
        for text, expected in zip(TEXTS, encoder.encode(TEXTS, kind), strict=True):
            (ids,) = encoder.tokenize([text], kind)
            feed = {"input_ids": ids[None].astype(np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
            (states,) = session.run(["last_hidden_state"], feed)
            vector = states[0].mean(axis=0)
            assert np.allclose(vector / np.linalg.norm(vector), expected, atol=5e-6)
    assert np.allclose(open_exported(done.folder).encode(TEXTS, "query"), encoder.encode(TEXTS, "query"), atol=5e-6)
    assert not (done.folder / "model.safetensors").exists()
    saved = json.loads((done.folder / "parity.json").read_bytes())
    assert saved["passed"] and saved["ndcg@10"]["difference"]["mean"] == 0 and saved["task"]["queries"] == 16
    assert saved["speed"]["after"]["texts_per_second"] > 0 and saved["bytes"]["after"] > 0
    record = json.loads((done.folder / "export.json").read_bytes())
    assert (record["kind"], record["tuned"], record["dimensions"]) == ("onnx", True, 32)
    assert "Export: onnx" in (done.folder / "README.md").read_text()


@pytest.mark.slow
def test_int8_files_are_smaller_and_near_the_original(run, tmp_path):
    free = {"limit_ndcg": 2.0, "limit_cosine": 0.5}  # random weights: what is tested is the files
    small = export(run, "openvino", tmp_path / "openvino8", int8=True, dims=16, **free)
    coarse = export(run, "onnx", tmp_path / "onnx8", int8=True, **free)
    for done in (small, coarse):
        assert done.parity.size[1] < 0.6 * done.parity.size[0]
    assert (small.folder / "openvino" / "openvino_model_qint8_quantized.xml").is_file()
    assert (coarse.folder / "onnx" / "model_qint8.onnx").is_file()
    assert [file.name for file in (coarse.folder / "onnx").iterdir()] == ["model_qint8.onnx"]
    vectors = open_exported(small.folder).encode(TEXTS, "query")
    assert vectors.shape == (3, 16) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    expected = load_encoder(run).encode(TEXTS, "query")
    assert np.einsum("nd,nd->n", open_exported(coarse.folder).encode(TEXTS, "query"), expected).min() > 0.9


@pytest.mark.slow
def test_openvino_gives_the_vectors_whatever_stands_beside_a_text(run, tmp_path):
    done = export(run, "openvino", tmp_path / "out", limit_ndcg=2.0)  # bfloat16 where the processor has it
    encoder, expected = open_exported(done.folder), load_encoder(run).encode(TEXTS, "query")
    together = encoder.encode(TEXTS, "query")
    alone = np.concatenate([encoder.encode([text], "query") for text in TEXTS])
    assert np.einsum("nd,nd->n", together, expected).min() > 0.999
    assert np.einsum("nd,nd->n", together, alone).min() > 0.999


def test_strength_dims_bits_and_trim_together(run, questions, tmp_path, monkeypatch):
    monkeypatch.chdir(run.parent)
    done = export(
        run, "merged", tmp_path / "out", lora_strength=0.5, dims=24, binary=True, trim_vocab=questions,
        trim_anyway=True, limit_ndcg=2.0,
    )  # fmt: skip
    base, tuned = load_encoder(run.parent / "base"), load_encoder(run)
    middle = base.model.state_dict()["0.model.encoder.layer.0.output.dense.weight"].lerp(
        tuned.model.state_dict()["0.model.encoder.layer.0.output.dense.weight"], 0.5
    )
    saved = load_encoder(done.folder)
    assert np.array_equal(saved.model.state_dict()["0.model.encoder.layer.0.output.dense.weight"], middle)
    report = done.parity.to_dict()
    assert report["cosine"]["query"]["worst"] > 0.99999, "the half-way model is the original here"
    assert [point["weight"] for point in report["strength"]["points"]] == [0.0, 0.5, 1.0]
    assert report["trim"]["tokens_after"] < report["trim"]["tokens_before"]
    assert report["trim"]["proof"]["texts"] == report["trim"]["proof"]["texts_tokenised_alike"] == 32
    assert report["trim"]["proof"]["largest_difference"] == 0
    assert report["same_tokens"] == {"query": 1.0, "passage": 1.0}
    assert {way["name"] for way in report["stored"]} >= {"float32", "binary", "binary, int8 rescoring"}
    assert done.record["vectors"] == {"search": "ubinary", "rescore": "int8", "oversample": 4}
    assert done.record["dimensions"] == 24
    assert report["strength"]["model"] == run.name
    for name in ("export.json", "parity.json", "README.md"):  # a folder that is shipped
        assert str(run.parent) not in (done.folder / name).read_text(encoding="utf-8"), name


def test_what_was_forgotten_elsewhere_is_said_at_every_strength(run, tmp_path, capsys):
    elsewhere = write_beir(tmp_path / "elsewhere")
    command = ["export", str(run), "--to", "merged", "--num-workers", "0", "--extra", str(elsewhere)]
    assert cli.main([*command, "--out", str(tmp_path / "whole")]) == 0
    shown = capsys.readouterr().out
    assert "100% of the tuning on elsewhere: nDCG@10 " in shown and "all of it" not in shown
    assert cli.main([*command, "--out", str(tmp_path / "half"), "--lora-strength", "0.5"]) == 0
    card = (tmp_path / "half" / "README.md").read_text(encoding="utf-8")
    points = json.loads((tmp_path / "half" / "parity.json").read_bytes())["strength"]["points"]
    assert [point["weight"] for point in points] == [0, 0.5, 1]
    (home,) = set(points[0]["scores"]) - {"elsewhere"}
    for task in (home, "elsewhere"):
        means = [point["scores"][task]["mean"] for point in points]
        found = [points[n]["verdicts"][task]["verdict"] for n in (1, 2)]
        assert (
            f"50% of the tuning on {task}: nDCG@10 {means[0]:.3f} -> {means[1]:.3f}, {found[0]} "
            f"(all of it: {means[2]:.3f}, {found[1]})"
        ) in card
    assert cli.main([*command[:-2], "--out", str(tmp_path / "alone"), "--lora-strength", "0"]) == 0
    shown = capsys.readouterr().out
    assert "0% of the tuning" in shown and "the base itself" in shown and "elsewhere was not asked" in shown
    base = load_encoder(run.parent / "base")
    assert np.array_equal(load_encoder(tmp_path / "alone").encode(TEXTS, "query"), base.encode(TEXTS, "query"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        export(run, "merged", tmp_path / "none", extra=[tmp_path / "nowhere"])
    assert not (tmp_path / "none").exists()


def write_beir(folder: Path) -> Path:
    """Four texts, a question to each, in the layout of BEIR."""
    (folder / "qrels").mkdir(parents=True)
    places = ["제주도", "부산", "강릉", "전주"]
    rows = [json.dumps({"_id": f"d{i}", "text": f"{place} 사람들은 축제를 연다."}) for i, place in enumerate(places)]
    (folder / "corpus.jsonl").write_text("\n".join(rows), encoding="utf-8")
    rows = [json.dumps({"_id": f"q{i}", "text": f"{place} 축제"}) for i, place in enumerate(places)]
    (folder / "queries.jsonl").write_text("\n".join(rows), encoding="utf-8")
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(4))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged, encoding="utf-8")
    return folder


def test_an_export_that_ranks_otherwise_fails_by_name_and_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    real = exporting.open_exported

    class Shuffled:
        def __init__(self, inner):
            self.inner, self.name, self.dimensions = inner, inner.name, inner.dimensions

        def tokenize(self, texts, kind):
            return self.inner.tokenize(texts, kind)

        def encode(self, texts, kind, *, progress=False):
            vectors = self.inner.encode(texts, kind)
            return vectors[:, ::-1].copy() if kind == "query" else vectors

    monkeypatch.setattr(exporting, "open_exported", lambda folder, threads=None: Shuffled(real(folder)))
    command = ["export", str(run), "--to", "merged", "--out", str(tmp_path / "out"), "--num-workers", "0"]
    assert cli.main(command) == 1
    shown = capsys.readouterr()
    assert "worst cosine of a query is" in shown.err and "at least 0.99999 is needed" in shown.err
    assert "lower bound of the nDCG@10 difference" in shown.err and "nothing was written" in shown.err
    assert "worst cosine of a passage" not in shown.err, "what held is not named"
    assert "FAILED" in shown.out
    assert list(tmp_path.iterdir()) == []
    assert cli.main([*command, "--keep-failed", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]


def test_wrong_requests_are_refused_before_anything_is_written(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    for given, message in (
        ({"to": "tensorrt"}, "cannot export to 'tensorrt'; choose one of merged, onnx, openvino"),
        ({"to": "merged", "int8": True}, "--int8 needs an engine"),
        ({"to": "merged", "dims": 33}, "has 32 dimensions"),
        ({"to": "merged", "dims": 0}, "--dims must be at least 1"),
        ({"to": "merged", "limit_ndcg": float("nan")}, "--limit-ndcg must be a number from 0 on, not nan"),
        ({"to": "merged", "limit_ndcg": -1.0}, "--limit-ndcg must be a number from 0 on"),
        ({"to": "merged", "limit_cosine": 1.1}, "--limit-cosine must lie between -1 and 1"),
        ({"to": "merged", "max_queries": 0}, "--max-queries must be at least 1, not 0"),
        ({"to": "merged", "trim_vocab": "nowhere.txt"}, "no such file or folder: nowhere.txt"),
        ({"to": "merged", "lora_strength": 1.5}, "between 0 .* and 1"),
        ({"to": "merged", "trim_vocab": "sample.txt"}, "sample.txt"),
        ({"to": "merged", "trim_vocab": run.parent.parent / "nothing"}, "nothing"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            exporting.export_model(run, out=out, num_workers=0, **given)
    with pytest.raises(ValueError, match="no run of koret|not a run of koret"):
        exporting.export_model(run.parent / "base", "merged", out=out)
    for given in ({"lora_strength": 0.5}, {"extra": [tmp_path]}):
        with pytest.raises(ValueError, match="what it was tuned from is not known"):
            exporting.export_model(run.parent / "base", "merged", out=out, **given)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is no export of koret"):
        export(run, "merged", tmp_path / "mine")
    importing = builtins.__import__
    monkeypatch.setattr(
        exporting.conversion.importlib, "import_module",
        lambda name: (_ for _ in ()).throw(ImportError(name)) if name == "nncf" else importing(name),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"needs nncf: pip install 'koret\[export\]'"):
        export(run, "openvino", out, int8=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
    assert cli.main(["export", str(tmp_path / "nothing"), "--to", "merged"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_base_is_exported_as_it_is_and_said_to_be_no_run(run, questions, tmp_path, capsys):
    base, out = run.parent / "base", tmp_path / "out"
    command = ["export", str(base), "--to", "merged", "--dataset-root", str(questions), "--num-workers", "0"]
    assert cli.main([*command, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "base is no run of koret: exported as it is, never tuned" in shown
    assert f'SentenceTransformer("{out}")' in shown.replace("\n", "")
    assert json.loads((out / "export.json").read_bytes())["tuned"] is False
    assert cli.main([*command, "--out", str(out), "--json"]) == 0, "an export may replace an export"
    assert json.loads(capsys.readouterr().out)["passed"] is True
