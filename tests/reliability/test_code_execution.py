"""Nothing read runs code, nothing saved tells secrets: probes with a file that appears when code has run."""

from __future__ import annotations

import json
import logging
import os
import pickle
import pickletools
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from koret import cli
from koret.commands.screen import open_console, print_json
from koret.data.loader import load_dataset
from koret.data.sources import DataError
from koret.privacy import make_printable
from koret.retrieval.encoder import load_encoder
from koret.training.trainer import EmbeddingTrainer


@pytest.fixture
def canary(tmp_path) -> Path:
    """A file that must not be there at the end: every payload makes it."""
    path = tmp_path / "code-has-run"
    yield path
    assert not path.exists()


class Payload:
    """Unpickling this makes the file ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A sound model directory to spoil, in the form koret saves."""
    folder = tmp_path / "model"
    load_encoder(tiny_model, max_seq_length=48, device="cpu").save(folder)
    return folder


def edit(path: Path, **changes) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, **changes}))


def write_module(folder: Path, name: str, canary: Path) -> None:
    """A Python file that makes the canary when imported, with classes of likely names."""
    names = ("Evil", "EvilModel", "EvilTokenizer", "EvilConfig")
    classes = "".join(f"class {n}:\n    pass\n" for n in names)
    (folder / f"{name}.py").write_text(f"open({str(canary)!r}, 'w').close()\n{classes}")


def load_or_refuse(folder: Path) -> str:
    """What the refusal says, or nothing where the model loads (without what was planted) and gives vectors."""
    try:
        vectors = load_encoder(folder, device="cpu").encode(["가나 다라"], "query")
    except ValueError as error:
        return str(error)
    assert np.isfinite(vectors).all()
    return ""


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("form", ["torch", "pickle", "old torch"])
def test_pickled_weights_that_carry_code_are_refused(model, canary, form):
    (model / "model.safetensors").unlink()
    if form == "pickle":
        (model / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Payload(canary)}))
    else:
        torch.save({"w": Payload(canary)}, model / "pytorch_model.bin", _use_new_zipfile_serialization=form == "torch")
    assert "no model loads from it" in load_or_refuse(model)


def test_pickled_weights_of_tensors_are_read_and_announced(model, canary, caplog):
    expected = load_encoder(model, device="cpu").encode(["가나"], "query")
    from safetensors.torch import load_file

    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    assert not caplog.records
    (model / "model.safetensors").unlink()
    with caplog.at_level(logging.WARNING, "koret"):
        assert np.array_equal(load_encoder(model, device="cpu").encode(["가나"], "query"), expected)
    assert "pytorch_model.bin" in caplog.text and "read as tensors only" in caplog.text


def test_pickles_beside_good_weights_are_not_looked_at(model, canary):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "x.pkl"):
        (model / name).write_bytes(pickle.dumps(Payload(canary)))
    assert load_or_refuse(model) == ""


@pytest.mark.parametrize("kind", ["os.system", "evil_module.Evil", "evil_module", "builtins.exec", "__main__.Evil"])
def test_a_module_type_is_no_way_to_a_class_of_choice(model, canary, kind, monkeypatch):
    write_module(model, "evil_module", canary)
    monkeypatch.chdir(model)
    modules = json.loads((model / "modules.json").read_text())
    modules[-1]["type"] = kind
    (model / "modules.json").write_text(json.dumps(modules))
    assert load_or_refuse(model)


def test_an_activation_is_no_way_to_a_function_of_choice(model, canary):
    write_module(model, "evil_module", canary)
    modules = json.loads((model / "modules.json").read_text())
    modules.append({"idx": 9, "name": "9", "path": "9_Dense", "type": "sentence_transformers.models.Dense"})
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "9_Dense").mkdir()
    settings = {"in_features": 32, "out_features": 32, "bias": True, "activation_function": "evil_module.Evil"}
    (model / "9_Dense" / "config.json").write_text(json.dumps(settings))
    assert load_or_refuse(model)


def test_a_module_path_does_not_climb(model, canary, tmp_path):
    outside = tmp_path / "outside"
    shutil.copytree(model, outside)
    (outside / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(canary)))
    (outside / "model.safetensors").unlink()
    modules = json.loads((model / "modules.json").read_text())
    modules[0]["path"] = "../outside"
    (model / "modules.json").write_text(json.dumps(modules))
    assert load_or_refuse(model)


def test_code_named_in_config_json_is_not_run(model, canary):
    write_module(model, "modeling_evil", canary)
    targets = {"AutoModel": "modeling_evil.EvilModel", "AutoConfig": "modeling_evil.EvilConfig"}
    edit(model / "config.json", auto_map=targets, trust_remote_code=True)
    assert load_or_refuse(model) == ""  # a known architecture: its own class is used
    edit(model / "config.json", model_type="evil", architectures=["EvilModel"])
    assert load_or_refuse(model)


def test_code_named_in_tokenizer_config_is_not_run(model, canary):
    write_module(model, "tokenization_evil", canary)
    edit(
        model / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"]},
        trust_remote_code=True,
    )
    load_or_refuse(model)  # read with the ordinary class, or refused: the canary decides


def test_an_adapter_cannot_name_weights_that_run_code(model, canary, tmp_path):
    evil = tmp_path / "evil"
    shutil.copytree(model, evil)
    (evil / "model.safetensors").unlink()
    (evil / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(canary)))
    (model / "model.safetensors").unlink()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(evil), "r": 2, "target_modules": ["query"]}
    (model / "adapter_config.json").write_text(json.dumps(adapter))
    (model / "adapter_model.bin").write_bytes(pickle.dumps(Payload(canary)))
    assert load_or_refuse(model)


@pytest.mark.parametrize("junk", [b"", b"\0" * 64, b"\xff" * 8 + b"{}", (100 << 30).to_bytes(8, "little") + b"{}"])
def test_weights_that_are_none_are_refused(model, canary, junk):
    (model / "model.safetensors").write_bytes(junk)
    assert "no model loads from it" in load_or_refuse(model)


def test_there_is_no_option_to_trust_code():
    words = (
        "trust_remote_code=True",
        "weights_only=False",
        "allow_pickle=True",
        "pickle.load",
        "torch.load(",
        "yaml.load(",
    )
    for file in (Path(__file__).parents[2] / "src").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert not [word for word in words if word in text], file


# ---------------------------------------------------------------- settings, checkpoints, caches


@pytest.mark.parametrize(
    "text",
    [
        "model_name: !!python/object/apply:os.system ['touch {}']",
        "!!python/object/new:os.system ['touch {}']",
        "model_name: !!python/name:os.system",
        "a: &a [lol]\nb: &b [*a, *a, *a]\nmodel_name: *b",
    ],
)
def test_a_yaml_file_of_settings_makes_no_objects(tmp_path, canary, text, capsys):
    path = tmp_path / "settings.yaml"
    path.write_text(text.replace("{}", str(canary)))
    assert cli.main(["train", "--config", str(path)]) == cli.USAGE
    message = capsys.readouterr().err
    assert message.startswith("koret: ") and "Traceback" not in message


def test_a_json_file_of_settings_makes_no_objects(tmp_path, canary, capsys):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"__reduce__": ["exec", f"open({str(canary)!r}, 'w')"], "seed": {"py/object": "os"}}))
    assert cli.main(["train", "--config", str(path)]) == cli.USAGE
    message = capsys.readouterr().err
    assert "__reduce__" in message and "seed" in message


@pytest.fixture
def stopped(make_config, toy_data, silent) -> Path:
    """A run with a checkpoint, stopped after its third step."""
    trainer = EmbeddingTrainer(make_config(), dataset=toy_data, console=silent)
    take_step = trainer._take_step

    def take_steps(step):
        if step.number == 4:
            raise RuntimeError("stopped")
        take_step(step)

    trainer._take_step = take_steps
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.train()
    return trainer.run_dir


@pytest.mark.parametrize("name", ["optimizer.pt", "optimizer.safetensors", "random.safetensors", "progress.json"])
def test_a_pickle_in_a_checkpoint_is_not_read(stopped, toy_data, silent, canary, name):
    (checkpoint,) = (stopped / "checkpoints").glob("step-*2")
    (checkpoint / name).write_bytes(pickle.dumps(Payload(canary)))
    run = EmbeddingTrainer.resume(stopped, dataset=toy_data, console=silent).train()
    assert run.state == "finished"
    assert ("is damaged and set aside" in silent.file.getvalue()) == (name != "optimizer.pt")


def test_a_pickle_in_a_manifest_is_not_read(stopped, toy_data, silent, canary):
    for path in (stopped / "checkpoints").rglob("manifest.json"):
        path.write_bytes(pickle.dumps(Payload(canary)))
    assert EmbeddingTrainer.resume(stopped, dataset=toy_data, console=silent).train().state == "finished"
    assert "starts from the beginning" in silent.file.getvalue()


def test_caches_of_other_content_are_made_again(tmp_path, canary):
    source = tmp_path / "pairs.jsonl"
    source.write_text('{"query": "질문", "positive": "문단"}\n', encoding="utf-8")
    fresh = load_dataset(source, cache_dir=tmp_path / "cache", num_workers=0)
    evil = pickle.dumps(Payload(canary))
    for name in ("questions.arrow", "passages.arrow", "articles.arrow"):
        size = (fresh.directory / name).stat().st_size
        (fresh.directory / name).write_bytes(evil.ljust(size, b"\0")[:size])
    again = load_dataset(source, cache_dir=tmp_path / "cache", num_workers=0)
    assert again.questions.equals(load_dataset(source, cache_dir=tmp_path / "other", num_workers=0).questions)


def test_arrays_with_objects_are_not_loaded(tmp_path, canary):
    path = tmp_path / "vectors.npy"
    np.save(path, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(path, mmap_mode=None)  # as koret calls it: test_there_is_no_option_to_trust_code
    (tmp_path / "data.parquet").write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="no readable Parquet"):
        load_dataset(tmp_path / "data.parquet", cache_dir=tmp_path / "cache", num_workers=0)


def test_modules_beside_the_data_are_not_imported(tmp_path, canary):
    """Neither the workers nor TensorBoard look for their libraries in the working directory."""
    for name in ("json", "msgspec", "orjson", "tensorboard", "numpy", "koret"):
        write_module(tmp_path, name, canary)
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text('{"query": "질문", "positive": "문단"}\n', encoding="utf-8")
    koret = Path(sys.executable).with_name("koret")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"KORET_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [koret, "stats", ".", "--out", "out", "--num-workers", "2"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "events.out.tfevents.1.x").write_bytes(b"")
    process = subprocess.Popen(
        [koret, "tensorboard", "runs", "--host", "127.0.0.1", "--port", "0"],
        cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        for line in process.stderr:
            if "Press CTRL+C" in line:
                break
        else:
            pytest.fail("TensorBoard did not start")
    finally:
        process.kill()
        process.wait(30)


def test_a_zip_with_links_reads_no_file_outside(tmp_path):
    (tmp_path / "secret.json").write_text(json.dumps({"data": [{"context": "비밀", "qas": []}]}), encoding="utf-8")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        link = zipfile.ZipInfo("link.json")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, str(tmp_path / "secret.json"))
    with pytest.raises(DataError, match=r"data.zip!link.json is not JSON"):
        load_dataset(tmp_path / "data.zip", cache_dir=tmp_path / "cache", num_workers=0)


# ---------------------------------------------------------------- what is shown


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)
        self.attributes += attributes


ATTACKS = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</title><script>x</script>", "<svg/onload=alert(1)>",
    "<a href='javascript:alert(1)'>x</a>", '"><iframe src=//evil.example>', "</style><script>x</script>", "<!--", "]]>",
    "</pre><object data=x>", "&lt;script&gt;", "<math><mtext><style><img src=x onerror=y>",
)  # fmt: skip


def test_texts_of_a_corpus_are_text_in_every_report(tmp_path, capsys):
    """Statistics and evaluation reports over a corpus of attacks hold no element of theirs."""
    rows = [
        {"query": f"{attack} 질문 {n}-{m}?", "positive": f"{attack} 문단 {n}-{m} 글", "title": f"{attack} {n}"}
        for n, attack in enumerate(ATTACKS)
        for m in range(3)
    ]
    data = tmp_path / "<b>data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert cli.main(["stats", str(data), "--out", str(tmp_path / "stats"), "--num-workers", "0"]) == 0
    out = tmp_path / "report"
    asked = ["evaluate", "offline", "--dataset-root", str(data), "--max-seq-length", "32", "--out", str(out)]
    assert cli.main([*asked, "--num-workers", "0"]) == 0, capsys.readouterr().err
    pages = [*(tmp_path / "stats").glob("*.html"), *out.glob("*.html")]
    assert len(pages) == 2
    for page in pages:
        found = Elements(page.read_text(encoding="utf-8"))
        assert not {"script", "iframe", "object", "embed", "math"} & set(found.names)
        assert not [name for name, _ in found.attributes if name.startswith("on")]
        assert not [
            v for n, v in found.attributes if n in ("href", "src") and (v or "").startswith(("java", "//", "http"))
        ]


ESCAPES = "\x1b]0;title\x07\x1b[2J\x1b[31mred\x9b31m\x7f\r\b"


def test_a_corpus_does_not_command_the_terminal(tmp_path, capsys):
    passages = tmp_path / "passages.txt"
    passages.write_text(f"한라산은 {ESCAPES.replace(chr(13), '')} 제주도에 있다.\n", encoding="utf-8")
    assert cli.main(["search", "offline", "한라산", "--passages", str(passages)]) == 0
    shown = capsys.readouterr().out
    assert "␛]0;title" in shown.replace("\n", "") and not find_commands(shown)
    assert cli.main(["search", "offline", "한라산", "--passages", str(passages), "--json"]) == 0
    shown = capsys.readouterr().out
    assert not find_commands(shown) and "\x1b]0;title" in json.loads(shown)[0]["passage"]


def test_messages_about_data_do_not_command_the_terminal(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    rows = [{"query": "질문", "positive": "문단"}, *({"query": "", "id": f"{ESCAPES}{n}"} for n in range(30))]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert cli.main(["stats", str(data), "--num-workers", "0"]) == cli.USAGE
    shown = capsys.readouterr().err
    assert "␛]0;title" in shown and not find_commands(shown)
    folder = tmp_path / "folder\x1b[31m"
    folder.mkdir()
    (folder / "a\x1b[2Jb.json").write_text("{", encoding="utf-8")
    assert cli.main(["stats", str(folder), "--num-workers", "0"]) == cli.USAGE
    assert not find_commands(capsys.readouterr().err)


def find_commands(text: str) -> list[str]:
    return [c for c in text if (ord(c) < 32 and c not in "\t\n") or 0x7F <= ord(c) < 0xA0]


def test_printable_leaves_text_alone():
    assert make_printable("가나 a\tb\n👍 é") == "가나 a\tb\n👍 é"
    assert make_printable(ESCAPES) == "␛]0;title␇␛[2J␛[31mred�31m␡␍␈"


def test_styles_of_our_own_still_reach_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    open_console().print("[bold]\x1b[2J[/]", highlight=False)
    shown = capsys.readouterr().out
    assert "\x1b[1m" in shown and "\x1b[2J" not in shown and "␛[2J" in shown
    print_json({"a": "\x9b"})
    assert capsys.readouterr().out == '{\n  "a": "\\u009b"\n}\n'


# ---------------------------------------------------------------- what is saved


@pytest.fixture(scope="module")
def private_run(tiny_model, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run made by the command, as a person with a name, a home and tokens would; and what must not be in it."""
    name = "gildong-hong-1443"
    home = tmp_path_factory.mktemp("homes") / name
    work = home / "secret-project-1446"
    work.mkdir(parents=True)
    shutil.copytree(tiny_model, home / "models" / "tiny")
    secrets = {"HF_TOKEN": "hf_plantedPlantedPlanted01", "WANDB_API_KEY": "planted-0123456789abcdef"}
    environment = {**os.environ, **secrets, "HOME": str(home), "USER": name, "LOGNAME": name, "OMP_NUM_THREADS": "1"}
    environment["KORET_CACHE"] = str(home / "cache")
    koret, tiny = Path(sys.executable).with_name("koret"), home / "models" / "tiny"
    common = ["--dataset-root", "sample", "--num-workers", "0"]
    small = [
        "--max-seq-length", "32", "--max-samples", "32", "--eval-samples", "12", "--eval-corpus-size", "20",
        "--batch-size", "8", "--num-epochs", "1", "--precision", "fp32", "--max-steps", "2", "--train-split", "0.5",
    ]  # fmt: skip

    def call(*arguments) -> None:
        done = subprocess.run(
            [koret, *arguments, *common], cwd=work, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr

    call("train", "--model-name", tiny, "--log-dir", work / "logs", *small)
    (run,) = (work / "logs").glob("run_*")
    call("evaluate", run, "--baseline", tiny, "--out", run / "own", "--max-queries", "8")
    return run, [name, *secrets.values(), str(home), str(work), sys.prefix, "secret-project-1446"]


def test_no_file_of_a_run_tells_a_token_a_name_or_a_place(private_run):
    run, private = private_run
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 25
    for path in files:
        content = path.read_bytes()
        for secret in private:
            assert secret.encode() not in content, f"{secret} in {path.relative_to(run)}"
            assert secret.encode("utf-16-le") not in content


def test_no_file_of_a_run_is_a_pickle(private_run):
    for path in private_run[0].rglob("*"):
        if path.is_file():
            assert path.suffix not in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".npy")
            assert not is_pickle(path.read_bytes()) and not zipfile.is_zipfile(path), path


def is_pickle(data: bytes) -> bool:
    """Whether the bytes disassemble to the end as one."""
    try:
        pickletools.dis(data, out=open(os.devnull, "w"))
    except Exception:
        return False
    return True


def test_pickles_are_recognised():
    assert is_pickle(pickle.dumps([1])) and not is_pickle(b'{"a": 1}\n')
