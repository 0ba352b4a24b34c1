"""What a run was made of, without the places where it lay: for the card and the settings that are shared."""

from __future__ import annotations

import itertools
import os
import re
from typing import Any

from lib.judges import HARM, TASK
from lib.run.folder import SUM

LOCAL = re.compile(r"(?:[/~\\]|\.\.?[/\\]|[A-Za-z]:[/\\]|file:)")  # a path begins so
INSIDE = re.compile(rf"(?<![\w./\\:~<-]){LOCAL.pattern}\S")  # one within other text
BEFORE = re.compile(rf"(?:{SUM})?(?:[\w.-]+=)?(?:[\w-]+@)?")  # checksum, KIND or NAME, known source
ANOTHER = re.compile(rf"(\+(?=(?:{'|'.join([*HARM, *TASK])})[=@]))")  # the second judge of HARM+TASK


def without_paths(value: Any) -> Any:
    """The value with every path in it, keys included, cut down to its last name: home folders are nobody's business.

    A path begins with /, ~, ./, a drive or file:, or has two slashes, or is there, and goes on to the end: names may hold
    blanks and any sign. Hub names and addresses stay. Keys that become the same are told apart, "x (2)".

    >>> without_paths({"model": "/home/joe doe/base", "files": ["harmful=runs/x/a.csv:9"], "judge": "Qwen/Qwen3Guard-Gen-0.6B"})
    {'model': 'base', 'files': ['harmful=a.csv:9'], 'judge': 'Qwen/Qwen3Guard-Gen-0.6B'}
    """
    if isinstance(value, dict):
        told: dict[Any, Any] = {}
        for key, item in value.items():
            name = own = without_paths(key)
            others = itertools.count(2)
            while name in told:
                name = f"{own} ({next(others)})"
            told[name] = without_paths(item)
        return told
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return "".join(map(_last_name, ANOTHER.split(value))) if isinstance(value, str) else value


def _last_name(text: str) -> str:
    begin = BEFORE.match(text).end()  # type: ignore[union-attr]
    rest = text[begin:]
    if not (LOCAL.match(rest) or os.path.exists(rest)):
        if found := INSIDE.search(text, begin):
            begin, rest = found.start(), text[found.start() :]
        elif "://" in rest or len(re.findall(r"(?<=[^\s</\\])[/\\](?!\s)", rest)) < 2:
            return text
    return text[:begin] + (re.split(r"[/\\]", rest.rstrip("/\\"))[-1] or rest)
