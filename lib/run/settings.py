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


def setting(default: Any, help: str, *, low=0.0, high: float = 10**6, choices=(), flag: bool = True) -> Any:
    """A field of a settings class: low <= number <= high; `choices` for text, or for each item of a list."""
    metadata = {"help": help, "limits": (low, high, choices), "choices": choices, "flag": flag}
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
    date: str = setting("", "day that templates are told; none: that of the run in OUT, or today", flag=False)

    def inputs(self) -> list[str]:
        """Paths that the run reads: with another content it would be another run."""
        return []


@dataclass
class Training(Common):
    """What the stages that train a model have."""

    data: str = setting("runs/demo/data", "folder that 01_build_mixture.py wrote")
    model: str = setting("lib/sandbox/base", "where to start: a folder or a hub name")
    reasoning: bool = setting(True, "think first; --no-reasoning: answers alone (the paper's baseline)")
    learning_rate: float = setting(1e-5, "peak rate of AdamW", low=0.0, high=1.0)
    warmup_steps: int = setting(0, "steps of linear warm-up", low=0, flag=False)
    decay: bool = setting(False, "after the warm-up, decay the rate linearly to zero", flag=False)
    weight_decay: float = setting(0.0, "of AdamW", low=0.0, high=100.0, flag=False)
    adam_eps: float = setting(1e-8, "epsilon of AdamW", low=1e-16, high=1.0, flag=False)
    max_grad_norm: float = setting(1.0, "gradient clipping, L2 norm; 0: none", low=0.0, flag=False)
    max_batch_tokens: int = setting(16384, "tokens, with padding, of a micro-batch", low=16, high=TOKENS)
    gradient_checkpointing: bool = setting(False, "recompute activations backward: less memory, slower")
    shard: bool = setting(False, "with torchrun: each process keeps a part of the model (FSDP2)")
    offload: bool = setting(False, "with --shard: keep the shards in the CPU's memory")
    save_every: int = setting(10, "steps between resume points", low=1)
    dtype: str = setting("float32", "to compute in. Paper: bfloat16", choices=("float32", "bfloat16"))


# Settings that say how to compute, not what: a run may go on with others. More archives: the search goes on.
MACHINERY = {"device", "save_every", "rollouts_every", "shard", "offload", "gradient_checkpointing"}
MACHINERY |= {"max_batch_tokens", "max_sample_tokens", "rainbow_archives"}


class Parser(argparse.ArgumentParser):
    """Every error is a UserError, and no flag is shortened: one added later must not change its meaning."""

    def __init__(self, **options: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=layout, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def parse_settings(cls: type[T], *stages: str, argv: Sequence[str] | None = None) -> T:
    """Defaults of the class, then those of the preset, then the flags in `argv` (none: the command line's).

    `stages`: names of dicts in lib/run/presets/NAME.py, such as "rl"; a later one goes before an earlier one.
    Raises UserError for a mistake.
    """
    first = Parser(add_help=False)
    first.add_argument("--preset", default=cls.preset)  # type: ignore[attr-defined]
    preset = first.parse_known_args(argv)[0].preset
    values, types = preset_values(cls, preset, *stages), get_type_hints(cls)
    parser = Parser(
        description=sys.modules[cls.__module__].__doc__,
        usage="%(prog)s [--flag value ...]",
        epilog=f"presets: {', '.join(presets_found())} (lib/run/presets); defaults above: those of {preset}",
    )
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.metadata["flag"]:
            _add_flag(parser, field, types[field.name], values[field.name])
    return cls(**values | vars(parser.parse_args(argv)))


def presets_found() -> list[str]:
    folder = Path(__file__).parent / "presets"
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def preset_values(cls: type, preset: str, *stages: str) -> dict[str, Any]:
    """All settings of the class as the preset has them. Raises UserError for a preset that breaks a rule."""
    if preset not in presets_found():
        raise UserError(f"--preset: given {preset}; allowed {' | '.join(presets_found())} (lib/run/presets)")
    types, fields = get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}
    values = dataclasses.asdict(cls()) | {"preset": preset}
    module = importlib.import_module(f"lib.run.presets.{preset}")
    for stage in stages:
        for name, value in getattr(module, stage.upper(), {}).items():
            where = f"lib/run/presets/{preset}.py: {stage.upper()}"
            if name in fields:
                try:
                    read = reader(types[name], *fields[name].metadata["limits"])
                    values[name] = [read(x) for x in value] if isinstance(value, list) else read(value)
                except argparse.ArgumentTypeError as error:
                    raise UserError(f"{where}: {name}: {error}") from None
            elif stage == stages[-1]:
                raise UserError(f"{where} sets {name!r}, no setting of that stage")
    return values


def _add_flag(parser: Parser, field: dataclasses.Field, kind: Any, default: Any) -> None:
    flag, text = f"--{field.name.replace('_', '-')}", field.metadata["help"].replace("%", "%%")
    if field.metadata["choices"]:
        text += f" ({' | '.join(field.metadata['choices'])})"
    options: dict[str, Any] = {"default": default, "help": f"{text} (default: {shown(default)})"}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = reader(kind, *field.metadata["limits"])
        options["metavar"] = "N" if kind in (int, float) else "TEXT"
    if kind == list[str]:
        options["nargs"] = "+"
    parser.add_argument(flag, **options)


def reader(kind: Any, low: float, high: float = 10**6, choices: Sequence[str] = ()) -> Callable[[str], Any]:
    """For add_argument(type=...): text to a value of that kind, within `low` and `high`, or in `choices`."""

    def read(text: Any) -> Any:
        if kind not in (int, float):
            if choices and text not in choices:
                raise argparse.ArgumentTypeError(f"given {text}; allowed {' | '.join(choices)}")
            return text
        try:
            value = kind(str(text))
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # not a number fails this, too
            allowed = f"a {'whole ' if kind is int else ''}number from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"given {text}; allowed {allowed}")
        return value

    return read


def shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value) or "none"


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
    """The next stage's command, to be pasted into a shell: RL follows on traces of SFT, else the evaluation.

    What is kept of `settings` stands in it where it is not as the preset has it.
    """
    out, name, note = settings.out, model_name(settings.out), ""
    if stages[0] == "mixture":
        script, folder, model = "02_sft_warmstart.py", "sft", settings.trace_model
        if not settings.sft_prompts:
            script, folder, model = "03_rl_train.py", "rl", settings.rainbow
        flags = {"data": out, "out": beside(out, folder)} | ({"model": model} if model else {})
    elif stages[0] == "sft" and settings.traces == "sft.jsonl":
        script, rl = "03_rl_train.py", name.replace("sft", "rl") if "sft" in name else f"{name}-rl"
        flags = {"data": settings.data, "model": out, "out": beside(out, rl)}
        if not settings.reasoning:
            note = " (an answer alone is short: add its length, --max-new-tokens)"
    else:
        script, flags = "04_attack_eval.py", {"data": settings.data, "models": f"{name}={out}"}
        flags["out"] = beside(out, f"eval-{name}")

    usual = preset_values(type(settings), settings.preset, *stages)
    kept = {name: getattr(settings, name) for name in KEPT[script] if name in usual}
    flags |= {name: value for name, value in kept.items() if value != usual[name]}
    words = [script]
    for name, value in {"preset": settings.preset, **flags}.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    several = os.environ.get("LOCAL_WORLD_SIZE", "1")
    start = "python " if several == "1" else f"torchrun --nproc-per-node {several} "
    return start + shlex.join(words) + note


def model_name(out: str | Path) -> str:
    """What stage 4 may call the model in `out`: as its folder is called, as far as --models allows."""
    return re.sub(r"[^\w.-]+", "-", os.path.basename(os.path.abspath(out))) or "model"


def beside(out: str | Path, name: str) -> str:
    """The path of that name in the folder that `out` is in.

    >>> beside("runs/demo/sft", "rl"), beside(".", "rl")
    ('runs/demo/rl', '../rl')
    """
    return os.path.normpath(Path(out) / ".." / name)
