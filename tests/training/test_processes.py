"""Several real processes (gloo) train what one process trains, stop together, go on together and fail in words."""

import json

import numpy as np
import pytest
import torch
from crashes import read_outcome
from launches import launch

from koret.retrieval.processes import Group, Process
from koret.runs import find_runs
from koret.training.trainer import EmbeddingTrainer


def read_steps(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def start(config, folder, count=2, **job):
    """What each process of a launch says at its end."""
    values = {**config.to_dict(), "log_dir": str(folder / "runs")}
    ended = launch({"config": values, **job}, folder, count)
    assert all(process.returncode == 0 for process in ended), [process.complained[-2000:] for process in ended]
    return [json.loads(process.said.splitlines()[-1]) for process in ended]


def start_alone(config, data, silent, folder):
    config.log_dir = str(folder / "alone")
    return EmbeddingTrainer(config, dataset=data, console=silent).train()


@pytest.mark.parametrize(
    ("count", "changes"),
    [
        (2, {}),
        (3, {"micro_batch_tokens": 64, "positives": "both", "learn_scale": True, "symmetric": True}),
        (2, {"use_lora": False, "gradient_accumulation_steps": 2, "batch_size": 5, "max_steps": 4}),
    ],
    ids=["lora", "gradcache-both-learned-scale", "full-accumulated"],
)
def test_losses_weights_and_scores_are_those_of_one_process(make_config, toy_data, silent, tmp_path, count, changes):
    config = make_config(lora_dropout=0.0, **changes)
    nowhere = {rank: {"log_dir": "/dev/null/nowhere"} for rank in range(1, count)}  # process 0 alone writes
    said = start(config, tmp_path / "launch", count, config_of=nowhere)
    assert [one["state"] for one in said] == ["finished"] * count, said
    assert len({one["run"] for one in said}) == 1
    assert all(one["shown"] == "" for one in said[1:]) and f"{count} processes encode a share" in said[0]["shown"]
    together = find_runs(tmp_path / "launch" / "runs")
    alone = start_alone(config, toy_data, silent, tmp_path)
    assert len(together) == 1
    ours, theirs = read_steps(together[0].path), read_steps(alone.path)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for ours_at, theirs_at in zip(ours, theirs, strict=True):
        for name in (n for n in theirs_at if n.startswith(("train/loss", "train/masked", "train/scale", "gradients/"))):
            assert ours_at[name] == pytest.approx(theirs_at[name], rel=2e-4, abs=1e-6), name
    from safetensors.torch import load_file

    for name, tensor in load_file(alone.path / "model" / "model.safetensors").items():
        found = load_file(together[0].path / "model" / "model.safetensors")[name]
        if not name.endswith("key.bias"):  # its gradient is zero but for rounding, which AdamW blows up
            torch.testing.assert_close(found, tensor, rtol=0, atol=2e-5)
    assert together[0].base == pytest.approx(alone.base, abs=1e-6)
    assert together[0].environment["resolved"]["processes"] == count


def test_gradients_are_those_of_one_process_in_float64(tmp_path):
    """What sharing rests on: each process carries a graph for its own rows alone, and the sum is the whole gradient."""
    rng = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(7, 5, generator=rng, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    shares = Group(Process(0, 3)).deal([3, 9, 9, 1, 4, 4, 2])
    assert sorted(np.concatenate(shares).tolist()) == list(range(7))
    totals = [sum([3, 9, 9, 1, 4, 4, 2][i] for i in share) for share in shares]
    assert max(totals) - min(totals) <= 9

    def loss_of(vectors):
        return torch.logsumexp(vectors @ vectors.T, dim=1).mean()

    whole = weight.clone().requires_grad_()
    loss_of(rows @ whole).backward()
    parts = []
    for rank in range(3):  # what a process's backward pass computes: only its own rows carry a graph
        own = weight.clone().requires_grad_()
        vectors = (rows @ weight).detach()
        mine = rows[shares[rank]] @ own
        vectors = vectors.index_put((torch.from_numpy(shares[rank]),), mine)
        loss_of(vectors).backward()
        parts.append(own.grad)
    torch.testing.assert_close(sum(parts), whole.grad, rtol=0, atol=1e-12)


def test_a_signal_to_one_stops_all_and_the_same_command_ends_in_the_same_bits(make_config, tmp_path):
    config = make_config(lora_dropout=0.2, max_steps=6)
    start(config, tmp_path / "whole")
    said = start(config, tmp_path / "cut", accident={1: 3})
    assert [one["state"] for one in said] == ["Interrupted", "Interrupted"]
    run = find_runs(tmp_path / "cut" / "runs")[0]
    assert run.state == "interrupted" and 3 <= run.status["step"] < 6
    ended = launch({"resume": str(run.path)}, tmp_path / "cut")
    assert [json.loads(process.said.splitlines()[-1])["state"] for process in ended] == ["finished"] * 2
    assert read_outcome(str(tmp_path / "cut" / "runs")) == read_outcome(str(tmp_path / "whole" / "runs"))


def test_memory_that_runs_out_in_one_process_halves_the_pieces_of_all(make_config, toy_data, silent, tmp_path):
    config = make_config(lora_dropout=0.0)
    said = start(config, tmp_path / "launch", accident={1: "out of memory"})
    assert {one["state"] for one in said} == {"finished"}
    assert "out of memory: from here on" in said[0]["shown"]
    ours = read_steps(find_runs(tmp_path / "launch" / "runs")[0].path)
    theirs = read_steps(start_alone(config, toy_data, silent, tmp_path).path)
    assert [a["train/loss"] for a in ours] == pytest.approx([b["train/loss"] for b in theirs], rel=2e-4)


def test_what_one_process_finds_wrong_stops_all_in_words(make_config, tmp_path):
    odd = start(make_config(), tmp_path / "odd", data_of={1: {"seed": 1}})
    assert [one["state"] for one in odd] == ["ValueError", "ValueError"]
    assert "processes 1 and 0 do not agree on data" in odd[1]["error"]
    assert not find_runs(tmp_path / "odd" / "runs")
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "runs").write_text("a file where the runs should be")
    first, second = start(make_config(), blocked)
    assert first["state"] == "ValueError" and "cannot create a run" in first["error"]
    assert second["state"] == "PeerFailed" and "process 0 stopped: cannot create a run" in second["error"]


def test_alone_everything_is_the_plain_thing():
    group = Group()
    group.require_same(data=1)
    group.meet()
    assert (group.lead(pow, 2, 3), group.in_turn(lambda: 6), group.gather("x"), group.find_largest(3)) == (
        8,
        6,
        ["x"],
        3,
    )
    rows = torch.randn(3, 2)
    assert group.gather_rows(rows, group.deal([1, 5, 2])) is rows
    with pytest.raises(ZeroDivisionError):
        group.lead(lambda: 1 / 0)
