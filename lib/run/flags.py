"""Command lines of the tools beside the four stages: flags without presets, and one line for a mistake; and NAME=VALUE."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lib import UserError


class Flags(argparse.ArgumentParser):
    """A parser whose every error is a UserError: one line. Defaults are in the help texts."""

    def __init__(self, module: str, description: str | None) -> None:
        keep = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=f"python -m {module}", description=description, formatter_class=keep, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))

    def add_device(self, dtype: str) -> None:
        from lib.run.hub import DTYPES  # here, because torch is slow to import

        self.add_argument(
            "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute"
        )
        self.add_argument(
            "--dtype",
            choices=tuple(DTYPES),
            default=dtype,
            help=f"of weights; auto: as saved (default: {dtype})",
        )


def number(kind: type, low: float, high: float = 10**6) -> Callable[[str], Any]:
    """For add_argument(type=...): a number of that kind from `low` to `high`."""

    def read(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        name = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"given {text}; allowed {name} from {low} to {high}")

    return read


def named(flag: str, given: Sequence[str], value: str = "FOLDER or NAME=HUB-NAME") -> dict[str, str]:
    """NAME=VALUE ... -> {name: value}; a mistake ends in a UserError that says what `value` is.

    >>> named("--models", ["base=org/chat-model", "tars=runs/demo/rl"])
    {'base': 'org/chat-model', 'tars': 'runs/demo/rl'}
    """
    values: dict[str, str] = {}
    for text in given:
        name, _, its_value = text.partition("=")
        if not its_value or not re.fullmatch(r"[\w.-]+", name) or name in values:
            raise UserError(f"{flag}: given {text}; allowed NAME={value}, NAME a word, used once")
        values[name] = its_value
    return values
