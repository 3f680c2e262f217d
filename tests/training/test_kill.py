"""Kill a run at every file operation, tear its writes, fill its disk, damage its files: it ends in the same bits."""

import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from crashes import UNHANDLED, count_operations, fill_disk_from, kill_at, read_outcome, run_child, tear_write

from koret.config import TrainingConfig
from koret.retrieval.encoder import load_encoder
from koret.runs import find_runs


class Stage:
    """A toy run, its outcome when nothing happens, and a way to start it again elsewhere."""

    def __init__(self, folder: Path, config: TrainingConfig, dataset, encoder) -> None:
        self.folder, self.config, self.dataset, self.encoder = folder, config, dataset, encoder
        self.attempts = 0
        log = folder / "operations.txt"
        self.expected = self.finish(self.fresh(), arm=count_operations(log))
        self.operations = log.read_text().splitlines()

    def fresh(self) -> TrainingConfig:
        """The same settings in a runs directory of their own."""
        self.attempts += 1
        return TrainingConfig(**{**self.config.to_dict(), "log_dir": str(self.folder / f"runs{self.attempts}")})

    def run(self, config, arm=lambda root: None) -> int:
        return run_child(config, self.dataset, self.encoder, self.said(config), arm)

    def said(self, config) -> Path:
        return Path(config.log_dir + ".txt")

    def finish(self, config, arm=lambda root: None) -> dict:
        code = self.run(config, arm)
        assert code == 0, self.said(config).read_text()
        outcome = read_outcome(config.log_dir)
        shutil.rmtree(Path(config.log_dir)) if outcome == getattr(self, "expected", None) else None
        return outcome


@pytest.fixture(scope="module")
def stage(tiny_model, toy_data, tmp_path_factory) -> Stage:
    config = TrainingConfig(
        model_name=str(tiny_model), max_seq_length=48, batch_size=8, num_epochs=2, max_steps=6, learning_rate=1e-3,
        warmup_steps=0, precision="fp32", log_every_n_steps=1, save_steps=2, save_total_limit=1, train_split=0.5,
        micro_batch_tokens=4096, lora_r=2, eval_samples=12,
    )  # fmt: skip
    encoder = load_encoder(tiny_model, max_seq_length=48, device="cpu")
    return Stage(tmp_path_factory.mktemp("kills"), config, toy_data, encoder)


def spread(count: int, wanted: int) -> list[int]:
    """``wanted`` numbers over 0 .. count - 1, the first and the last among them."""
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)})


def check_kills(stage: Stage, points) -> None:
    for number in points:
        config = stage.fresh()
        assert stage.run(config, kill_at(number)) == -signal.SIGKILL
        assert stage.finish(config) == stage.expected, f"killed before {stage.operations[number]} ({number})"


def test_two_runs_give_the_same_bits(stage):
    assert stage.expected["state"] == "finished"
    assert stage.finish(stage.fresh()) == stage.expected


def test_killed_at_file_operations(stage):
    check_kills(stage, spread(len(stage.operations), 24))


@pytest.mark.slow
def test_killed_at_every_file_operation(stage):
    check_kills(stage, range(len(stage.operations)))


def check_torn_writes(stage: Stage, points) -> int:
    """Returns how many of the points were reached."""
    torn = 0
    for number in points:
        config = stage.fresh()
        code = stage.run(config, tear_write(number))
        assert code in (0, -signal.SIGKILL)
        torn += code != 0
        assert stage.finish(config) == stage.expected if code else read_outcome(config.log_dir) == stage.expected
    return torn


def test_killed_half_way_through_a_write(stage):
    assert check_torn_writes(stage, range(3, 43, 5)) == 8


@pytest.mark.slow
def test_killed_half_way_through_every_write(stage):
    assert check_torn_writes(stage, range(400)) > 40


@pytest.mark.parametrize("number", [4, 11, 20, 33, 45])
def test_disk_full_says_so_and_going_on_works_after_space_is_freed(stage, number):
    config = stage.fresh()
    assert stage.run(config, fill_disk_from(number)) == 1
    said = stage.said(config).read_text()
    assert "disk full while saving" in said
    for run in find_runs(config.log_dir):
        assert not list(run.path.rglob(".staging-*"))
    assert stage.finish(config) == stage.expected


def test_killed_by_the_clock_again_and_again(stage):
    rng, config = random.Random(7), stage.fresh()
    for _ in range(5):
        timer = {}

        def arm(root, timer=timer):
            timer["t"] = threading.Timer(rng.uniform(0.1, 0.6), lambda: signal.raise_signal(signal.SIGKILL))
            timer["t"].start()

        if stage.run(config, arm) == 0:
            break
    assert stage.finish(config) == stage.expected


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "bit": lambda path: path.write_bytes(flip_bit(path.read_bytes())),
}


def flip_bit(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


@pytest.fixture(scope="module")
def interrupted(stage) -> Path:
    """A runs directory whose run was killed while it saved the model: two good checkpoints lie there."""
    config = TrainingConfig(**{**stage.config.to_dict(), "log_dir": str(stage.folder / "two"), "save_total_limit": 2})
    publish = max(i for i, line in enumerate(stage.operations) if line.startswith("os.mkdir .staging-model"))
    assert run_child(config, stage.dataset, stage.encoder, stage.folder / "two.txt", kill_at(publish + 2)) == -9
    names = sorted(p.name for p in (find_runs(config.log_dir)[-1].path / "checkpoints").iterdir())
    assert [n[:5] for n in names if n.startswith("step-")] == ["step-", "step-"]
    return Path(config.log_dir)


FILES = ("weights.safetensors", "optimizer.safetensors", "random.safetensors", "progress.json", "manifest.json")


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("file", [*FILES, "best"])
def test_a_damaged_checkpoint_is_announced_and_the_one_before_is_used(stage, interrupted, file, kind):
    config = stage.fresh()
    shutil.copytree(interrupted, config.log_dir)
    checkpoints = find_runs(config.log_dir)[-1].path / "checkpoints"
    newest = max(p for p in checkpoints.iterdir() if p.name.startswith("step-"))
    best = max(p for p in checkpoints.iterdir() if p.name.startswith("best-"))
    DAMAGE[kind](best / "weights.safetensors" if file == "best" else newest / file)

    assert stage.finish(config) == stage.expected
    said = stage.said(config).read_text()
    assert f"checkpoint {newest.name} is damaged and set aside" in said
    if file != "manifest.json":  # damage there may also look like damage of a file it vouches for
        assert ("weights.safetensors" if file == "best" else file) in said


def test_when_every_checkpoint_is_damaged_the_run_starts_over(stage, interrupted):
    config = stage.fresh()
    shutil.copytree(interrupted, config.log_dir)
    for path in (find_runs(config.log_dir)[-1].path / "checkpoints").glob("step-*/weights.safetensors"):
        path.unlink()
    assert stage.finish(config) == stage.expected
    assert "starts from the beginning" in stage.said(config).read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("delay", [0.05, 0.2, 0.35])
def test_a_signal_finishes_the_step_and_saves(stage, number, code, delay):
    config = stage.fresh()

    def arm(root):
        def strike():
            while not find_runs(root):
                time.sleep(0.005)
            time.sleep(delay)
            signal.raise_signal(number)

        threading.Thread(target=strike, daemon=True).start()

    ended = stage.run(config, arm)
    run = find_runs(config.log_dir)[-1]
    # a run that was quicker than the signal has let go of it: Python's own handling ends the process then
    assert ended in (code, 0) or (run.state == "finished" and ended in (UNHANDLED, -number))
    if delay == 0.05 or run.state != "finished":
        assert run.state == "interrupted" and run.status["reason"] == f"stopped by {number.name}"
        assert any((run.path / "checkpoints").glob("step-*"))
    assert stage.finish(config) == stage.expected
