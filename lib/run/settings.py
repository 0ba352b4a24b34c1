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
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from lib import UserError
from lib.run.command import Flags, number

T = TypeVar("T")
TOKENS = 10**9  # no budget of tokens is larger


def setting(default: Any, help: str, *, low=0.0, high: float = 10**6, choices=(), flag: bool = True) -> Any:
    """A field of a settings class: low <= number <= high; `choices` for text, or for each item of a list."""
    metadata = {"help": help, "limits": (low, high), "choices": choices, "flag": flag}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Common:
    """What every stage has."""

    preset: str = setting("sandbox", "where the defaults come from")
    out: str = setting("runs/demo/out", "folder to write")  # if none is named, RUNS/STAGE: `preset_values`
    overwrite: bool = setting(False, "empty OUT first if it holds a run with other settings")
    seed: int = setting(0, "of every random choice", low=0, high=2**32 - 1)
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    date: str = setting("", "day that templates are told; none: that of the run in OUT, or today", flag=False)

    def inputs(self) -> list[str]:
        """Paths that the run reads: with another content it would be another run."""
        return []


@dataclass
class Training(Common):
    """What the stages that train a model have."""

    data: str = setting("runs/demo/data", "folder that 01_build_mixture.py wrote")
    model: str = setting("lib/sandbox/base", "a folder or hub name. Paper: Qwen2.5-1.5B-Instruct")
    reasoning: bool = setting(True, "think first; --no-reasoning: answers alone (the paper's baseline)")
    learning_rate: float = setting(1e-5, "peak rate of AdamW", low=0.0, high=1.0)
    warmup_steps: int = setting(0, "steps of linear warm-up", low=0, flag=False)
    decay: bool = setting(False, "after the warm-up, decay the rate linearly to zero", flag=False)
    weight_decay: float = setting(0.0, "of AdamW", low=0.0, high=100.0, flag=False)
    adam_eps: float = setting(1e-8, "epsilon of AdamW", low=1e-16, high=1.0, flag=False)
    max_grad_norm: float = setting(1.0, "gradient clipping, L2 norm; 0: none", low=0.0, flag=False)
    max_batch_tokens: int = setting(16384, "tokens computed in a micro-batch", low=16, high=TOKENS)
    gradient_checkpointing: bool = setting(False, "recompute activations backward: less memory, slower")
    shard: bool = setting(False, "with torchrun: each process keeps a part of the model (FSDP2)")
    offload: bool = setting(False, "with --shard: keep the shards in the CPU's memory")
    save_every: int = setting(10, "steps between resume points", low=1)
    dtype: str = setting("float32", "to compute in. Paper: bfloat16", choices=("float32", "bfloat16"))


# Settings that say how to compute, not what: a run may go on with others. More archives: the search goes on.
PARTS_OF_A_MODEL = ["gradient_checkpointing", "shard", "offload"]
MACHINERY = {"device", "save_every", "rollouts_every", *PARTS_OF_A_MODEL}
MACHINERY |= {"max_batch_tokens", "max_sample_tokens", "rainbow_archives"}


def parse_settings(cls: type[T], *stages: str, argv: Sequence[str] | None = None) -> T:
    """Defaults of the class, then those of the preset, then the flags in `argv` (none: the command line's).

    `stages`: names of dicts in the preset's module, such as "rl"; a later one goes before an earlier one.
    """
    first = Flags(add_help=False)
    first.add_argument("--preset", default=cls.preset, choices=presets_found())  # type: ignore[attr-defined]
    preset = first.parse_known_args(argv)[0].preset
    values, types = preset_values(cls, preset, *stages), get_type_hints(cls)
    about = f"presets: {', '.join(presets_found())} (lib/run/presets); defaults above: those of {preset}"
    usage, doc = "%(prog)s [--flag value ...]", sys.modules[cls.__module__].__doc__
    flags = Flags(description=doc, usage=usage, epilog=about)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        meta, kind = field.metadata, types[field.name]
        try:
            default = values[field.name] = allowed(values[field.name], kind, meta)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"preset {preset}: {field.name}: {error}") from error
        if not meta["flag"]:
            continue
        text = meta["help"] + (f" ({' | '.join(meta['choices'])})" if meta["choices"] else "")
        options = {"default": default, "help": f"{text} (default: {default})".replace("%", "%%")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind in (int, float):
            options |= {"type": number(kind, *meta["limits"]), "metavar": "N"}
        else:
            options |= {"choices": meta["choices"] or None, "metavar": "TEXT"}
        if kind == list[str]:
            options["nargs"] = "+"
        flags.add_argument(f"--{field.name.replace('_', '-')}", **options)
    return cls(**values | vars(flags.parse_args(argv)))


def allowed(value: Any, kind: Any, meta: Mapping[str, Any]) -> Any:
    """A preset's value of a setting, if it is one that its flag might have; else raises ArgumentTypeError."""
    if kind in (int, float):
        return number(kind, *meta["limits"])(value)
    items, choices = value if kind == list[str] else [value], meta["choices"]
    fits = bool if kind is bool else str
    if isinstance(items, list) and all(type(x) is fits and (not choices or x in choices) for x in items):
        return value
    what = {bool: "True or False", str: "a text"}.get(kind, "a list of texts")
    raise argparse.ArgumentTypeError(f"given {value!r}; allowed {what} {' | '.join(choices)}".strip())


def presets_found() -> list[str]:
    folder = Path(__file__).parent / "presets"
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def preset_values(cls: type, preset: str, *stages: str) -> dict[str, Any]:
    """All settings of the class as the preset has them. UserError for one that the stage has not."""
    values = dataclasses.asdict(cls()) | {"preset": preset}
    if values["out"] == Common.out:
        values["out"] = f"runs/demo/{stages[-1]}"
    module = importlib.import_module(f"lib.run.presets.{preset}")
    for name, value in values.items():
        if isinstance(value, str):
            values[name] = value.replace("runs/demo", getattr(module, "RUNS", "runs/demo"))
    for stage in stages:
        for name, value in getattr(module, stage.upper(), {}).items():
            if name in values:
                values[name] = value
            elif stage == stages[-1]:
                raise UserError(f"lib/run/presets/{preset}.py: {stage.upper()} sets {name!r}: no setting")
    return values


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


def as_flags(**values: Any) -> list[str]:
    """Words of a command line; of a list all items, of "" none.

    >>> as_flags(group_size=4, decay=False, judge="")
    ['--group-size', '4', '--no-decay']
    """
    words: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value != "":
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return words


def following(settings: Any, stages: Sequence[str]) -> str:
    """The next stage's command, to paste into a shell. After SFT: RL, but on RL's traces the evaluation.

    It has what was given here otherwise than the preset has it, as far as the next stage takes it.
    """
    out, stage = settings.out, stages[0]
    name = re.sub(r"[^\w.-]+", "-", Path(out).resolve().name) or "model"  # as far as --models allows
    flags = {"data": out if stage == "mixture" else settings.data}
    kept = ["seed", "device", "dtype", "reasoning", *PARTS_OF_A_MODEL]
    usual = preset_values(type(settings), settings.preset, *stages)
    if stage == "mixture" and settings.sft_prompts and not settings.rainbow:
        script, folder = "02_sft_warmstart.py", "sft"
        base = getattr(importlib.import_module(f"lib.run.presets.{settings.preset}"), "SFT", {}).get("model")
        if base in (None, usual["trace_model"]):  # else the preset has one to train, and this was its teacher
            flags["model"] = settings.trace_model
    elif stage == "mixture":
        script, folder, flags["model"] = "03_rl_train.py", "rl", settings.rainbow
    elif stage == "sft" and settings.traces == "sft.jsonl":
        script, folder = "03_rl_train.py", name.replace("sft", "rl") if "sft" in name else f"rl-{name}"
        flags["model"] = out
    else:
        script, folder, flags["models"] = "04_attack_eval.py", f"eval-{name}", f"{name}={out}"
        kept = ["seed", "device", "dtype", "judge", "refusals"]
    flags["out"] = os.path.normpath(Path(out) / ".." / folder)
    flags |= {key: getattr(settings, key) for key in kept if getattr(settings, key, None) != usual.get(key)}
    several = os.environ.get("LOCAL_WORLD_SIZE", "1")
    words = ["python"] if several == "1" else ["torchrun", "--nproc-per-node", several]
    return shlex.join([*words, script, "--preset", settings.preset, *as_flags(**flags)])
