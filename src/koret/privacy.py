"""Keep secrets, user names and absolute paths out of shared files, and control characters off the screen."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SECRET = r"(?:token|secret|password|passwd|credentials?|(?:api|access|private|secret)[_-]?key)"
_SECRET_NAME = re.compile(_SECRET + "$", re.IGNORECASE)
_PREFIX_NAME = re.compile(r"[_-]prefix$")  # what a model reads before a text: "[/INST] " is no path
_SECRET_OPTION = re.compile(rf"(--[\w-]*{_SECRET}=)\S+", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_)[A-Za-z0-9_-]{8,}")
_ABSOLUTE_PATH = re.compile(r"(?<![\w.~/:-])/(?:[^\s/'\",;:]+/)*[^\s/'\",;:]+")

# Control characters but tab and line end: a terminal obeys them. What stands for them is drawn instead.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def make_printable(text: str) -> str:
    """The text with every character that would command a terminal as a picture of it: escape becomes ``␛``."""
    return text.translate(_PICTURES)


def scrub(value: Any) -> Any:
    """A copy of a JSON value without secrets, user name or absolute paths, so that a run directory can be shared.

    Values under secret-sounding keys, values of secret-sounding environment variables and well-known token shapes
    become ``***``; absolute paths become portable ones (``portable_path``), but in prefixes of texts.
    """
    if isinstance(value, Mapping):
        return {str(key): _scrub_named(str(key), item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):  # perhaps a command line: "--hub-token", "..."
        names = ["", *(str(item) if str(item).startswith("--") else "" for item in value)]
        return [_scrub_named(name, item) for name, item in zip(names, value, strict=False)]
    return _scrub_text(value) if isinstance(value, str) else value


def _scrub_named(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return scrub(value)
    if value and _SECRET_NAME.search(name):
        return "***"
    return _hide_secrets(value) if _PREFIX_NAME.search(name) else _scrub_text(value)


def _scrub_text(text: str) -> str:
    text = _hide_secrets(text)
    return portable_path(text) if text.startswith("/") else _ABSOLUTE_PATH.sub(lambda m: portable_path(m[0]), text)


def _hide_secrets(text: str) -> str:
    for name, secret in os.environ.items():
        if len(secret) >= 6 and _SECRET_NAME.search(name):
            text = text.replace(secret, "***")
    return _SECRET_TEXT.sub("***", _SECRET_OPTION.sub(r"\1***", text))


def portable_path(path: str) -> str:
    """An absolute path as seen from the working directory, or from ``~`` when that lies below neither; others as is."""
    if not os.path.isabs(path):
        return path
    home = os.path.expanduser("~")
    here = os.path.relpath(path)
    if home != "/" and os.path.commonpath([home, path]) == home and not _stays_below(here, home):
        return "~/" + os.path.relpath(path, home)
    return here


def _stays_below(relative: str, home: str) -> bool:
    """Whether following ``relative`` from the working directory never leaves ``home`` (and so never names it)."""
    upwards = os.path.normpath(os.path.join(os.getcwd(), *[p for p in Path(relative).parts if p == ".."]))
    return os.path.commonpath([upwards, home]) == home
