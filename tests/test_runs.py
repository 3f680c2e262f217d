"""Run directories: never shared, locked while in use, found, read and compared; nothing in them is private."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest

from koret.files import write_json
from koret.privacy import portable_path, scrub
from koret.runs import (
    RunBusy,
    compare_runs,
    create_run,
    describe_environment,
    find_runs,
    lock_run,
    read_run,
    resolve_model,
    resolve_run,
)

NOON = datetime(2025, 11, 3, 14, 30, 22)


def make_run(log_dir, state="finished", config=None, scores=None, model=True, now=NOON) -> Path:
    path = create_run(log_dir, now)
    write_json(path / "status.json", {"state": state, "step": 5, "total_steps": 5, "reason": None})
    write_json(path / "environment.json", {"config": config or {"seed": 1}, "versions": {}})
    write_json(path / "data.json", {"fingerprint": "f", "pairs": 10, "evaluation": [{}]})
    (path / "evaluation").mkdir()
    write_json(path / "evaluation" / "final.json", {"metrics": scores or {"ndcg@10": 0.5}})
    if model:
        (path / "model").mkdir()
        write_json(path / "model" / "modules.json", [])
        write_json(path / "model" / "training_config.json", config or {"seed": 1})
    return path


def test_runs_started_in_the_same_second_never_share_a_directory(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: create_run(tmp_path / "logs", NOON), range(24)))
    assert len(set(paths)) == 24
    assert {p.name for p in paths} == {"run_20251103_143022", *(f"run_20251103_143022_{i}" for i in range(2, 25))}


def test_an_unwritable_log_directory_is_an_error_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot create a run in .*file.*choose another --log-dir"):
        create_run(tmp_path / "file")


def test_runs_are_found_in_the_order_they_were_made(tmp_path):
    made = [make_run(tmp_path) for _ in range(11)]
    made.append(make_run(tmp_path, now=datetime(2025, 11, 3, 14, 30, 23)))
    (tmp_path / "run_20990101_000000").mkdir()  # killed before it said anything
    (tmp_path / "other").mkdir()
    assert [run.path for run in find_runs(tmp_path)] == made
    assert find_runs(tmp_path / "absent") == []


def test_a_run_reads_back(tmp_path):
    path = make_run(tmp_path, config={"seed": 3}, scores={"ndcg@10": 0.25})
    for name in (path, path / "model", str(path)):
        run = read_run(name)
        assert (run.path, run.state, run.config, run.final) == (path, "finished", {"seed": 3}, {"ndcg@10": 0.25})
    assert run.model == path / "model" and run.data["pairs"] == 10
    with pytest.raises(FileNotFoundError, match="no status.json"):
        read_run(tmp_path)
    (path / "data.json").write_text("{")
    with pytest.raises(ValueError, match="data.json is damaged"):
        read_run(path)


def test_a_running_run_nobody_holds_was_killed(tmp_path):
    path = make_run(tmp_path, state="running", model=False)
    assert read_run(path).state == "killed"
    with lock_run(path):
        assert read_run(path).state == "running"
    assert read_run(path).state == "killed"


def test_a_second_process_is_refused_and_death_releases(tmp_path):
    path = make_run(tmp_path)
    code = f"import koret.runs, pathlib, sys, time\nwith koret.runs.lock_run(pathlib.Path({str(path)!r})):\n" \
           "    print('held', flush=True); time.sleep(60)"  # fmt: skip
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunBusy, match="in use by another process"), lock_run(path):
        pass
    holder.kill()
    holder.wait()
    with lock_run(path):
        pass


def test_comparing_marks_what_differs(tmp_path):
    a = make_run(tmp_path, config={"seed": 1, "scale": 20.0}, scores={"ndcg@10": 0.5, "map": 0.4})
    b = make_run(tmp_path, config={"seed": 2, "scale": 20.0, "lora_r": 4}, scores={"ndcg@10": 0.6, "map": 0.4})
    rows = {row.name: row for row in compare_runs([a, b])}
    assert {name for name, row in rows.items() if row.differs} == {"seed", "lora_r", "ndcg@10"}
    assert rows["lora_r"].values == (None, 4) and rows["pairs"].group == "data" and "evaluation" not in rows


def test_names_resolve_to_runs_and_models(tmp_path):
    first = make_run(tmp_path)
    second = make_run(tmp_path, state="interrupted", model=False)
    assert resolve_run("latest", tmp_path) == second and resolve_run(first.name, tmp_path) == first
    assert resolve_run(first / "model", tmp_path) == first
    for name in (first, first.name, first / "model", "latest"):
        assert resolve_model(name, tmp_path) == first / "model"
    with pytest.raises(FileNotFoundError, match="holds no model: it is interrupted; finish it with --resume"):
        resolve_model(second, tmp_path)
    with pytest.raises(FileNotFoundError, match="no run called nothing"):
        resolve_model("nothing", tmp_path)
    with pytest.raises(FileNotFoundError, match="no finished run"):
        resolve_model("latest", tmp_path / "empty")


def test_environment_says_what_ran_and_nothing_private(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh12345678")
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["/usr/bin/koret", "train", "--dataset-root", str(tmp_path / "data" / "x.json"), "hf_abcdefgh12345678"]
    monkeypatch.setattr(sys, "argv", argv)
    note = f"read {tmp_path}/data/y.json"
    described = describe_environment(seed=3, api_key="s3cr3t", micro_batch_tokens=512, note=note)
    assert described["command"] == ["koret", "train", "--dataset-root", "~/data/x.json", "***"]
    assert described["seed"] == 3 and described["api_key"] == "***" and described["micro_batch_tokens"] == 512
    assert described["versions"]["koret"] and str(tmp_path) not in json.dumps(described)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("intfloat/multilingual-e5-small", "intfloat/multilingual-e5-small"),
        ("./logs/tensorboard", "./logs/tensorboard"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("--hub-token=abc123", "--hub-token=***"),
        (["--password", "abc", "--passage-tokens", "128"], ["--password", "***", "--passage-tokens", "128"]),
        ({"hub_token": "x", "max_tokens": 5, "secret": None}, {"hub_token": "***", "max_tokens": 5, "secret": None}),
        ("a/b of 1/2 and/or", "a/b of 1/2 and/or"),
        ({"query_prefix": "[/INST] "}, {"query_prefix": "[/INST] "}),
        (["--query-prefix", "</s>질문: "], ["--query-prefix", "</s>질문: "]),
        ({"query_prefix": "hf_abcdefgh123 "}, {"query_prefix": "*** "}),
    ],
)  # fmt: skip
def test_scrubbing_spares_what_is_harmless(given, kept):
    assert scrub(given) == kept


def test_paths_become_portable_and_still_lead_there(monkeypatch, tmp_path):
    home = tmp_path / "home" / "alice"
    (home / "project").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "project")
    for target, expected in (
        (home / "project" / "data", "data"),
        (home / "data", "../data"),
        (tmp_path / "shared", "../../../shared"),
    ):
        assert portable_path(str(target)) == expected
        assert Path(expected).expanduser().absolute().resolve() == target
    monkeypatch.chdir(tmp_path)
    assert portable_path(str(home / "data")) == "~/data"
    assert os.path.expanduser("~/data") == str(home / "data")


def test_importing_runs_stays_light():
    code = "import sys, koret.runs; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
