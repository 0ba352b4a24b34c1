r"""Chapter 1: what the model will read (paper, section 4: stage I's traces, stage II's prompts).

A model that is rewarded for safety alone learns to refuse everything. What keeps it from that is the mixture:

1. **Evaluation sets** come first: harmful, jailbreak (harmful, disguised), harmless, ambiguous.
2. **SFT traces**: harmful prompts, each with a few reasonings and answers that show the format. The sandbox writes
   them, or a better model elsewhere (`--trace-files`), or the model itself (`--trace-model`).
3. **RL prompts**: a share lambda of harmful ones; the rest harmless and *ambiguous* (they look harmful and are not),
   1:1. Prompts only: what to answer, the policy has to find out.
4. Of the harmful RL prompts a share may come from a search against the model after SFT (`--rainbow`).

`split` is where nothing leaks. The seed decides every choice. A larger lambda takes more of the same harmful prompts,
so that one SFT model serves several mixtures.

    python 01_build_mixture.py --preset sandbox --out runs/demo/data
    python 01_build_mixture.py --source files --out runs/mine/data --trace-files star1 --files harmful=mine.csv \
        harmful=wildjailbreak:800 harmless=hub:me/chat:train ambiguous=or-bench --eval-files harmful=harmbench@all.csv

What you should see: a line for each file, in the sandbox 4000 traces of 1000 prompts, 640 harmful, 320 harmless and
320 ambiguous RL prompts, four evaluation sets of 150, and what was left out. In the folder: sft.jsonl, rl.jsonl,
eval_SET.jsonl, manifest.json; with `--rl-traces 8` also sft_rl.jsonl, traces for RL's prompts of every kind: what the
paper's comparison "SFT" learns from instead of a reward. A stopped run goes on when the command is given again.

A file of yours (jsonl, json, csv, tsv, parquet) has `prompt`, a text or a conversation, of which the user's first turn
is taken, and `kind`, if the word does not say it. It may have `id`, `category`, `context` (a text that the prompt is
about) and, for stage 4, `target` (how a compliant answer begins; GCG needs it), `prefill` (how one begins that the
attacker writes), `twin` (a request like it that deserves an answer), `hops` (how deep it is disguised); for traces
`reasoning` and `answer`. Other columns, other schemas: five lines in lib/sources/known.py.

Think about: why does lambda = 1 teach refusing, although harmless prompts are what most users send? Why must the
evaluation take its prompts first, and not last?
"""

from __future__ import annotations

import importlib
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lib import UserError
from lib.run import Run, run_main, start
from lib.run.files import write_json, write_jsonl
from lib.run.settings import TOKENS, Common, beside, next_command, setting
from lib.run.text import same_prompt
from lib.sources import (
    EVAL_SETS, KNOWN, Pool, Source, Traced, in_order, manifest, parse_word, read_pool, read_traces, take_quotas,
)

Traces = list[tuple[dict, list[tuple[str, str]]]]  # (a prompt's record, its (reasoning, answer) pairs)


@dataclass
class Settings(Common):
    out: str = setting("runs/demo/data", "folder to write")
    lambda_harmful: float = setting(0.5, "share of harmful RL prompts. Paper: 0.1, 0.3 ... 0.9", low=0, high=1)
    rl_prompts: int = setting(2000, "RL prompts of all kinds. Paper: 2000", low=1)
    sft_prompts: int = setting(1000, "harmful prompts with traces; 0: no SFT. Paper: 1000", low=0)
    traces_per_prompt: int = setting(4, "traces a prompt, at most. Paper: 4", low=1, high=1000, flag=False)
    rl_traces: int = setting(0, "traces for each RL prompt, at most, for the comparison with SFT. Paper: 8", low=0)
    eval_prompts: int = setting(500, "prompts of each evaluation set, at most", low=1)
    source: str = setting("sandbox", "the sandbox's world, or files", choices=("sandbox", "files"))
    files: list[str] = setting(
        [], f"prompts to train on: [KIND=]SOURCE, KIND=SOURCE:N for N of them. SOURCE: a FILE with prompt and kind; "
        f"a NAME or NAME@FILE, NAME of {', '.join(KNOWN)}; or hub:OWNER/NAME[:CONFIG]:SPLIT. Other columns: write "
        "a function in lib/sources/known.py, and its name is one more NAME",
    )
    eval_files: list[str] = setting([], "prompts to evaluate on: [KIND=]SOURCE; KIND may be jailbreak, too")
    trace_files: list[str] = setting([], "SOURCEs with prompt, reasoning and answer; star1. Paper: by DeepSeek-R1")
    trace_model: str = setting("", "a model that writes the traces itself: a folder or a hub name")
    rainbow: str = setting("", "pi_SFT, a folder or hub name: search for prompts that it answers harmfully")
    # presets only
    ambiguous_share: float = setting(0.5, "of ambiguous ones in the rest. Paper: 0.5", low=0, high=1, flag=False)
    max_chars: int = setting(1000, "SFT and RL prompts of files are shorter. Paper: 1000", low=1, high=10**9, flag=False)
    trace_temperature: float = setting(0.8, "of --trace-model", low=0.01, high=10, flag=False)
    trace_max_new_tokens: int = setting(256, "its longest reasoning, and answer, in tokens", low=1, flag=False)
    trace_max_batch_tokens: int = setting(16384, "tokens in its cache", low=1, high=TOKENS, flag=False)
    rainbow_share: float = setting(0.4, "of harmful RL prompts. Paper: 800 of 2000", low=0, high=1, flag=False)
    rainbow_attacker: str = setting("sandbox", "writes them: sandbox, or a chat model", flag=False)
    rainbow_judge: str = setting("sandbox", "of the answers' harm, as --judge of stage 3", flag=False)
    rainbow_compare: str = setting("", "a chat model that says which of two does more harm", flag=False)
    rainbow_archives: int = setting(7, "searches, at most, until there are enough", low=1, high=1000, flag=False)
    rainbow_iterations: int = setting(1000, "of each. Paper: 1000", low=1, high=10**5, flag=False)
    rainbow_tokens: int = setting(64, "of the longest answer. Paper: 4096", low=1, flag=False)
    rainbow_max_batch_tokens: int = setting(65536, "tokens in the cache", low=16, high=TOKENS, flag=False)

    def sources(self) -> list[list[Source]]:
        """Of --files, --eval-files and --trace-files."""
        words = {"--files": self.files, "--eval-files": self.eval_files, "--trace-files": self.trace_files}
        return [[parse_word(word, flag) for word in given] for flag, given in words.items()]

    def inputs(self) -> list[str]:
        files = [str(path) for part in self.sources() for source in part for path in source.files()]
        return [*files, self.trace_model, *([self.rainbow, self.rainbow_attacker] if self.rainbow else [])]

    def next_command(self, run: Run) -> str:
        script, folder, model = "02_sft_warmstart.py", "sft", self.trace_model
        if not self.sft_prompts:
            script, folder, model = "03_rl_train.py", "rl", self.rainbow
        flags = {"data": run.out, "out": beside(run.out, folder), "model": model}
        return next_command(script, self, run.stages, **{name: value for name, value in flags.items() if value})


def check(settings: Settings) -> None:
    """What the range of a single flag cannot say."""
    in_quotas = sum(source.sft for source in settings.sources()[0])
    traced = settings.trace_files or settings.trace_model or settings.source == "sandbox"
    mistakes = {
        "--files: given, but --source is sandbox; add --source files":
            settings.source == "sandbox" and (settings.files or settings.eval_files),
        "--files: none given; give [KIND=]FILE, or --source sandbox": settings.source == "files" and not settings.files,
        "--trace-model: given together with --trace-files; give one": settings.trace_files and settings.trace_model,
        "--sft-prompts, --rl-traces: no traces; give --trace-files, --trace-model, or 0":
            (settings.sft_prompts or settings.rl_traces) and not traced,
        "--rl-traces: --trace-files have none for what --rainbow finds; give --trace-model":
            settings.rainbow and settings.rl_traces and settings.trace_files,
        f"--sft-prompts: given {settings.sft_prompts}; the quotas S+R of --files say {in_quotas}":
            in_quotas and not settings.trace_files and settings.sft_prompts not in (0, in_quotas),
    }
    for mistake, made in mistakes.items():
        if made:
            raise UserError(mistake)


# ---- who gets which prompt -------------------------------------------------------------------------------


class Taken:
    """Which prompts a set has already, and how many records were left out since."""

    def __init__(self) -> None:
        self.owner: dict[str, str] = {}  # by same_prompt: whatever its spaces, capitals, quotes or unseen characters
        self.dropped: Counter = Counter()  # records by reason

    def take(self, records: Iterable[dict], name: str, most: int | None = None) -> list[dict]:
        """The records whose prompt nobody has: `name` has them now. `most`: no more than these."""
        kept: list[dict] = []
        for record in records:
            key = same_prompt(record["prompt"])
            if len(kept) == most:
                break
            if key and key not in self.owner:
                self.owner[key] = name
                kept.append(record)
            elif key and self.owner[key] != name:
                self.dropped[f"in {self.owner[key]}"] += 1
            else:
                self.dropped["duplicate" if key else "empty"] += 1
        return kept


def hold_out(pool: Pool, evaluation: Pool, settings: Settings) -> None:
    """Fill evaluation sets without a file from the training pool, in place: with half of it at most."""
    for name in EVAL_SETS:
        if pool[name] and not evaluation[name]:
            count = min(settings.eval_prompts, len(pool[name]) // 2)
            evaluation[name], pool[name] = pool[name][:count], pool[name][count:]
            print(f"no --eval-files for {name}: {count} prompts of --files are held out")
    # to train on, a jailbreak is a harmful prompt like others
    pool["harmful"] = in_order(pool["harmful"] + pool.pop("jailbreak"), f"{settings.seed}/pool")


def prompts_needed(settings: Settings) -> dict[str, int]:
    """RL prompts by kind: a share lambda of all is harmful, `ambiguous_share` of the others ambiguous."""
    harmful = round(settings.lambda_harmful * settings.rl_prompts)
    ambiguous = round(settings.ambiguous_share * (settings.rl_prompts - harmful))
    return {"harmful": harmful, "harmless": settings.rl_prompts - harmful - ambiguous, "ambiguous": ambiguous}


def mix(pool: Pool, settings: Settings) -> list[dict]:
    """RL prompts: the first of the pool, in random order. UserError if the pool is too small."""
    rl = []
    for kind, count in prompts_needed(settings).items():
        if len(pool[kind]) < count:
            raise UserError(
                f"--lambda-harmful {settings.lambda_harmful:g} of --rl-prompts {settings.rl_prompts} needs {count} "
                f"{kind} prompts beside SFT's, and there are {len(pool[kind])}: add --files, or lower --rl-prompts"
            )
        rl += pool[kind][:count]
    random.Random(f"{settings.seed}/order").shuffle(rl)
    return rl


def with_rainbow(rl: list[dict], settings: Settings, taken: Taken) -> list[dict]:
    """RL prompts, a share of the harmful ones replaced by prompts that the model in --rainbow answers harmfully."""
    from lib.attacks.rainbow_run import search  # here, because torch is slow to import

    harmful = [record for record in rl if record["kind"] == "harmful"]
    found = taken.take(search(settings, harmful), "RL")
    replaced = {record["id"] for record in harmful[len(harmful) - len(found) :]}
    new = iter(found)
    return [next(new) if record["id"] in replaced else record for record in rl]


# ---- where prompts and traces come from ------------------------------------------------------------------


def sandbox_prompts(settings: Settings) -> tuple[Pool, Pool]:
    """(training pool, evaluation sets). The world keeps them apart: other things, words, disguises, hops."""
    world = importlib.import_module("lib.sandbox.world")  # by name: real data does not need the sandbox

    def draw(split: str, kind: str, count: int) -> list[dict]:
        try:
            records = world.build_pool(split, kind, count, settings.seed)
        except ValueError as error:
            raise UserError(f"--rl-prompts, --sft-prompts or --eval-prompts: {error}") from error
        return [{"id": f"{split}-{kind}-{i}", **record} for i, record in enumerate(records)]

    needed = prompts_needed(settings)
    needed["harmful"] += 0 if settings.trace_files else settings.sft_prompts
    pool = {kind: draw("train", kind, count) for kind, count in needed.items()}
    return pool, {name: draw("eval", name, settings.eval_prompts) for name in EVAL_SETS}


def find_traces(records: list[dict], count: int, traced: Traced, settings: Settings, use: str, out: Path) -> Traces:
    """Up to `count` traces for each record's prompt: from files, by --trace-model, or the sandbox's.

    use: "traces", or "rl traces" for the comparison with SFT, for which the sandbox's teacher errs less.
    """
    if settings.trace_files:
        keys = [same_prompt(record["prompt"]) for record in records]
        return [(r, traced[key][1][:count]) for r, key in zip(records, keys, strict=True) if key in traced]
    if settings.trace_model:
        from lib.sources.traces import write_all  # here, because torch is slow to import

        return write_all(records, count, settings, out)
    teacher = importlib.import_module("lib.sandbox.traces")
    rng = random.Random(f"{settings.seed}/{use}")
    wrong = teacher.WRONG_VERDICTS[use]
    return [(record, [teacher.write_trace(record, rng, wrong) for _ in range(count)]) for record in records]


def sft_records(traces: Traces, dropped: Counter) -> list[dict]:
    """A record for each trace; one without reasoning or answer is left out (paper, stage I)."""
    records = []
    for record, pairs in traces:
        for i, (reasoning, answer) in enumerate(pairs):
            if not reasoning.strip() or not answer.strip():
                dropped["empty trace"] += 1
                continue
            trace = {"id": f"{record['id']}-{i}", "prompt": record["prompt"], "reasoning": reasoning}
            records.append(trace | {"answer": answer, "source": record["source"], "kind": record["kind"]})
    return records


# ---- main ------------------------------------------------------------------------------------------------


def main() -> None:
    settings, run = start(Settings, "mixture")
    check(settings)
    taken = Taken()
    pool, evaluation, traced = read(settings, taken.dropped)

    # Nothing leaks: who comes first has a prompt, who comes later goes without it.
    evaluation = {name: taken.take(records, "evaluation") for name, records in evaluation.items()}  # 1.
    sft = taken.take(traced, ...)
