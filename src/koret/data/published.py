"""What the official KorQuAD files are: where they lie, their published sizes and sums, and whether a file is sound.

Checked for 1.0 and 2.1: the download buttons of the KorQuAD site's own pages (repository korquad/korquad.github.io) and
the file names, sizes and sums that the Hugging Face ``datasets`` library recorded for squad_kor_v1 and squad_kor_v2
(dataset_infos.json). The licence, CC BY-ND 2.0 KR, is the one both name.

Not checked: 2.0. Its folder exists beside the 2.1 one (the paper and the evaluation script lie there) and one public
note links KorQuAD_2.0/dev/KorQuAD_2.0_dev_01.zip; that the other files are named and numbered as in 2.1 is inferred.
No address was opened while this table was written, so a file may have moved since: ``--base-url`` replaces the root.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path

import msgspec

SITE = "https://korquad.github.io/dataset/"
REPOSITORY = "https://github.com/korquad/korquad.github.io/raw/master/dataset/"  # redirects to the raw file
ROOTS = {"korquad-1.0": SITE, "korquad-2.0": REPOSITORY, "korquad-2.1": REPOSITORY}

PUBLISHED: dict[str, tuple[int, str]] = {  # file name -> bytes, SHA-256
    "KorQuAD_v1.0_train.json": (38527475, "40d5115879a701751781df721d901abfa736d8db5f89000f2619433f39bf2dd2"),
    "KorQuAD_v1.0_dev.json": (3881058, "25ffeb51e6c51ec02c071b60a10188e10005c144110f0d876b26079d80a35bdf"),
    "KorQuAD_2.1_train_00.zip": (96161084, "98918d10e3e08bf6b34b50d17cd7f7438d5a577a8089d02698d16a151424a36a"),
    "KorQuAD_2.1_train_01.zip": (92163603, "0a8a59ee82e92e9509c5dbf7d98a31c007a3693afb818e37c60ddacf7f48c4b3"),
    "KorQuAD_2.1_train_02.zip": (91681447, "7035a35daac0c210b4754fc6a2885442929754db35e33b40d7c912706c66b9bc"),
    "KorQuAD_2.1_train_03.zip": (94792676, "4a61272d13e535f73fa20f2d1619b895adb763d8fa7cf02d813b733e7f702562"),
    "KorQuAD_2.1_train_04.zip": (94470762, "35834a74b3486eaa32712c689bccaab0c841c3ee252560e754245d3ed89e1c3a"),
    "KorQuAD_2.1_train_05.zip": (93427959, "5ea9b2975451c5a67bc172690a56a6e7a9e87b4001d3d1d684cb1336958a3a3b"),
    "KorQuAD_2.1_train_06.zip": (93224892, "87872acd46c2a8291a176826ad7eb23f3a6cf1db05bb27566d2eac1199a9091b"),
    "KorQuAD_2.1_train_07.zip": (92550803, "a615c0ebba60fc9b55fa602973d504f76d0273592c22f63b7f202655c1bb10bf"),
    "KorQuAD_2.1_train_08.zip": (93684404, "fa3955e23eab859819990edde3dd23308740cf94c3839fb538f30b1126117a39"),
    "KorQuAD_2.1_train_09.zip": (94028022, "b3b7ec508fbacaf6a5c12065e1d061cbfd8990bf2ae4c940a0a8d841294c2c1c"),
    "KorQuAD_2.1_train_10.zip": (93432479, "b7e8e44e43ec63514265e2202f73a4a6ce46f7226cc5662efc6a2ab92161a462"),
    "KorQuAD_2.1_train_11.zip": (94500610, "f6483e1e4b2577603e4fc881ec1651ca2ea5764a4b0f7e5eb59007ed9cc4bbae"),
    "KorQuAD_2.1_train_12.zip": (99301520, "84c4b6391a07bc1fdcc70d7194bda0e65edc796ae9b4e184a58c58d6973af7ad"),
    "KorQuAD_2.1_dev_00.zip": (93536216, "4a0b25f896f333dc470e87b83cef874a9f7ea9a3df4c83f5ce8d5de6d71b07db"),
    "KorQuAD_2.1_dev_01.zip": (56806828, "bf76fe7c684409151f92eacc56d551d0471477c47959b916c002ae39666caf59"),
}


def list_files(dataset: str) -> list[str]:
    """Paths below the root: train, then dev; KorQuAD 2.x train is 13 zips of three JSON files, dev is 2 zips."""
    if dataset == "korquad-1.0":
        return ["KorQuAD_v1.0_train.json", "KorQuAD_v1.0_dev.json"]
    name = dataset.replace("korquad-", "KorQuAD_")
    numbers = [("train", i) for i in range(13)] + [("dev", i) for i in range(2)]
    return [f"{name}/{split}/{name}_{split}_{i:02d}.zip" for split, i in numbers]


class Damaged(Exception):
    """The file is not what it should be; the message says why."""


def verify_file(path: Path) -> bool | None:
    """Whether the file, complete or NAME.part, has its published SHA-256 (None: none known for its name).

    Without that proof every zip member's CRC is checked, or the whole JSON parsed. Raises Damaged unless it is sound.
    """
    name = path.name.removesuffix(".part")
    size, digest = PUBLISHED.get(name, (None, None))
    if size == path.stat().st_size and _hash(path) == digest:
        return True
    try:
        _read_zip(path) if name.endswith(".zip") else msgspec.json.decode(path.read_bytes(), type=_KorQuAD)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise Damaged(str(error)) from error
    return None if size is None else False


def looks_like(head: bytes, name: str) -> bool:
    """Whether the first bytes of a file fit its name: a zip archive, or a JSON object."""
    magic = b"PK" if name.endswith(".zip") else b"{"
    head = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    return head.startswith(magic) or magic.startswith(head)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _KorQuAD(msgspec.Struct):
    version: str
    data: list[msgspec.Raw]


def _read_zip(path: Path) -> None:
    """Read every member in pieces, which checks its CRC, and see that KorQuAD JSON is among them."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"wrong CRC in {damaged}")
        names = [name for name in archive.namelist() if name.endswith(".json") and not name.startswith("__MACOSX")]
        if not names:
            raise ValueError("no JSON file in it")
        for name in names:
            with archive.open(name) as member:
                if not looks_like(member.read(64), name):
                    raise ValueError(f"{name} is not JSON")
