"""Do exported folders load in plain sentence-transformers? Makes the environments its backends need, and compares.

    python tools/check_backends.py FOLDER [FOLDER ...] [--work DIR]

optimum-onnx and optimum-intel pin other releases of transformers than koret uses, and each other's, so each backend
gets an environment of its own (some GB of packages; kept in --work for the next time). A folder is loaded there as its
users load it, and its vectors must be those that koret's own reader gives. Slow, and needs a package index: not part
of the test suite.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np

from koret.export.runtime import open_exported

TORCH = "torch==2.13.0"  # first, and again with the rest: the index's newest would bring CUDA
UNNEEDED = ("torchvision", "torchaudio", "torchcodec")
ENVIRONMENTS = {
    "onnx": ["sentence-transformers==5.7.0", "optimum-onnx==0.1.0", "onnxruntime"],
    "openvino": ["sentence-transformers", "optimum-intel", "openvino"],
    "torch": ["sentence-transformers==5.7.0", "transformers<5"],  # merged folders in the release before
}
LEAST_COSINE = {"onnx": 0.9999, "openvino": 0.999, "torch": 0.99999}
TEXTS = [
    "한라산의 높이는 얼마인가?",
    "값이 깎인 외국 떡볶이의 뒷맛",
    "세종은 1446년에 훈민정음을 반포하였다. " * 30,
    "e",
]
LOAD = """
import json, sys
from importlib.metadata import version
from sentence_transformers import SentenceTransformer
folder, backend, file, texts = json.loads(sys.argv[1])
more = {"model_kwargs": {"file_name": file}} if file else {}
model = SentenceTransformer(folder, backend=backend, device="cpu", local_files_only=True, **more)
vectors = [[model.encode([text], prompt_name=kind)[0].tolist() for text in texts] for kind in ("query", "passage")]
names = ("sentence-transformers", "transformers")
print(json.dumps([type(model[0]).__name__, {name: version(name) for name in names}, vectors]))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "koret-backends", metavar="DIR")
    options = parser.parse_args()
    return 0 if all([check(folder.resolve(), options.work) for folder in options.folders]) else 1


def check(folder: Path, work: Path) -> bool:
    """Whether a folder loads and gives the vectors it should; says so."""
    files = [file.relative_to(folder).as_posix() for ending in ("onnx", "xml") for file in folder.rglob(f"*.{ending}")]
    backend = files[0].partition("/")[0] if files else "torch"
    standard = ("onnx/model.onnx", "openvino/openvino_model.xml")
    file = None if not files or files[0] in standard else files[0]
    python = make_environment(work / backend, ENVIRONMENTS[backend])
    asked = json.dumps([str(folder), backend, file, TEXTS])
    done = subprocess.run([str(python), "-c", LOAD, asked], capture_output=True, text=True, cwd=work)
    if done.returncode:
        print(f"FAILED {folder}: {done.stderr.strip().splitlines()[-1]}")
        return False
    _, versions, vectors = json.loads(done.stdout.strip().splitlines()[-1])
    own = open_exported(folder)
    worst = 1.0
    for kind, found in zip(("query", "passage"), vectors, strict=True):
        alone = np.concatenate([own.encode([text], kind) for text in TEXTS])
        worst = min(worst, float(np.einsum("nd,nd->n", alone, np.asarray(found)).min()))
    passed = worst >= LEAST_COSINE[backend]
    print(f"{'ok    ' if passed else 'FAILED'} {folder.name}: backend {backend}, {versions}, worst cosine {worst:.7f}")
    return passed


def make_environment(home: Path, packages: list[str]) -> Path:
    """The Python of an environment with torch and ``packages``, made in ``home`` when it is not there yet."""
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        print(f"making the environment for {home.name} in {home}", file=sys.stderr)
        venv.create(home, with_pip=True, clear=True)
        for more in ([], packages):
            subprocess.run([str(python), "-m", "pip", "install", "-q", TORCH, *more], check=True)
        # asked for by optimum-intel and vLLM, but these builds do not load beside torch's CPU build; texts need none
        subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", *UNNEEDED], check=True)
        (home / "ready").touch()
    return python


if __name__ == "__main__":
    sys.exit(main())
