r"""Chapter 1: what the model will read (paper, section 4: stage I's traces, stage II's prompts).

A model that is rewarded for safety alone learns to refuse everything. What keeps it from that is the mixture:

    1. evaluation sets: harmful, jailbreak (harmful, disguised), harmless, ambiguous (only looks harmful)
    2. SFT: harmful prompts, each with a few traces (reasoning, answer) that show the format; by the sandbox,
       by a better model elsewhere (--trace-files), or by one that is run here (--trace-model) -> write_traces
    3. RL: a share lambda of harmful prompts, the rest harmless and ambiguous, 1:1    -> prompts_needed, mix
       Prompts only: what to answer, the policy has to find out.
    4. If asked for, a share of RL's harmful ones comes from a search against pi_SFT    -> with_rainbow
       (pi_SFT is chapter 2's: run this chapter once more after it, with --rainbow; all other sets stay as
       they were, so chapter 4 may read either folder)

In this order, so that nothing leaks: first every set takes its prompts, and no two take the same (`Taken`).
Then a set without prompts of its own is filled from the training pool, which loses them. The seed decides
every choice, lambda only how many: SFT takes the pool's first harmful prompts, RL as many of the next ones as
lambda wants. So SFT learns the same whatever lambda is, and one pi_SFT serves all mixtures.

    python 01_build_mixture.py --preset sandbox --out runs/demo/data
    python 01_build_mixture.py --preset sandbox --rainbow runs/demo/sft --out runs/demo/mixture    # after 02
    python 01_build_mixture.py --source files --out runs/mine/data --trace-files star1 --files \
        harmful=mine.csv harmful=wildjailbreak:800 harmless=hub:me/chat:train ambiguous=or-bench

A file of yours (jsonl, json, csv, tsv, parquet) has `prompt`, a text or a conversation (its first user turn
is taken), and `kind`, unless KIND= stands before it. It may have `id`, `category`, `context` (what the prompt
is about), for chapter 4 `target` (how a compliant answer begins; GCG needs it), `prefill` (the same, for
prefill), `twin` (a request like it that deserves an answer), `hops` (how deep it is disguised), for traces
`reasoning` and `answer`. Other columns: five lines in lib/sources/known.py.

**What you should see** (sandbox, 3 seconds): sft.jsonl, 4000 traces of 1000 prompts; rl.jsonl, 600 harmful,
300 harmless and 300 ambiguous prompts; four eval_SET.jsonl of 150; manifest.json, what was made of what. With
`--rl-traces 8` also sft_rl.jsonl, traces for RL's prompts: the paper's comparison "SFT" learns from them
instead of a reward. Half of the sandbox's traces judge wrongly. The same command continues a stopped run.

To think about: why would lambda = 1 teach to refuse everybody? And what would the numbers of chapter 4 mean
if the evaluation took its prompts last?
"""

from __future__ import annotations

import importlib
import random
from collections import Counter
from dataclasses import dataclass

from lib import UserError, sources
from lib.run import run_main, start
from lib.run.files import write_jsonl
from lib.run.settings import TOKENS, Common, following, setting
from lib.run.text import same_prompt


@dataclass
class Settings(Common):
    out: str = setting("runs/demo/data", "folder to write")
    lambda_harmful: float = setting(0.5, "share of harmful RL prompts. Paper: 0.1 to 0.9", low=0, high=1)
    rl_prompts: int = setting(2000, "RL prompts of all kinds. Paper: 2000", low=1)
    sft_prompts: int = setting(1000, "harmful prompts with traces; 0: no SFT. Paper: 1000", low=0)
    rl_traces: int = setting(0, "traces of each RL prompt, at most. Paper, for its SFT: 8", low=0, high=1000)
    eval_prompts: int = setting(500, "prompts of each evaluation set, at most", low=1)
    source: str = setting("sandbox", "the sandbox's world, or files (paper)", choices=("sandbox", "files"))
    files: list[str] = setting([], f"prompts to train on: {sources.HELP}")
    eval_files: list[str] = setting([], "prompts to evaluate on, [KIND=]SOURCE; KIND may be jailbreak, too")
    trace_files: list[str] = setting([], "SOURCEs with reasoning and answer: star1. Paper: by DeepSeek-R1")
    trace_model: str = setting("", "a model that writes the traces itself: a folder or a hub name")
    rainbow: str = setting("", "pi_SFT, a folder or hub name: find prompts that it answers harmfully")
    ambiguous_share: float = setting(0.5, "of the RL prompts that are not harmful. Paper: 0.5", low=0, high=1)
    # Few people change these, and presets only:
    traces_per_prompt: int = setting(4, "at most. Paper: 4", low=1, high=1000, flag=False)
    max_chars: int = setting(1000, "SFT and RL prompts have fewer", low=1, high=10**9, flag=False)
    max_batch_tokens: int = setting(16384, "in the cache of a model", low=16, high=TOKENS, flag=False)
    trace_temperature: float = setting(0.8, "of --trace-model", low=0.01, high=10, flag=False)
    trace_max_new_tokens: int = setting(256, "of its reasoning, and of its answer", low=1, flag=False)
    rainbow_share: float = setting(0.4, "of RL's harmful ones. Paper: 800 of 2000", low=0, high=1, flag=False)
    rainbow_attacker: str = setting("sandbox", "who writes them: or a chat model", flag=False)
    rainbow_judge: str = setting("sandbox", "of the answers' harm, as --judge of chapter 3", flag=False)
    rainbow_archives: int = setting(7, "searches, until there are enough", low=1, high=1000, flag=False)
    rainbow_iterations: int = setting(1000, "of each. Paper: 1000", low=1, high=10**5, flag=False)
    rainbow_tokens: int = setting(64, "of the longest answer. Paper: 4096", low=1, flag=False)

    def parsed(self) -> list[list[sources.Source]]:
        """The sources of --files, --eval-files and --trace-files."""
        words = {"--files": self.files, "--eval-files": self.eval_files, "--trace-files": self.trace_files}
        return [[sources.parse_word(word, flag) for word in words[flag]] for flag in words]

    def inputs(self) -> list[str]:
        files = [str(file) for part in self.parsed() for source in part for file in source.files]
        models = [self.trace_model, self.rainbow, self.rainbow_attacker if self.rainbow else ""]
        return [*files, *filter(None, models)]


def check(settings: Settings) -> None:
    """What no single flag can say. UserError for what does not go together, and models that are not there."""
    traces = settings.source == "sandbox" or settings.trace_files or settings.trace_model
    if settings.source == "sandbox" and (settings.files or settings.eval_files):
        raise UserError("--files: given, but --source is sandbox; add --source files")
    if settings.source == "files" and not settings.files:
        raise UserError("--files: none given; give FILE or KIND=FILE, or --source sandbox")
    if settings.trace_files and settings.trace_model:
        raise UserError("--trace-model: given together with --trace-files; give one of them")
    if (settings.sft_prompts or settings.rl_traces) and not traces:
        raise UserError("--sft-prompts, --rl-traces: no traces; give --trace-files, --trace-model, or 0")
    if settings.rainbow and settings.rl_traces and settings.trace_files:
        raise UserError("--rl-traces: --trace-files have none for what --rainbow finds; give --trace-model")
    writes = settings.trace_model if settings.sft_prompts or settings.rl_traces else ""
    for name in filter(None, (writes, settings.rainbow)):
        importlib.import_module("lib.run.hub").load_tokenizer(name)  # here, because torch is slow to import


class Taken:
    """Which prompts somebody has already, and how many records were left out."""

    def __init__(self) -> None:
        self.owners: dict[str, str] = {}  # by same_prompt: whatever its capitals, spaces, marks
        self.dropped: Counter = Counter()  # by reason: "empty", "duplicate" (of this owner), "in OWNER"

    def take(self, records: list[dict], owner: str, most: int | None = None) -> list[dict]:
        """The records whose prompt nobody has, at most `most`: `owner` has them now."""
        ### BEGIN SOLUTION no_leak
        kept: list[dict] = []
        for record in records:
            key = same_prompt(record["prompt"])
            before = self.owners.get(key)
            if len(kept) == most:
                break
            if key and not before:
                self.owners[key] = owner
                kept.append(record)
            else:
                reason = "duplicate" if before == owner else f"in {before}"
                self.dropped[reason if key else "empty"] += 1
        return kept
        ### END SOLUTION


def prompts_needed(settings: Settings) -> dict[str, int]:
    """RL prompts by kind: a share lambda of all is harmful, `ambiguous_share` of the others ambiguous."""
    ### BEGIN SOLUTION mixture
    harmful = round(settings.lambda_harmful * settings.rl_prompts)
    ambiguous = round(settings.ambiguous_share * (settings.rl_prompts - harmful))
    return {"harmful": harmful, "harmless": settings.rl_prompts - harmful - ambiguous, "ambiguous": ambiguous}
    ### END SOLUTION


def mix(pool: sources.Pool, settings: Settings) -> list[dict]:
    """RL prompts: the first of the pool, in random order. UserError if the pool is too small."""
    rl = []
    for kind, count in prompts_needed(settings).items():
        if len(pool[kind]) < count:
            raise UserError(
                f"--lambda-harmful {settings.lambda_harmful:g} of --rl-prompts {settings.rl_prompts} needs "
                f"{count} {kind} prompts, and SFT leaves {len(pool[kind])}: add --files or lower --rl-prompts"
            )
        rl += pool[kind][:count]
    random.Random(f"{settings.seed}/order").shuffle(rl)
    return rl


def with_rainbow(rl: list[dict], settings: Settings, taken: Taken) -> list[dict]:
    """RL prompts, a share of the harmful ones replaced by prompts that --rainbow answers harmfully."""
    from lib.attacks import search  # here, because torch is slow to import
    from lib.judges import load_judge

    harmful = [record for record in rl if record["kind"] == "harmful"]
    new = taken.take(search(settings, harmful, load_judge(settings.rainbow_judge)), "RL")
    instead = {old["id"]: record for old, record in zip(harmful, new, strict=False)}
    return [instead.get(record["id"], record) for record in rl]


def sandbox_prompts(settings: Settings) -> tuple[sources.Pool, sources.Pool]:
    """(training pool, evaluation sets). The world keeps them apart: other things, words, disguises, hops."""
    world = importlib.import_module("lib.sandbox.world")  # by name: nothing else depends on the sandbox

    def draw(split: str, kind: str, count: int) -> list[dict]:
        records = world.build_pool(split, kind, count, settings.seed)
        return [{"id": f"{split}-{kind}-{i}", **record} for i, record in enumerate(records)]

    needed = prompts_needed(settings)
    needed["harmful"] += 0 if settings.trace_files else settings.sft_prompts
    pool = {kind: draw("train", kind, count) for kind, count in needed.items()}
    return pool, {name: draw("eval", name, settings.eval_prompts) for name in sources.EVAL_SETS}


def check_found(sft: list[dict], rl: list[dict], traced: sources.Traced, settings: Settings) -> None:
    """UserError for what only shows when all has been read."""
    if settings.sft_prompts not in (0, len(sft)):
        raise UserError(f"--sft-prompts: given {settings.sft_prompts}; traces or quotas have {len(sft)}")
    if settings.rl_traces and settings.trace_files:
        if not any(same_prompt(record["prompt"]) in traced for record in rl):
            raise UserError("--trace-files: have none of the prompts that want rl traces")


def write_traces(
    records: list[dict], count: int, use: str, traced: sources.Traced, settings: Settings, dropped: Counter
) -> list[dict]:
    """Up to `count` traces for each record's prompt: of files, by --trace-model, or by the sandbox's teacher.

    use: "traces", or "rl traces" for the comparison with SFT, for which that teacher errs less.
    """
    if not records or not count:
        return []
    if settings.trace_files:
        rows = [traced.get(same_prompt(record["prompt"]), [])[:count] for record in records]
        pairs = [[[row["reasoning"], row["answer"]] for row in part] for part in rows]
    elif settings.trace_model:
        pairs = sources.write_traces(records, count, settings, use)
    else:
        teacher = importlib.import_module("lib.sandbox.traces")
        rng, wrong = random.Random(f"{settings.seed}/{use}"), teacher.WRONG_VERDICTS[use]
        pairs = [[teacher.write_trace(record, rng, wrong) for _ in range(count)] for record in records]
    made = []
    for record, traces in zip(records, pairs, strict=True):
        for i, (reasoning, answer) in enumerate(traces):
            if not reasoning.strip() or not answer.strip():
                dropped["empty trace"] += 1  # paper, stage I
                continue
            trace = {"id": f"{record['id']}-{i}", "prompt": record["prompt"], "reasoning": reasoning}
            made.append({**trace, "answer": answer, "source": record["source"], "kind": record["kind"]})
    return made


def main() -> None:
    settings, run = start(Settings, "mixture")
    check(settings)
    taken = Taken()
    train, evaluate, trace_files = settings.parsed()
    traced = sources.read_traces(trace_files, settings, taken.dropped)
    if settings.source == "sandbox":
        pool, evaluation = sandbox_prompts(settings)
    else:
        pool = sources.read_pool(train, settings, taken.dropped, settings.max_chars)
        evaluation = sources.read_pool(evaluate, settings, taken.dropped)

    # Why nothing leaks: who comes first has a prompt, who comes later goes without it.
    evaluation = {name: taken.take(records, "evaluation") for name, records in evaluation.items()}
    # traced: {prompt: its records, each with a trace} of files
    own = [records[0] for records in traced.values() if records[0]["kind"] == "harmful"]
    sft = taken.take(own, "SFT", most=settings.sft_prompts)
    pool = {kind: taken.take(records, "RL") for kind, records in pool.items()}
    # "RL" owns the training pool. Where a set has no files, or SFT no traces, prompts move out of it.
    sources.hold_out(pool, evaluation, settings)
    from_pool = sources.take_sft(pool, train, settings)
    sft = sft if settings.trace_files else from_pool
    rl = mix(pool, settings)
    check_found(sft, rl, traced, settings)
    sft = sft[: settings.sft_prompts]

    run.begin()  # after all has been read: a mistake in it costs no earlier run
    if settings.rainbow:
        rl = with_rainbow(rl, settings, taken)
    sft_traces = write_traces(sft, settings.traces_per_prompt, "traces", traced, settings, taken.dropped)
    rl_traces = write_traces(rl, settings.rl_traces, "rl traces", traced, settings, taken.dropped)
    made = {"sft": sft_traces, "rl": rl, "sft_rl": rl_traces}
    made |= {f"eval_{name}": records[: settings.eval_prompts] for name, records in evaluation.items()}
    made = {f"{name}.jsonl": records for name, records in made.items() if records}
    for name, records in made.items():
        write_jsonl(run.out / name, records)
    sources.write_manifest(settings, made, taken.dropped)
    for progress in run.out.glob("*.partial.jsonl"):
        progress.unlink()
    print(f"wrote {run.out}. Next: {following(settings, run.stages)}")


if __name__ == "__main__":
    run_main(main)
