"""What every command has: flags whose mistakes are one line, and an end in one line."""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from lib import UserError
from lib.run.text import visible

at_end = contextlib.ExitStack()  # what a command gives back when it ends: the lock of its folder


def run_main(main: Callable[[], None]) -> None:
    """Run a command. What a user can mend ends in one line on stderr; a bug still shows its traceback."""
    with at_end:
        try:
            main()
        except UserError as error:
            _exit(f"error: {error}")
        except NotImplementedError as error:  # an exercise
            _exit(f"error: not implemented yet: {error}")
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not break off the end
            _exit("stopped; finished work is kept, run the same command again to resume", 130)
        except RuntimeError as error:  # of torch's, which this module does without
            reason, kind = " ".join(str(error).split()), type(error).__name__
            if kind.startswith("Dist") or "gloo" in reason or "Connection" in reason:
                lost = f"lost another process of this run, killed or silent for too long ({reason[:160]})"
                _exit(f"error: {lost}: see its message, then run the same command again to resume")
            if kind == "OutOfMemoryError" or "DefaultCPUAllocator" in reason:
                less = "lower --max-batch-tokens, --max-sample-tokens, or train with --gradient-checkpointing"
                _exit(f"error: out of memory: {less} ({reason[:160]})")
            raise
        except OSError as error:  # disk full, read-only, not ours, a closed pipe
            if isinstance(error, FileNotFoundError) or not error.strerror:
                raise
            where = error.filename or "output"
            _exit(f"error: {where}: {error.strerror}; what was written before is whole")


def _exit(message: str, code: int = 2) -> NoReturn:
    """One line, whatever names of files or models are in it."""
    print(visible(message).replace("\n", "\\n"), file=sys.stderr, flush=True)
    raise SystemExit(code)


class Flags(argparse.ArgumentParser):
    """Every mistake is a UserError, and no flag is shortened: one added later must not change its meaning.

    `module`: of a command that is started by `python -m MODULE`.
    """

    def __init__(self, module: str | None = None, description: str | None = None, **options: Any) -> None:
        options |= {"prog": module and f"python -m {module}", "description": description}
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=layout, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def number(kind: type, low: float, high: float = 10**6) -> Callable[[Any], Any]:
    """For add_argument(type=...): text to an int or a float within the limits."""

    def read(text: Any) -> Any:
        try:
            value = kind(str(text))
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # not a number fails this, too
            allowed = f"a {'whole ' if kind is int else ''}number from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"given {text}; allowed {allowed}")
        return value

    return read
