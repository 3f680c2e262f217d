"""Shared fixtures: where real data lies (when it does), and one thread for everybody."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tqdm import tqdm

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure() -> None:
    """Tests kill forks of this process; tqdm's own lock is one for all of them, and killed with it nobody gets it."""
    tqdm.set_lock(threading.RLock())


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real KorQuAD data beside the project; tests that use it skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("real data is not on this machine")
    return SHARED_DATA


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data goes to a folder of this test run, never to the user's own cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["KORET_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torch-compile")


@pytest.fixture
def compiles_here(compiler_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile on this CPU, with nothing compiled yet and files of this test run; skipped without a compiler."""
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("torch.compile needs a C++ compiler on a CPU, and there is none")
    import torch._inductor.config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiler_cache))
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()
