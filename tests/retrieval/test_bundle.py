"""Models read and written without sentence-transformers, held against what sentence-transformers does with them."""

from __future__ import annotations

import copy
import http.server
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_examples import FAMILIES, build_model, build_transformer
from sentence_transformers import SentenceTransformer

from koret.retrieval import offline
from koret.retrieval.bundle import Bundle, ModuleBundle, open_bundle
from koret.retrieval.bundle_folder import find_snapshot, read_bundle, write_bundle
from koret.retrieval.encoder import TextEncoder, load_encoder
from koret.training.lora import get_lora_info, merge_lora, setup_lora_model

TEXTS = ["한라산의 높이는? abc", "가나다 개:냐 " * 40, "e", ""]
SHAPES = [(family, "mean", True) for family in FAMILIES] + [
    ("bert", "mean", False), ("bert", "cls", True), ("roberta", "cls", False)
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory as sentence-transformers writes it, by family, pooling and whether it normalises; made once each."""
    made: dict[tuple, Path] = {}

    def find(family: str = "bert", pooling: str = "mean", normalizes: bool = True) -> Path:
        key = family, pooling, normalizes
        if key not in made:
            folder = tmp_path_factory.mktemp("-".join(map(str, key)))
            build_model(folder, family, pooling, normalizes=normalizes)
            made[key] = folder / "model"
        return made[key]

    return find


@pytest.fixture
def model(models, tmp_path) -> Path:
    """A directory to change."""
    return shutil.copytree(models(), tmp_path / "model")


def open_reference(folder: Path, **prefixes: str) -> TextEncoder:
    """The directory as sentence-transformers loads it, behind koret's encoder."""
    plain = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    return TextEncoder(plain.requires_grad_(False), name="reference", **prefixes)


def list_files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_alike(own: TextEncoder, reference: TextEncoder, folder: Path) -> None:
    """Every byte of weights, tokens, vectors and files is the same in both."""
    assert isinstance(own.model, Bundle) and isinstance(reference.model, SentenceTransformer)
    states = own.model.state_dict(), reference.model.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype and torch.equal(tensor, states[1][name]), name
    assert own.max_seq_length == reference.max_seq_length and own.dimensions == reference.dimensions
    assert own.kinds == reference.kinds and own.pooling == reference.pooling
    assert own.model.prompts == reference.model.prompts
    assert own.prefixes == reference.prefixes
    assert own.fingerprint() == reference.fingerprint()
    for kind in ("query", "passage"):
        for a, b in zip(own.tokenize(TEXTS, kind), reference.tokenize(TEXTS, kind), strict=True):
            assert np.array_equal(a, b)
        assert np.array_equal(own.encode(TEXTS, kind), reference.encode(TEXTS, kind))
    own.save(folder / "own")
    reference.save(folder / "reference")
    written, expected = list_files(folder / "own"), list_files(folder / "reference")
    assert written.keys() == expected.keys()
    for name, content in expected.items():
        assert written[name] == content, name
    plain = reference.model.encode([own.prefixes["query"] + text for text in TEXTS], normalize_embeddings=True)
    assert np.allclose(own.encode(TEXTS, "query"), plain, atol=2e-6)


@pytest.mark.parametrize(("family", "pooling", "normalizes"), SHAPES)
def test_a_directory_is_read_and_written_as_sentence_transformers_does(models, tmp_path, family, pooling, normalizes):
    folder = models(family, pooling, normalizes)
    own = load_encoder(folder, device="cpu")
    reference = open_reference(folder, query_prefix="질문: ", passage_prefix="글: ")
    assert own.kinds == ["Transformer", "Pooling", *(["Normalize"] if normalizes else [])] and own.pooling == pooling
    assert own.similarity == "dot" and own.slow_path_reason is None
    assert_alike(own, reference, tmp_path)
    again = load_encoder(tmp_path / "own", device="cpu")
    assert isinstance(again.model, Bundle) and again.fingerprint() == own.fingerprint()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transformer_alone_is_pooled_by_its_mean(tmp_path, family):
    build_transformer(tmp_path / "plain", family)
    (tmp_path / "plain" / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')  # belongs to modules.json
    own = load_encoder(tmp_path / "plain", device="cpu")
    assert own.kinds == ["Transformer", "Pooling"] and own.pooling == "mean" and own.similarity == "cosine"
    assert own.max_seq_length == 64
    assert_alike(own, open_reference(tmp_path / "plain"), tmp_path)


def test_the_offline_base_with_its_syllables_is_the_same(tmp_path):
    plain = SentenceTransformer(str(offline.find_offline_base()), device="cpu", model_kwargs={"dtype": torch.float32})
    length = plain.max_seq_length
    offline.add_syllables(ModuleBundle(plain))
    plain.max_seq_length = length
    reference = TextEncoder(plain.requires_grad_(False), name="reference")
    assert_alike(load_encoder("offline", device="cpu"), reference, tmp_path)


def test_older_versions_of_the_files_are_read_alike(model, tmp_path):
    """As version 2 wrote them: other names of modules, a switch per pooling mode, a length of the transformer's own."""
    modules = json.loads((model / "modules.json").read_text())
    for module in modules:
        module["type"] = "sentence_transformers.models." + module["type"].rpartition(".")[2]
    (model / "modules.json").write_text(json.dumps(modules))
    shutil.rmtree(model / "2_Normalize")
    switches = {f"pooling_mode_{mode}": mode == "cls_token" for mode in ("cls_token", "mean_tokens", "max_tokens")}
    (model / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **switches}))
    (model / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": false}')
    versions = {"sentence_transformers": "2.0.0", "transformers": "4.6.1", "pytorch": "1.8.1"}
    (model / "config_sentence_transformers.json").write_text(json.dumps({"__version__": versions}))
    own = load_encoder(model, device="cpu")
    assert own.pooling == "cls" and own.max_seq_length == 20 and own.kinds[-1] == "Normalize"
    assert_alike(own, open_reference(model), tmp_path)


@pytest.mark.parametrize("said, told, expected", [(100, 512, 64), (None, 40, 40), (None, 512, 66), (20, 40, 20)])
def test_lengths_are_found_where_sentence_transformers_finds_them(model, said, told, expected):
    """Of the transformer's settings, else the tokenizer's and at most the positions there are."""
    settings = json.loads((model / "sentence_bert_config.json").read_text())
    (model / "sentence_bert_config.json").write_text(json.dumps({**settings, "max_seq_length": said}))
    edit(model / "tokenizer_config.json", model_max_length=told)
    bundle, plain = read_bundle(model), SentenceTransformer(str(model), device="cpu")
    assert bundle.max_seq_length == plain.max_seq_length
    assert load_encoder(model, device="cpu").max_seq_length == min(expected if said != 100 else 66, 66)


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


CHANGES = {
    "a prompt for every text": ("config_sentence_transformers.json", {"default_prompt_name": "query"}),
    "fewer dimensions": ("config_sentence_transformers.json", {"truncate_dim": 8}),
    "another kind of model": ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}),
    "a version to come": ("config_sentence_transformers.json", {"__version__": {"sentence_transformers": "99.0.0"}}),
    "an unknown similarity": ("config_sentence_transformers.json", {"similarity_fn_name": "maxsim"}),
    "an unknown setting of the model": ("config_sentence_transformers.json", {"requirements": {}}),
    "prompts that are no texts": ("config_sentence_transformers.json", {"prompts": {"query": ["a"]}}),
    "lower case": ("sentence_bert_config.json", {"do_lower_case": True}),
    "another task": ("sentence_bert_config.json", {"transformer_task": "fill-mask"}),
    "messages": ("sentence_bert_config.json", {"modality_config": {"message": {"method": "forward"}}}),
    "settings for the weights": ("sentence_bert_config.json", {"model_args": {"attn_implementation": "eager"}}),
    "settings for the tokenizer": ("sentence_bert_config.json", {"tokenizer_args": {"use_fast": False}}),
    "an unknown setting of the transformer": ("sentence_bert_config.json", {"query_length": 8}),
    "a length that is none": ("sentence_bert_config.json", {"max_seq_length": "64"}),
    "another pooling": ("1_Pooling/config.json", {"pooling_mode": "max"}),
    "two poolings": ("1_Pooling/config.json", {"pooling_mode": ["mean", "cls"]}),
    "prompts left out of the mean": ("1_Pooling/config.json", {"include_prompt": False}),
    "a width of its own": ("1_Pooling/config.json", {"embedding_dimension": 16}),
    "an unknown setting of the pooling": ("1_Pooling/config.json", {"weights": "idf"}),
    "tokens of unit length": ("2_Normalize/config.json", {"module_input_name": "token_embeddings"}),
    "a decoder": ("config.json", {"is_decoder": True}),
    "another architecture": ("config.json", {"model_type": "distilbert"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_understood_is_left_to_sentence_transformers(model, change):
    assert read_bundle(model) is not None
    file, changes = CHANGES[change]
    edit(model / file, **changes)
    assert read_bundle(model) is None


@pytest.mark.parametrize("file", ["adapter_config.json", "preprocessor_config.json", "processor_config.json"])
def test_files_that_mean_more_than_a_text_encoder_are_left_alone(model, file):
    (model / file).write_text("{}")
    assert read_bundle(model) is None


@pytest.mark.parametrize("file", ["modules.json", "config_sentence_transformers.json", "1_Pooling/config.json"])
def test_settings_that_do_not_read_are_left_alone(model, file):
    (model / file).write_text("{")
    assert read_bundle(model) is None


def test_modules_that_are_not_understood_are_left_alone(model):
    modules = json.loads((model / "modules.json").read_text())
    dense = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.base.modules.dense.Dense"}
    named = [{**modules[0], "path": "0_Transformer"}, *modules[1:]]
    for other in (modules[:1], [*modules, dense], modules[::-1], named, [{**m, "kwargs": ["task"]} for m in modules]):
        (model / "modules.json").write_text(json.dumps(other))
        assert read_bundle(model) is None
    (model / "modules.json").write_text(json.dumps(modules))
    assert read_bundle(model) is not None


def test_settings_of_the_first_versions_are_left_alone(model):
    (model / "sentence_bert_config.json").rename(model / "sentence_roberta_config.json")
    assert read_bundle(model) is None


def test_plain_transformers_that_pool_otherwise_are_left_alone(tmp_path):
    build_transformer(tmp_path, "bert")
    assert read_bundle(tmp_path) is not None
    edit(tmp_path / "config.json", architectures=["BertForCausalLM"])
    assert read_bundle(tmp_path) is None
    edit(tmp_path / "config.json", architectures=["BertModel"])
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert read_bundle(tmp_path) is None


def test_another_version_of_sentence_transformers_is_asked_itself(model, monkeypatch):
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "7.0.0")
    assert read_bundle(model) is None


def test_a_model_left_to_sentence_transformers_works_behind_the_same_encoder(models, model, tmp_path):
    edit(model / "1_Pooling" / "config.json", pooling_mode="max")
    encoder = load_encoder(model, device="cpu")
    assert isinstance(encoder.model, SentenceTransformer) and encoder.slow_path_reason == "pooling max"
    plain = encoder.model.encode(["글: " + text for text in TEXTS])
    assert np.allclose(encoder.encode(TEXTS, "passage"), plain, atol=2e-6)
    encoder.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "1_Pooling" / "config.json").read_text())["pooling_mode"] == "max"


def test_the_plain_forward_is_that_of_sentence_transformers(models):
    for shape in SHAPES:
        folder = models(*shape)
        own, reference = (open_bundle(e.model) for e in (load_encoder(folder, device="cpu"), open_reference(folder)))
        tokens, mask = torch.tensor([[2, 9, 30, 11, 3], [2, 20, 3, 0, 0]]), torch.ones(2, 5, dtype=torch.long)
        mask[1, 3:] = 0
        reference.model.eval()
        with torch.no_grad():
            assert torch.equal(own(tokens, mask), reference(tokens, mask)), shape


def test_a_cut_is_written_as_a_dense_layer_of_sentence_transformers(models, tmp_path):
    from sentence_transformers.base.modules import Dense, Normalize

    plain = SentenceTransformer(str(models()), device="cpu")
    del plain[2:]
    plain.append(Dense(32, 8, bias=False, activation_function=torch.nn.Identity(), init_weight=torch.eye(8, 32)))
    plain.append(Normalize())
    plain.save(str(tmp_path / "reference"), create_model_card=False)
    whole = read_bundle(models())
    given = {"prompts": whole.prompts, "similarity": whole.similarity}
    cut = Bundle(whole.backbone, whole.tokenizer, normalizes=True, dims=8, **given)
    write_bundle(cut, tmp_path / "own")
    assert list_files(tmp_path / "own") == list_files(tmp_path / "reference")
    assert cut.dimensions == 8 and cut.kinds == ["Transformer", "Pooling", "Dense", "Normalize"]
    features = plain.preprocess(["가나 다"])
    with torch.no_grad():
        vectors = cut(features["input_ids"], features["attention_mask"])
        assert torch.allclose(vectors, plain(features)["sentence_embedding"], atol=1e-7)


@pytest.mark.parametrize("load", [read_bundle, lambda folder: SentenceTransformer(str(folder), device="cpu")])
def test_adapters_are_attached_to_either_model_and_merged(models, load):
    model = setup_lora_model(load(models()), r=2)
    assert get_lora_info(model).rank == 2
    encoder = TextEncoder(model, name="tuned")
    with torch.no_grad():
        for name, parameter in encoder.backbone.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    merged = merge_lora(encoder)
    assert type(merged.model) is type(model)
    assert not any("lora" in name for name in merged.model.state_dict())
    assert np.allclose(merged.encode(TEXTS, "query"), encoder.encode(TEXTS, "query"), atol=1e-5)
    assert not np.allclose(merged.encode(TEXTS, "query"), load_encoder(models()).encode(TEXTS, "query"), atol=1e-3)


def test_a_copy_shares_nothing_with_its_original(models):
    encoder = load_encoder(models(), device="cpu")
    other = copy.deepcopy(encoder)
    other.backbone.embeddings.word_embeddings.weight.add_(1)
    other.tokenizer.model_max_length = 9
    assert encoder.max_seq_length == 64 and other.max_seq_length == 9
    assert other.fingerprint() != encoder.fingerprint() == load_encoder(models(), device="cpu").fingerprint()


COMMIT = "0123456789" * 4


def make_hub_cache(home: Path, name: str, model: Path, *, without: str = "") -> None:
    """What the hub's client leaves behind after a download."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(model, folder / "snapshots" / COMMIT, ignore=lambda _, files: {without} & set(files))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)


def run_python(code: str, home: Path, *arguments: str, hub: str | None = None) -> list:
    """What ``code`` prints last, as JSON, in a process of its own with the hub at this address, or without one."""
    import os

    reached = {"HF_HUB_OFFLINE": "1"} if hub is None else {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub, "NO_PROXY": "*"}
    environment = {**os.environ, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", **reached}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, cwd=home
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


CACHED = """
import json, sys
import torch
from koret.retrieval.encoder import TextEncoder, load_encoder
own = load_encoder(sys.argv[1], device="cpu")
kind, seen = type(own.model).__name__, "sentence_transformers" in sys.modules
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu", model_kwargs={"dtype": torch.float32}, local_files_only=True)
reference = TextEncoder(model, name="x", query_prefix=own.prefixes["query"], passage_prefix=own.prefixes["passage"])
own.save("own")
reference.save("reference")
print(json.dumps([kind, seen, own.fingerprint() == reference.fingerprint(), own.prefixes["query"]]))
"""


def test_a_name_of_the_hub_is_read_from_the_cache(models, tmp_path):
    make_hub_cache(tmp_path, "somebody/tiny", models())
    assert run_python(CACHED, tmp_path, "somebody/tiny") == ["Bundle", False, True, "질문: "]
    assert list_files(tmp_path / "own") == list_files(tmp_path / "reference")


@pytest.fixture
def hub():
    """The address of a server that says of every model that its last commit is COMMIT, and has no file."""
    asked: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200 if self.path == "/" else 404)
            self.end_headers()

        def do_GET(self):
            asked.append(self.path)
            known = self.path.startswith("/api/models/somebody/tiny")
            body = json.dumps({"id": "somebody/tiny", "sha": COMMIT} if known else {"error": "not found"}).encode()
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


READ = """
import json, sys
from pathlib import Path
from koret.retrieval.bundle_folder import find_snapshot, is_latest
from koret.retrieval.encoder import load_encoder
model = load_encoder(sys.argv[1], device="cpu").model
seen = "sentence_transformers" in sys.modules
older = is_latest(sys.argv[1], Path("9" * 40)), is_latest("somebody/gone", find_snapshot(sys.argv[1]))
print(json.dumps([type(model).__name__, seen, *older]))
"""


def test_the_cache_is_read_where_the_hub_has_no_later_commit(models, tmp_path, hub):
    make_hub_cache(tmp_path, "somebody/tiny", models())
    address, asked = hub
    assert run_python(READ, tmp_path, "somebody/tiny", hub=address) == ["Bundle", False, False, False]
    assert sum(path.startswith("/api/models/") for path in asked) == 3
    assert not [path for path in asked if "resolve" in path]  # no file was asked for


def test_a_download_that_is_not_whole_is_left_to_sentence_transformers(models, tmp_path, monkeypatch):
    make_hub_cache(tmp_path, "somebody/tiny", models(), without="tokenizer.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find_snapshot("somebody/tiny") is None
    assert find_snapshot("somebody/else") is None and find_snapshot("tiny") is None and find_snapshot("a/b/c") is None


HEAVY = ("sentence_transformers", "sklearn", "datasets", "joblib", "pandas")
START = f"""
import json, sys
from koret import cli
from koret.retrieval.encoder import load_encoder
load_encoder("offline", device="cpu").encode(["한라산의 높이는?"], "query")
seen = [[name for name in {HEAVY} if name in sys.modules]]
small = "--train-split 0.7 --max-seq-length 32 --max-samples 16 --eval-samples 8 --eval-corpus-size 16 --batch-size 8"
small += " --passage-tokens 256 --num-epochs 1 --num-workers 0 --precision fp32 --log-dir logs"
assert cli.main(["train", "--model-name", "offline", "--dataset-root", "sample", *small.split()]) == 0
seen.append([name for name in {HEAVY} if name in sys.modules])
print(json.dumps(seen))
"""
ASK = f"""
import json, sys
from koret import cli
from koret.retrieval.encoder import load_encoder
load_encoder(sys.argv[1], device="cpu").encode(["한라산의 높이는?"], "query")
seen = [[name for name in {HEAVY} if name in sys.modules]]
assert cli.main(["search", sys.argv[1], "한라산의 높이는?"]) == 0
seen.append([name for name in {HEAVY} if name in sys.modules])
print(json.dumps(seen))
"""


def test_training_and_searching_import_no_library_they_do_not_need(tmp_path):
    assert run_python(START, tmp_path) == [[], []]
    (run,) = (tmp_path / "logs").glob("run_*")
    assert run_python(ASK, tmp_path, str(run)) == [[], []]
