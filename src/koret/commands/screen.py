"""What every command prints with: a console, or JSON for a program."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console


def open_console() -> Console:
    """A terminal of at least 100 columns: tables stay whole when piped."""
    console = Console()
    return console if console.is_terminal else Console(width=max(100, console.width))


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))
