"""Two processes that need the same data set at the same moment: one prepares, the other waits and finds it."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import sys
from koret.data.loader import load_dataset
dataset = load_dataset("sample", num_workers=0, progress=False)
print(dataset.fingerprint, dataset.questions.num_rows)
"""


def test_processes_that_prepare_the_same_data_at_once_get_the_same_set(tmp_path):
    environment = {**os.environ, "KORET_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(set(said)) == 1 and said[0].split()[1] == "1485"
    assert len([p for p in (tmp_path / "datasets").iterdir() if p.is_dir()]) == 1
