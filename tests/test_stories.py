"""Whole stories through the real command line, on the embedded sample and the offline base."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformer

from koret import cli
from koret.commands.screen import print_json
from koret.data.loader import SAMPLE

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--model-name", "offline", "--dataset-root", "sample", "--train-split", "0.7", "--max-seq-length", "64",
    "--max-samples", "48", "--eval-samples", "40", "--eval-corpus-size", "60",
    "--passage-tokens", "256", "--batch-size", "16", "--num-epochs", "2", "--learning-rate", "2e-3",
    "--log-every-n-steps", "1",
    "--num-workers", "0", "--precision", "fp32",
]  # fmt: skip


def call(*arguments: str | Path) -> int:
    return cli.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished training, made by the installed command as a person would."""
    log_dir = tmp_path_factory.mktemp("logs")
    command = [sys.executable, "-m", "koret.cli", "train", *SMALL, "--log-dir", str(log_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=log_dir)
    assert done.returncode == 0, done.stderr
    for part in ("nDCG@10", "recall@10", "base", "tuned", "BM25", "what to try next", "koret search"):
        assert part in done.stdout
    assert "Traceback" not in done.stderr
    (path,) = log_dir.glob("run_*")
    return path


def test_a_run_that_failed_says_why(tmp_path, capsys):
    run = tmp_path / "run_20251103_143022"
    run.mkdir()
    why = "step 7: the loss is nan, so it was not applied and the run stops [questions q1, q2]"
    status = {"state": "failed", "step": 6, "total_steps": 1200, "best": None, "reason": why}
    (run / "status.json").write_text(json.dumps(status), encoding="utf-8")
    assert cli.main(["runs", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "failed after step 6 of 1,200" in shown and why in shown
    assert cli.main(["runs", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reason"] == why


def test_the_run_directory_holds_what_is_promised(run):
    present = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    for name in (
        "metrics.jsonl", "environment.json", "data.json", "status.json", "evaluation/verdict.json",
        "model/training_config.json", "model/model.safetensors", "model/README.md", "model/modules.json",
        "model/lora_weights/adapter_config.json", "model/lora_weights/adapter_model.safetensors",
    ):  # fmt: skip
        assert name in present, sorted(present)
    assert any(name.startswith("events.out.tfevents") for name in present)
    assert not [name for name in present if name.endswith((".bin", ".pt", ".pkl"))]
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert (run / "model" / "lora_weights" / "adapter_model.safetensors").stat().st_size < 1_000_000
    home = str(Path.home())
    for path in run.rglob("*.json"):
        assert str(run.parent) not in path.read_text() and home + "/" not in path.read_text(), path


def test_tensorboard_reads_the_documented_tags(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "train/loss", "train/learning_rate", "train/epoch", "train/epoch_loss", "train/pairs_per_second", "eval/score",
        "eval/ndcg@10", "eval/map", "eval/recall@10", "eval/mrr@10",
    } <= tags  # fmt: skip
    assert any(tag.startswith("gradients/") and tag.endswith("_weight_norm") for tag in tags)
    losses = [event.value for event in events.Scalars("train/loss")]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert np.allclose(losses, [line["train/loss"] for line in lines if "train/loss" in line])


def test_the_saved_model_is_plain_and_differs_from_its_base(run):
    from koret.retrieval.encoder import load_encoder

    texts = ["한라산의 높이는?", "세종은 언제 즉위하였는가?"]
    plain = SentenceTransformer(str(run / "model")).encode(texts, prompt_name="query")
    assert np.allclose(plain, load_encoder(run).encode(texts, "query"), atol=1e-5)
    assert not np.allclose(plain, load_encoder("offline", max_seq_length=64).encode(texts, "query"), atol=1e-3)


@pytest.mark.slow
def test_evaluate_repeats_the_numbers_of_the_run(run, tmp_path, capsys):
    asked = ["--dataset-root", "sample", "--max-queries", 30, "--baseline", "offline", "--num-workers", 0]
    written = ["--json", tmp_path / "report.json", "--trec", tmp_path / "trec", "--out", tmp_path / "out"]
    assert call("evaluate", run, *asked, *written) == 0
    shown = capsys.readouterr().out
    assert "BM25" in shown and "Clean" in shown
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] in ("better", "worse", "not distinguishable")
    systems = {row["role"] for row in report["tasks"][0]["systems"]}
    assert {"base", "model", "lexical", "fusion"} <= systems
    assert (tmp_path / "out" / "report.html").is_file() and list((tmp_path / "trec").iterdir())


def test_runs_lists_shows_and_compares(run, capsys):
    log_dir = run.parent
    assert call("runs", "--log-dir", log_dir) == 0
    assert run.name in capsys.readouterr().out
    assert call("runs", "--log-dir", log_dir, "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "finished"
    assert call("runs", run.name, "--log-dir", log_dir) == 0
    assert "learning_rate" in capsys.readouterr().out
    assert call("runs", run, run, "--json") == 0
    assert not any(row["differs"] for row in json.loads(capsys.readouterr().out))
    assert call("runs", "no_such_run", "--log-dir", log_dir) == 2


def test_search_and_compare_and_examples_answer(run, tmp_path, capsys):
    passages = tmp_path / "passages.txt"
    passages.write_text("훈민정음은 세종이 만들었다.\n\n한라산은 제주도에 있다.\n", encoding="utf-8")
    assert call("search", run, "한글을 만든 임금은?", "--passages", passages, "--json") == 0
    hits = json.loads(capsys.readouterr().out)
    assert [hit["rank"] for hit in hits] == [1, 2] and hits[0]["score"] >= hits[1]["score"]
    sample = json.loads(SAMPLE.read_text(encoding="utf-8"))
    part = write(tmp_path / "part.json", json.dumps({**sample, "data": sample["data"][:12]}))
    asked = ["--dataset-root", part, "--max-queries", 20, "--moves", 2, "--json", "--num-workers", 0]
    assert call("compare", "offline", run, *asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["wins"] + found["losses"] + found["ties"] == 20
    assert call("examples", run) == 0
    assert "1. One query" in capsys.readouterr().out


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """An index of a table whose cells are easily misread."""
    folder = tmp_path_factory.mktemp("table")
    rows = "001,1984,빅 브라더가 나오는 소설이다,007,true,1949\n002,나목,전쟁을 그린 소설이다,8,false,1970\n"
    write(folder / "a.csv", "id,title,text,code,open,발행 연도\n" + rows)
    assert call("index", "offline", folder / "a.csv", "--out", folder / "i") == 0
    return folder / "i"


@pytest.mark.parametrize(
    "condition",
    ["document=001", "heading=1984", "title=1984", "code=007", 'code="007"', "code!=8", "발행 연도<1950", "open=true"],
)
def test_conditions_mean_what_was_in_the_table(table, condition, capsys):
    assert call("search", table, "소설", "--mode", "lexical", "--json", "--where", condition) == 0
    assert [hit["document"] for hit in json.loads(capsys.readouterr().out)] == ["001"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--passages", "gone.txt"], "--passages goes with a model"),
        (["--mode", "dense", "--weight", "0.5"], "this search is dense"),
        (["--mode", "lexical", "--weight", "0.5"], "this search is lexical"),
    ],
)
def test_options_an_index_has_no_use_for_are_refused(table, arguments, words, capsys):
    assert call("search", table, "소설", *arguments) == 2
    assert words in capsys.readouterr().err


def test_hits_are_json_whatever_the_numbers_in_a_table(tmp_path, capsys):
    columns = {"id": ["a", "b"], "text": ["첫째 글이다", "둘째 글이다"], "score": [float("nan"), 1.5]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert call("index", "offline", tmp_path / "a.parquet", "--out", tmp_path / "i") == 0
    capsys.readouterr()
    assert call("search", tmp_path / "i", "글이다", "--mode", "lexical", "--json") == 0
    hits = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert {hit["id"]: hit["metadata"] for hit in hits} == {"a#1": {}, "b#1": {"score": 1.5}}
    print_json({"of": [float("inf"), np.float64("nan"), 0.5, (1,)]})  # an index made before kept them
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"of": [None, None, 0.5, [1]]}


def test_a_finished_run_is_left_alone(run, capsys):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    assert call("train", "--resume", run) == 0
    assert "already finished" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    assert call("train", *SMALL, "--log-dir", tmp_path / "logs", "--dry-run") == 0
    plan = capsys.readouterr().out
    assert "negatives" in plan and "s a step" in plan and "memory" in plan
    assert not (tmp_path / "logs").exists()


def test_stats_writes_tables_json_and_plots(tmp_path, capsys):
    assert call("stats", "sample", "--out", tmp_path, "--num-workers", 0) == 0
    assert "Questions by type" in capsys.readouterr().out
    assert (tmp_path / "statistics.json").is_file() and len(list(tmp_path.glob("*.png"))) >= 4


def test_tensorboard_is_announced_before_it_listens(run):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["bash", str(ROOT / "run_tensorboard.sh"), str(run.parent), "--port", str(port)]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        said = [process.stdout.readline() for _ in range(6)]
        notice = "".join(said)
        assert f"http://localhost:{port}" in notice and "no password" in notice and "--host 127.0.0.1" in notice
        for _ in range(120):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=2) as answer:
                    assert any(run.name in name for name in json.load(answer))
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.5)
        else:
            pytest.fail("TensorBoard did not answer in a minute")
    finally:
        process.terminate()
        process.wait(30)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


PAIR = '{"query": "질문", "positive": "문단"}\n'
FAULTS = {
    "no such path": (lambda d: d / "absent", 2, "absent"),
    "empty folder": (lambda d: write(d / "empty" / ".keep", "").parent, 2, "empty"),
    "truncated": (lambda d: write(d / "cut.json", '{"version": "KorQuAD_2.1", "data": [{"title": "가"'), 2, "cut.json"),
    "not UTF-8": (lambda d: write(d / "cp949.json", '{"data": [{"title": "가"}]}'.encode("cp949")), 2, "cp949.json"),
    "wrong schema": (lambda d: write(d / "list.json", '{"rows": [1, 2]}'), 2, "list.json"),
    "no usable pair": (lambda d: write(d / "empty.jsonl", '{"query": "", "positive": ""}\n' * 3), 2, "empty.jsonl"),
    "too few pairs": (lambda d: write(d / "one.jsonl", PAIR), 2, ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_data_is_one_message_naming_the_file(fault, tmp_path, capsys):
    make, code, named = FAULTS[fault]
    data = make(tmp_path)
    arguments = ["train", *SMALL, "--dataset-root", data, "--log-dir", tmp_path / "logs", "--precision", "fp32"]
    assert call(*arguments) == code
    message = capsys.readouterr().err
    assert named in message and "Traceback" not in message
    assert not (tmp_path / "logs").exists()


def test_wrong_usage_exits_with_2_and_says_what_was_meant(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        call("train", "--batch-sise", 3)
    assert caught.value.code == 2 and "did you mean --batch-size?" in capsys.readouterr().err
    assert call("train", "--batch-size", "many", "--train-split", "2") == 2
    message = capsys.readouterr().err
    assert "batch_size: must be a whole number" in message and "train_split: must be less than 1.0" in message
    write(tmp_path / "c.yaml", "batch_sise: 3\nlearning_rate: fast\n")
    assert call("train", "--config", tmp_path / "c.yaml") == 2
    message = capsys.readouterr().err
    assert "'batch_sise' (did you mean 'batch_size'?)" in message and "learning_rate" in message


def test_waiting_threads_give_way_unless_the_user_decides_otherwise():
    """The variables are read when torch is loaded: the command must set them before, and its own parsing load none."""
    code = (
        "import os, sys; from koret.cli import main; assert 'torch' not in sys.modules; "
        "main(['runs', '--log-dir', '.']); print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for given, expected in (
        ({}, f"{cli.SPINS} None"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None"),
        ({"OMP_WAIT_POLICY": "active"}, "None active"),
    ):
        done = subprocess.run([sys.executable, "-c", code], env=clean | given, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == expected, done


def test_missing_model_says_how_to_go_on(capsys):
    assert call("train", *SMALL, "--model-name", "nobody/no-such-model") == 2
    assert "--model-name offline" in capsys.readouterr().err


def test_unwritable_log_directory_is_named(tmp_path, capsys):
    blocked = write(tmp_path / "file", "") / "logs"
    assert call("train", *SMALL, "--log-dir", blocked) == 2
    assert str(blocked) in capsys.readouterr().err


def test_tensorboard_refuses_what_is_not_there(tmp_path, capsys):
    assert call("tensorboard", tmp_path / "absent") == 2
    assert call("tensorboard", tmp_path) == 2
    assert "no TensorBoard events" in capsys.readouterr().err
