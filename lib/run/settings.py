"""A stage's settings: a dataclass, a preset, and flags.

A chapter declares each setting once; its help, type, range and default stand in that one line:

    @dataclass
    class Settings(Training):
        group_size: int = setting(8, "completions a prompt, G. Paper: 8", low=2, high=1000)

What few people change is no flag (`flag=False`): only presets (lib/run/presets) set it, or you in the class.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from lib import UserError

T = TypeVar("T")
LAST_SEED = 2**32 - 1
TOKENS = 10**9  # no budget of tokens is larger
PRESETS = Path(__file__).parent / "presets"


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float = 10**6,
    choices: Sequence[str] = (),
    flag: bool = True,
) -> Any:
    """A field of a settings class: low <= number <= high; `choices` for text, or for each item of a list.

    A number must have a `low`: a slip of the finger is one line then, and no endless run.
    """
    if type(default) in (int, float) and low is None:
        raise TypeError(f"setting {help!r}: a number needs a low")
    metadata = {"help": help, "low": low, "high": high, "choices": tuple(choices), "flag": flag}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Common:
    """What every stage has."""

    preset: str = setting("sandbox", "where the defaults come from")
    out: str = setting("runs/demo/out", "folder to write")
    overwrite: bool = setting(False, "empty OUT first if it holds a run with other settings")
    seed: int = setting(0, "of every random choice", low=0, high=LAST_SEED)
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    date: str = setting(
        "", "day that chat templates are told; none: that of the run in OUT, or today", flag=False
    )

    def inputs(self) -> list[str]:
        """Paths that the run reads: with another content it would be another run."""
        return []


@dataclass
class Training(Common):
    """What the stages that train a model have."""

    data: str = setting("runs/demo/data", "folder that 01_build_mixture.py wrote")
    model: str = setting("lib/sandbox/base", "where to start: a folder or a hub name")
    reasoning: bool = setting(
        True, "think before answering; --no-reasoning: answers alone (the paper's baseline)"
    )
    learning_rate: float = setting(1e-5, "peak rate of AdamW", low=0.0, high=1.0)
    warmup_steps: int = setting(0, "steps of linear warm-up", low=0, flag=False)
    decay: bool = setting(False, "after the warm-up, decay the rate linearly to zero", flag=False)
    weight_decay: float = setting(0.0, "of AdamW", low=0.0, high=100.0, flag=False)
    adam_eps: float = setting(1e-8, "epsilon of AdamW", low=1e-16, high=1.0, flag=False)
    max_grad_norm: float = setting(1.0, "gradient clipping, L2 norm; 0: none", low=0.0, flag=False)
    max_batch_tokens: int = setting(
        16384, "tokens, padding too, of a micro-batch: lower it when out of memory", low=16, high=TOKENS
    )
    gradient_checkpointing: bool = setting(False, "recompute activations backward: less memory, slower")
    shard: bool = setting(False, "with torchrun: each process keeps a part of the model (FSDP2)")
    offload: bool = setting(False, "with --shard: keep the shards in the CPU's memory")
    save_every: int = setting(10, "steps between resume points", low=1)
    dtype: str = setting(
        "float32", "to compute in; weights stay float32. Paper: bfloat16", choices=("float32", "bfloat16")
    )


# Settings that say how to compute, not what: a run may go on with others.
MACHINERY = {"device", "save_every", "rollouts_every", "shard", "offload", "gradient_checkpointing"}
MACHINERY |= {
    "max_batch_tokens",
    "max_sample_tokens",
    "rainbow_archives",
}  # more archives: the search goes on


def parse_settings(cls: type[T], *stages: str, argv: Sequence[str] | None = None) -> T:
    """Defaults of the class, then those of the preset, then the flags in `argv` (none: the command line's).

    `stages`: names of dicts in lib/run/presets/NAME.py, such as "rl"; a later one goes before an earlier one.
    Raises UserError for a mistake.
    """
    argv = sys.argv[1:] if argv is None else argv
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    types = get_type_hints(cls)
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=fields["preset"].default)
    preset = first.parse_known_args(argv)[0].preset
    values = preset_values(cls, preset, *stages)

    parser = _Parser(
        description=sys.modules[cls.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a flag that is added later must not change what a shortened one means
        usage="%(prog)s [--flag value ...]",
        epilog=f"presets: {', '.join(presets_found())} (lib/run/presets); defaults above: those of {preset}",
    )
    for name, field in fields.items():
        if field.metadata["flag"]:
            _add_flag(parser, name, field, types[name], values[name])
    known, rest = parser.parse_known_args(argv)
    if rest:
        raise UserError(_unknown(rest[0], parser))
    return cls(**{**values, **vars(known), "preset": preset})


def presets_found() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.py") if not path.stem.startswith("_"))


def preset_values(cls: type, preset: str, *stages: str) -> dict[str, Any]:
    """All settings of the class as the preset has them. Raises UserError for a preset that breaks a rule."""
    if preset not in presets_found():
        raise UserError(f"--preset: given {preset}; allowed {' | '.join(presets_found())} (lib/run/presets)")
    types, default = get_type_hints(cls), cls()
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {name: getattr(default, name) for name in fields} | {"preset": preset}
    module = importlib.import_module(f"lib.run.presets.{preset}")
    for stage in stages:
        for name, value in getattr(module, stage.upper(), {}).items():
            where = f"lib/run/presets/{preset}.py: {stage.upper()}"
            if name not in fields and stage != stages[-1]:
                continue
            if name not in fields:
                raise UserError(f"{where} sets {name!r}, no setting of that stage")
            try:
                values[name] = _checked(value, fields[name], types[name])
            except argparse.ArgumentTypeError as error:
                raise UserError(f"{where}: {name}: {error}") from None
    return values


def _checked(value: Any, field: dataclasses.Field, kind: Any) -> Any:
    """A preset's value as the flag would read it."""
    read = reader(kind, field.metadata)
    if kind == list[str]:
        return [read(item) for item in value]
    return value if kind is bool else read(str(value))


def _add_flag(
    parser: argparse.ArgumentParser, name: str, field: dataclasses.Field, kind: Any, default: Any
) -> None:
    flag, text = f"--{name.replace('_', '-')}", field.metadata["help"].replace("%", "%%")
    if field.metadata["choices"]:
        text += f" ({' | '.join(field.metadata['choices'])})"
    text += f" (default: {shown(default)})"
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        return
    many: dict[str, Any] = {"nargs": "+"} if kind == list[str] else {}
    metavar = "N" if kind in (int, float) else "TEXT"
    parser.add_argument(
        flag, type=reader(kind, field.metadata), default=default, help=text, metavar=metavar, **many
    )


def reader(kind: Any, limits: Any) -> Callable[[str], Any]:
    """For add_argument(type=...): text to a value of that kind, within low, high and choices of `limits`."""
    low, high, choices = limits["low"], limits["high"], limits["choices"]
    if kind not in (int, float):

        def read_text(text: str) -> str:
            if choices and text not in choices:
                raise argparse.ArgumentTypeError(f"given {text}; allowed {' | '.join(choices)}")
            return text

        return read_text
    name = f"a {'whole ' if kind is int else ''}number from {low:g} to {high:g}"

    def read_number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # not a number fails this, too
            raise argparse.ArgumentTypeError(f"given {text}; allowed {name}")
        return value

    return read_number


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def _unknown(word: str, parser: argparse.ArgumentParser) -> str:
    if not word.startswith("--"):
        return f"given {word}; allowed flags only, written --name value (see --help)"
    word = word.split("=")[0]
    flags = [flag for action in parser._actions for flag in action.option_strings]
    close = difflib.get_close_matches(word.replace("_", "-"), flags, n=1)
    return f"{word}: no such flag; {f'did you mean {close[0]}?' if close else 'see --help'}"


def shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) or "none"


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


# ---- the next command ----

KEPT = {  # by the next stage's script: what of this one's settings is wanted there, too
    "02_sft_warmstart.py": ("seed", "device"),
    "03_rl_train.py": ("seed", "device", "dtype", "gradient_checkpointing", "shard", "offload", "reasoning"),
    "04_attack_eval.py": ("seed", "device", "dtype", "judge"),
}


def following(settings: Any, stages: Sequence[str]) -> str:
    """What comes after the run with these settings. RL follows on traces of SFT, else the evaluation."""
    out = settings.out
    if stages[0] == "mixture":
        script, folder, model = "02_sft_warmstart.py", "sft", settings.trace_model
        if not settings.sft_prompts:
            script, folder, model = "03_rl_train.py", "rl", settings.rainbow
        start = {"model": model} if model else {}
        return next_command(script, settings, stages, data=out, out=beside(out, folder), **start)
    if stages[0] == "sft" and settings.traces == "sft.jsonl":
        name = model_name(out)
        rl = beside(out, name.replace("sft", "rl") if "sft" in name else f"{name}-rl")
        command = next_command("03_rl_train.py", settings, stages, data=settings.data, model=out, out=rl)
        short = "" if settings.reasoning else " (an answer alone is short: add its length, --max-new-tokens)"
        return command + short
    name = model_name(out)
    flags = {"data": settings.data, "models": f"{name}={out}", "out": beside(out, f"eval-{name}")}
    return next_command("04_attack_eval.py", settings, stages, **flags)


def next_command(script: str, settings: Any, stages: Sequence[str], **flags: Any) -> str:
    """The next stage's command, to be pasted into a shell: the preset, `flags`, and what is kept of
    `settings`.

    Those that are as the preset has them are left out.
    """
    usual = preset_values(type(settings), settings.preset, *stages)
    kept = {name: getattr(settings, name) for name in KEPT[script] if name in usual}
    flags |= {name: value for name, value in kept.items() if value != usual[name]}
    words = [script]
    for name, value in {"preset": settings.preset, **flags}.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif str(value).startswith("-"):
            words.append(f"--{flag}={value}")
        else:
            words += [f"--{flag}", str(value)]
    several = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return ("python " if several == "1" else f"torchrun --nproc-per-node {several} ") + shlex.join(words)


def model_name(out: str | Path) -> str:
    """What stage 4 may call the model in `out`: as its folder is called, as far as --models allows."""
    return re.sub(r"[^\w.-]+", "-", os.path.basename(os.path.abspath(out))).strip("-") or "model"


def beside(out: str | Path, name: str) -> str:
    """The path of that name in the folder that `out` is in.

    >>> beside("runs/demo/sft", "rl"), beside(".", "rl")
    ('runs/demo/rl', '../rl')
    """
    return os.path.normpath(Path(out) / ".." / name)
