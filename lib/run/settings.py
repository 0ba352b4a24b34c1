"""A stage's command line: a dataclass, a preset, and flags.

A stage declares each flag once, with `setting`; help, type, range and default live in that one line:

    @dataclass
    class Settings:
        preset: str = setting("sandbox", "where the defaults come from")
        learning_rate: float = setting(3e-5, "peak rate of AdamW", low=0.0)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import importlib
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from transformers import HfArgumentParser

from lib import UserError
from lib.run.text import visible

T = TypeVar("T")
LAST_SEED = 2**32 - 1
TOKENS = 10**9  # no budget of tokens is larger
Fields = dict[str, dataclasses.Field]
PRESETS = Path(__file__).parent / "presets"
at_end = contextlib.ExitStack()  # what a command gives back when it ends: the lock of its folder
# disk full, read-only, not ours, no such place
MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
MENDABLE |= {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """A dataclass field that is a flag. low <= number <= high; `choices` for text (each item of a list).

    A number must have a `low`, and has a million for a `high` where none is given: a slip of the finger is one line then, and
    no endless run.
    """
    if type(default) in (int, float):
        if low is None:
            raise TypeError(f"setting {help!r}: a number needs a low")
        high = 10**6 if high is None else high
    return _field(default, {"help": help, "low": low, "high": high, "choices": choices})


def _field(default: Any, metadata: dict[str, Any]) -> Any:
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_settings(cls: type[T], stage: str, argv: Sequence[str] | None = None) -> T:
    """The stage's settings: the dataclass's defaults, then the preset's, then the flags in `argv`.

    `stage` is mixture, sft, rl or eval: the dict of that name in capitals in lib/run/presets/NAME.py. `--objective rpo` puts
    that of RPO, where there is one, on top. A mistake ends the program with one line on stderr, "error: --flag: given X;
    allowed ...", and exit code 2.
    """
    try:
        return _parse(cls, stage, list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        _exit(f"error: {error}", 2)


def _parse(cls: type[T], stage: str, argv: list[str]) -> T:
    fields: Fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    types = get_type_hints(cls)
    defaults = {name: _default(field) for name, field in fields.items()}
    if any(word.split("=")[0] == "--preset" for word in argv):
        defaults["preset"] = _given(argv, "--preset")
    defaults |= _preset_values(defaults["preset"], stage, fields)
    if argv and _given(argv, "--objective") == "rpo":
        defaults |= _preset_values(defaults["preset"], "rpo", fields)

    parser = _parser(cls, fields, types, defaults)
    try:
        known, rest = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except argparse.ArgumentError as error:
        flag = (error.argument_name or "").split("/")[-1]
        name = flag.removeprefix("--").replace("-", "_")
        name = name if name in fields else name.removeprefix("no_")
        raise _wrong(name, _given(argv, flag), fields[name], types[name]) from None
    if rest:
        raise UserError(_unknown(rest[0], fields, types))
    values = dataclasses.asdict(known)
    for name, value in values.items():
        if types[name] is float and type(value) is int:  # a preset may say 1 for 1.0
            values[name] = value = float(value)
        if not _is_allowed(value, fields[name], types[name]):
            raise _wrong(name, value, fields[name], types[name])
    return cls(**values)


def presets_found() -> list[str]:
    """Names of the presets: the modules in lib/presets."""
    return sorted(path.stem for path in PRESETS.glob("*.py") if not path.stem.startswith("_"))


def _preset_values(preset: str, stage: str, fields: Fields) -> dict[str, Any]:
    if preset not in presets_found():
        raise UserError(f"--preset: given {preset}; allowed {' | '.join(presets_found())} (lib/run/presets)")
    values = getattr(importlib.import_module(f"lib.run.presets.{preset}"), stage.upper(), {})
    for name in values:
        if name not in fields:
            raise UserError(
                f"lib/run/presets/{preset}.py: {stage.upper()} sets {name!r}, no setting of that stage"
            )
    return values


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _parser(cls: type, fields: Fields, types: dict[str, Any], defaults: dict) -> HfArgumentParser:
    """HfArgumentParser over a twin of `cls` that has the preset's defaults.

    It hands all of a field's metadata to argparse, so the twin's has the help alone, and ranges are checked
    here.
    """
    twin = []
    for name, field in fields.items():
        free = types[name] is bool or (types[name] in (str, list[str]) and not field.metadata["choices"])
        allowed = "" if free else f"{_allowed(field, types[name])}; "
        text = f"{field.metadata['help']} ({allowed}default: {shown(defaults[name])})"
        twin.append((name, types[name], _field(defaults[name], {"help": text.replace("%", "%%")})))
    parser = HfArgumentParser(
        dataclasses.make_dataclass(cls.__name__, twin),  # type: ignore[arg-type]
        formatter_class=_Help,
        usage="%(prog)s [--preset NAME] [--flag value ...]",
        description=sys.modules[cls.__module__].__doc__,
        epilog=f"presets: {', '.join(presets_found())}; defaults above: those of {defaults['preset']}",
        allow_abbrev=False,  # a flag that is added later must not change what a shortened one means
        exit_on_error=False,
    )
    for name, default in defaults.items():
        if types[name] is bool and not default:  # for a default of True HfArgumentParser has added it
            flags = (f"--no_{name}", f"--no-{name.replace('_', '-')}")
            parser.add_argument(*flags, dest=name, action="store_false", default=False)
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows of each flag only its dashed name, and --no-x together with --x; underscores work too."""

    def add_argument(self, action: argparse.Action) -> None:
        if not action.option_strings[-1].startswith("--no-"):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flag = action.option_strings[-1]
        if action.nargs == 0:
            return flag
        if action.nargs == "?":
            return f"--[no-]{flag[2:]}"
        return f"{flag} {self._format_args(action, action.dest.upper())}"


def _given(argv: Sequence[str], flag: str) -> str:
    """What the command line says for `flag` the last time it occurs; "nothing" if no value follows."""
    given = "nothing"
    for word, following in zip(argv, [*argv[1:], "--"], strict=False):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag.replace("_", "-"):
            given = value if equals else "nothing" if following.startswith("--") else following
    return given


def _is_allowed(value: Any, field: dataclasses.Field, kind: Any) -> bool:
    """Whether the final value, a flag's or a preset's, has the field's type and lies in its range."""
    low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
    if kind == list[str]:
        return isinstance(value, list) and all(
            type(v) is str and (not choices or v in choices) for v in value
        )
    if type(value) is not kind:
        return False
    if kind in (int, float):
        return low <= value <= high
    return not choices or value in choices


def _allowed(field: dataclasses.Field, kind: Any) -> str:
    low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
    if choices:
        return " | ".join(choices)
    if kind not in (int, float):
        return "true | false" if kind is bool else "some text"
    name = "a whole number" if kind is int else "a number"
    return f"{name} from {low} to {high}" if kind is int else f"{name} from {low:g} to {high:g}"


def _wrong(name: str, value: Any, field: dataclasses.Field, kind: Any) -> UserError:
    return UserError(f"--{name.replace('_', '-')}: given {shown(value)}; allowed {_allowed(field, kind)}")


def _unknown(word: str, fields: Iterable[str], types: dict[str, Any]) -> str:
    if not word.startswith("--"):
        return f"given {word}; allowed flags only, written --name value (see --help)"
    word = word.split("=")[0]
    flags = [f"--{name.replace('_', '-')}" for name in fields]
    flags += [f"--no-{name.replace('_', '-')}" for name in fields if types[name] is bool]
    close = difflib.get_close_matches(word.replace("_", "-"), flags, n=1)
    return f"{word}: no such flag; {f'did you mean {close[0]}?' if close else 'see --help'}"


def shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) or "empty"


KEPT = {  # by the script of the next stage: what of this one's settings is wanted there, too
    "02_sft_warmstart.py": ("seed", "device"),
    "03_rl_train.py": ("seed", "device", "dtype", "gradient_checkpointing", "shard", "offload", "reasoning"),
    "04_attack_eval.py": ("seed", "device", "dtype", "judge"),
}


def next_command(script: str, settings: Any, stage: str, **flags: Any) -> str:
    """The next stage's command line, to be pasted into a shell: the preset, `flags`, and what of `settings` is wanted there.

    `settings` are this stage's, called `stage` as in `parse_settings`; those that are as the preset has them are left out.
    """
    fields: Fields = {field.name: field for field in dataclasses.fields(settings)}
    usual = {name: _default(field) for name, field in fields.items()} | _preset_values(
        settings.preset, stage, fields
    )
    kept = {
        name: getattr(settings, name)
        for name in KEPT[script]
        if name in fields and getattr(settings, name) != usual[name]
    }
    words = [script]
    for name, value in {"preset": settings.preset, **flags, **kept}.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            words += [flag, *value]
        else:
            words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    several = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return ("python " if several == "1" else f"torchrun --nproc-per-node {several} ") + shlex.join(words)


def model_and_out(out: str | Path) -> dict[str, Any]:
    """Flags of stage 4 for the model in `out`, called as its folder is, as far as --models allows; results go beside it."""
    name = re.sub(r"[^\w.-]+", "-", os.path.basename(os.path.abspath(out))).strip("-") or "model"
    return {"models": [f"{name}={out}"], "out": beside(out, f"eval-{name}")}


def beside(out: str | Path, name: str) -> str:
    """The path of that name in the folder that `out` is in.

    >>> beside("runs/demo/sft", "rl"), beside(".", "rl")
    ('runs/demo/rl', '../rl')
    """
    return os.path.normpath(Path(out) / ".." / name)


def _exit(message: str, code: int) -> NoReturn:
    """One line, whatever names of files or models are in it."""
    print(visible(message).replace("\n", "\\n"), file=sys.stderr, flush=True)
    raise SystemExit(code)


def _interrupt(number: int, frame: Any) -> NoReturn:
    """Ctrl-C, the first one: a second must not break off what this one ends."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def run_main(main: Callable[[], None]) -> None:
    """Run a stage. What a user can mend ends in one line on stderr; a bug still shows its traceback."""
    if (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):  # a run in the background ignores Ctrl-C
        signal.signal(signal.SIGINT, _interrupt)
    try:
        with at_end:
            main()
    except UserError as error:
        _exit(f"error: {error}", 2)
    except KeyboardInterrupt:
        _exit("stopped; finished work is kept, run the same command again to resume", 130)
    except RuntimeError as error:
        # torch's, on a GPU and on a CPU; this module does without torch
        if type(error).__name__ != "OutOfMemoryError" and "DefaultCPUAllocator" not in str(error):
            raise
        reason = str(error).partition("DefaultCPUAllocator: ")[2] or str(error)
        reason = reason.split(". ")[0]
        _exit(
            f"error: {reason}: lower the tokens of a batch (see --help), or in stages 2 and 3 try --gradient-checkpointing",
            2,
        )
    except BrokenPipeError:  # the other end of a pipe, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still in the buffer would raise again at exit
        _exit("error: output: its reader has closed it; what was written before is whole", 2)
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        _exit(f"error: {error.filename or 'output'}: {error.strerror}; what was written before is whole", 2)
