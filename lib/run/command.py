"""What every command has: an end in one line, and for the tools a parser whose mistakes are one line, too."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from lib import UserError
from lib.run.settings import Parser, reader
from lib.run.text import visible

at_end = contextlib.ExitStack()  # what a command gives back when it ends: the lock of its folder
# disk full, read-only, not ours, no such place
MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
MENDABLE |= {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


def run_main(main: Callable[[], None]) -> None:
    """Run a command. What a user can mend ends in one line on stderr; a bug still shows its traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background Ctrl-C is ignored
        signal.signal(signal.SIGINT, _interrupt)
    try:
        with at_end:
            main()
    except UserError as error:
        _exit(f"error: {error}")
    except NotImplementedError as error:  # an exercise
        _exit(f"error: not implemented yet: {error or 'see the traceback of python -X dev'}")
    except KeyboardInterrupt:
        _exit("stopped; finished work is kept, run the same command again to resume", 130)
    except RuntimeError as error:  # of torch's, which this module does without
        on_cpu = str(error).partition("DefaultCPUAllocator: ")[2]
        if not on_cpu and type(error).__name__ != "OutOfMemoryError":
            raise
        reason = (on_cpu or str(error)).split(". ")[0]
        less = "lower the tokens of a batch (see --help), or in stages 2 and 3 try --gradient-checkpointing"
        _exit(f"error: {reason}: {less}")
    except BrokenPipeError:  # the other end of a pipe, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still in the buffer would raise again at exit
        _exit("error: output: its reader has closed it; what was written before is whole")
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        _exit(f"error: {error.filename or 'output'}: {error.strerror}; what was written before is whole")


def _exit(message: str, code: int = 2) -> NoReturn:
    """One line, whatever names of files or models are in it."""
    print(visible(message).replace("\n", "\\n"), file=sys.stderr, flush=True)
    raise SystemExit(code)


def _interrupt(number: int, frame: Any) -> NoReturn:
    """Ctrl-C, the first one: a second must not break off what this one ends."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


class Flags(Parser):
    """The command line of `python -m MODULE`: every error is a UserError."""

    def __init__(self, module: str, description: str | None) -> None:
        super().__init__(prog=f"python -m {module}", description=description)

    def add_device(self, dtype: str) -> None:
        devices, dtypes = ("auto", "cpu", "cuda", "mps"), ("float32", "bfloat16", "auto")
        self.add_argument("--device", choices=devices, default="auto", help="where to compute")
        help_ = f"of weights; auto: as saved (default: {dtype})"
        self.add_argument("--dtype", choices=dtypes, default=dtype, help=help_)


number = reader  # for add_argument(type=...): number(int, low, high)
