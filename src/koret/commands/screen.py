"""What every command prints with: a console, or JSON for a program."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.segment import Segment

from koret.privacy import make_printable


class _Printable(RenderHook):
    """What is printed is shown: only rich itself may command the terminal, not a text from a corpus."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Shown(renderable) for renderable in renderables]


class _Shown:
    def __init__(self, renderable: ConsoleRenderable) -> None:
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.renderable, options):
            yield segment if segment.control else Segment(make_printable(segment.text), segment.style)


def open_console() -> Console:
    """A terminal of at least 100 columns: tables stay whole when piped."""
    console = Console()
    console = console if console.is_terminal else Console(width=max(100, console.width))
    console.push_render_hook(_Printable())
    return console


def print_json(value: Any) -> None:
    """JSON as its standard has it: a number that is not finite is printed as null."""
    text = json.dumps(_replace_nan(value), ensure_ascii=False, indent=2, allow_nan=False)
    print(re.sub(r"[\x7f-\x9f]", lambda control: f"\\u{ord(control[0]):04x}", text))


def _replace_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _replace_nan(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_nan(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
