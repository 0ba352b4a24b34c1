"""What every command has: an end in one line, and for the tools a parser whose mistakes are one line, too."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from lib import UserError
from lib.run.settings import reader
from lib.run.text import visible

at_end = contextlib.ExitStack()  # what a command gives back when it ends: the lock of its folder
# disk full, read-only, not ours, no such place
MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
MENDABLE |= {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


def run_main(main: Callable[[], None]) -> None:
    """Run a command. What a user can mend ends in one line on stderr; a bug still shows its traceback."""
    if (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):  # a run in the background ignores Ctrl-C
        signal.signal(signal.SIGINT, _interrupt)
    try:
        with at_end:
            main()
    except UserError as error:
        _exit(f"error: {error}", 2)
    except NotImplementedError as error:  # an exercise
        _exit(f"error: not implemented yet: {error or 'see the traceback of python -X dev'}", 2)
    except KeyboardInterrupt:
        _exit("stopped; finished work is kept, run the same command again to resume", 130)
    except RuntimeError as error:
        if reason := _out_of_memory(error):
            less = (
                "lower the tokens of a batch (see --help), or in stages 2 and 3 try --gradient-checkpointing"
            )
            _exit(f"error: {reason}: {less}", 2)
        raise
    except BrokenPipeError:  # the other end of a pipe, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still in the buffer would raise again at exit
        _exit("error: output: its reader has closed it; what was written before is whole", 2)
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        _exit(f"error: {error.filename or 'output'}: {error.strerror}; what was written before is whole", 2)


def _out_of_memory(error: RuntimeError) -> str:
    """Its first sentence if it is torch's, on a GPU or a CPU (this module does without torch), else ""."""
    on_cpu = str(error).partition("DefaultCPUAllocator: ")[2]
    if on_cpu or type(error).__name__ == "OutOfMemoryError":
        return (on_cpu or str(error)).split(". ")[0]
    return ""


def _exit(message: str, code: int) -> NoReturn:
    """One line, whatever names of files or models are in it."""
    print(visible(message).replace("\n", "\\n"), file=sys.stderr, flush=True)
    raise SystemExit(code)


def _interrupt(number: int, frame: Any) -> NoReturn:
    """Ctrl-C, the first one: a second must not break off what this one ends."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


class Flags(argparse.ArgumentParser):
    """The command line of `python -m MODULE`: every error is a UserError."""

    def __init__(self, module: str, description: str | None) -> None:
        keep = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=f"python -m {module}", description=description, formatter_class=keep, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))

    def add_device(self, dtype: str) -> None:
        devices, dtypes = ("auto", "cpu", "cuda", "mps"), ("float32", "bfloat16", "auto")
        self.add_argument("--device", choices=devices, default="auto", help="where to compute")
        help_ = f"of weights; auto: as saved (default: {dtype})"
        self.add_argument("--dtype", choices=dtypes, default=dtype, help=help_)


def number(kind: type, low: float, high: float = 10**6) -> Callable[[str], Any]:
    """For add_argument(type=...): a number of that kind from `low` to `high`."""
    return reader(kind, {"low": low, "high": high, "choices": ()})
