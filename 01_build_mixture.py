r"""Chapter 1: what the model will read (paper, section 4: stage I's traces, stage II's prompts).

A model that is rewarded for safety alone learns to refuse everything. What keeps it from that is the mixture:

1. **SFT traces**: harmful prompts, each with a few reasonings and answers that show the format. The sandbox
   writes them, or a better model elsewhere (a file), or the model itself (`--trace-model`).
2. **RL prompts**: a share lambda of harmful ones; the rest harmless and *ambiguous* (they look harmful and
   are not), 1:1. Prompts only: what to answer, the policy has to find out.
3. **Evaluation sets**: harmful, jailbreak (harmful, disguised), harmless, ambiguous.

No prompt is in two of the three, whatever its spaces, capitals, quotes or unseen characters (`same_prompt`). The seed
decides every choice. A larger lambda takes more of the same harmful prompts, so that one SFT model can serve several mixtures.

    python 01_build_mixture.py --preset sandbox --out runs/demo/data
    python 01_build_mixture.py --preset paper --out runs/paper/data0 --trace-files star1 --sft-prompts 900 \
        --files harmful=wildjailbreak:800 harmful=aegis:400 harmless=ultrafeedback:2000 ambiguous=or-bench:2000
    python 01_build_mixture.py --source files --out runs/mine/data --trace-files r1_traces.jsonl \
        --files harmful=wildjailbreak:800 harmful=attacks.jsonl harmless=hub:me/chat:train ambiguous=or-bench \
        --eval-files harmful=harmbench@behaviours.csv ambiguous=xstest

A file of yours needs a prompt: a text, or a conversation, of which the first turn of the user is taken. It may have `kind`,
`id` and `category`, and for stage 4 `target` (how a compliant answer begins; GCG needs it), `prefill` (how one begins that the
attacker writes; none: the target), `twin` (a request that deserves an answer), `hops` (how deep the request is disguised, a
number) and a context. Of jsonl and json any other field is kept as it is; of a table (csv, tsv, parquet, hub:) none.

Writes sft.jsonl, rl.jsonl, eval_SET.jsonl and manifest.json to OUT; with `--rl-traces 8` also sft_rl.jsonl, traces for the RL
prompts of every kind: what the paper's comparison "SFT" learns from instead of a reward. A stopped run goes on when the same
command is run again.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lib import UserError
from lib.run.command import run_main
from lib.run.files import write_json, write_jsonl
from lib.run.folder import checksums, claim_folder, date_of_run, lock_folder
from lib.run.settings import LAST_SEED, TOKENS, beside, next_command, parse_settings, setting
from lib.sources import SETS, parse_word, read_prompts, same_prompt, source_names
from lib.sources.known import SOURCES
from lib.sources.manifest import inputs, manifest, words_of
from lib.sources.traced import Traced, traced_prompts

Pool = dict[str, list[dict]]  # records by kind or set
Quotas = dict[tuple[str, str], tuple[int, int]]  # by kind and source: prompts for SFT, prompts in RL's pool
Traces = list[tuple[dict, list[tuple[str, str]]]]  # (a prompt's record, its (reasoning, answer) pairs)


@dataclass
class Settings:
    """Every setting of this stage. Defaults come from the preset."""

    preset: str = setting("sandbox", "where the defaults come from: sandbox, smollm or paper")
    out: str = setting("runs/demo/data", "folder to write")
    overwrite: bool = setting(False, "empty OUT first if it holds a run with other settings")
    seed: int = setting(0, "of every choice and every trace", low=0, high=LAST_SEED)
    # the mixture
    lambda_harmful: float = setting(
        0.5, "share of harmful RL prompts. Paper: 0.1, 0.3 ... 0.9", low=0, high=1
    )
    rl_prompts: int = setting(2000, "RL prompts of all kinds. Paper: 2000", low=1)
    ambiguous_share: float = setting(0.5, "share of ambiguous ones in the rest. Paper: 0.5", low=0, high=1)
    sft_prompts: int = setting(1000, "harmful prompts with traces; 0: no SFT. Paper: 1000", low=0)
    traces_per_prompt: int = setting(4, "traces a prompt, at most. Paper: 4", low=1, high=1000)
    rl_traces: int = setting(
        0,
        "traces for each RL prompt, at most, for the comparison with SFT. Paper: 8; 0: none",
        low=0,
        high=1000,
    )
    eval_prompts: int = setting(500, "prompts of each evaluation set, at most", low=1)
    max_chars: int = setting(
        1000,
        "SFT and RL prompts are shorter than this, but for wildjailbreak's. Paper: 1000",
        low=1,
        high=10**9,
    )
    # where prompts come from
    source: str = setting("sandbox", "the sandbox's world, or files of yours", choices=("sandbox", "files"))
    files: list[str] = setting(
        [],
        "prompts to train on: [KIND=]SOURCE[:N or :S+R], SOURCE a FILE (jsonl, json, csv, tsv, parquet), a NAME or NAME@FILE "
        f"({', '.join(SOURCES)}) or hub:OWNER/NAME[:CONFIG]:SPLIT; take S for SFT and R (or N) others for RL",
    )
    eval_files: list[str] = setting([], "prompts to evaluate on: [SET=]SOURCE; SET may be jailbreak too")
    prompt_column: str = setting(
        "prompt,messages,Behavior,instruction",
        "column of the prompt; of several, the first with text; of a conversation in it, the user's first turn",
    )
    context_column: str = setting(
        "context,ContextString",
        "column of a text that the prompt is about: put before it, and shown apart to HarmBench's judge",
    )
    kind_column: str = setting("kind", "column that says the kind, for files given without KIND=")
    kind_map: list[str] = setting([], "PATTERN=KIND for what is in it, first match counts; KIND may be drop")
    id_column: str = setting("id,BehaviorID", "column of the name by which --targets knows a prompt")
    category_column: str = setting("category,SemanticCategory,type,ability", "column of the topic")
    targets: str = setting(
        "",
        "json file {id: how a compliant answer begins}, for GCG, as HarmBench's; a file's own column target goes before",
    )
    licences: list[str] = setting([], "FILENAME=LICENCE, or a source's name for it; for the manifest")
    # where traces come from
    trace_files: list[str] = setting(
        [], "SOURCEs with prompt, reasoning and answer; star1. Paper: by DeepSeek-R1"
    )
    reasoning_column: str = setting("reasoning,thinking", "column of the reasoning in these")
    answer_column: str = setting("answer,response,completion", "column of the answer in these")
    trace_model: str = setting("", "a model that writes the traces itself: a folder or a hub name")
    trace_temperature: float = setting(0.8, "of its sampling", low=0.01, high=10)
    trace_max_new_tokens: int = setting(256, "its longest reasoning, and its longest answer, tokens", low=1)
    trace_max_batch_tokens: int = setting(
        16384, "tokens in its cache: lower it when out of memory", low=1, high=TOKENS
    )
    device: str = setting("auto", "where it computes", choices=("auto", "cpu", "cuda", "mps"))
    # rainbow teaming
    rainbow: str = setting(
        "", "pi_SFT, a folder or hub name: search for prompts that it answers harmfully (paper, stage II)"
    )
    rainbow_share: float = setting(
        0.4, "of the harmful RL prompts, replaced by them. Paper: 800 of 2000", low=0, high=1
    )
    rainbow_attacker: str = setting(
        "sandbox", "who writes them: sandbox, or a chat model, a folder or hub name"
    )
    rainbow_judge: str = setting("sandbox", "who judges the answers' harm, as --judge of stage 3")
    rainbow_compare: str = setting(
        "", "a chat model that says which of two answers is the more harmful; none: the harm"
    )
    rainbow_archives: int = setting(
        7, "searches, at most, until there are enough. Authors: 7", low=1, high=1000
    )
    rainbow_iterations: int = setting(1000, "of each. Paper: 1000", low=1, high=10**5)
    rainbow_tokens: int = setting(64, "tokens of the longest answer. Paper: 4096", low=1)
    rainbow_max_batch_tokens: int = setting(
        65536, "tokens in the cache: lower it when out of memory", low=16, high=TOKENS
    )
    date: str = setting(
        "", "day that chat templates are told, e.g. 2026-11-26; none: that of the run in OUT, or today"
    )


def check(settings: Settings) -> None:
    """What the range of a single flag cannot say."""
    for rule in settings.kind_map:
        pattern, _, kind = rule.rpartition("=")
        if not pattern or kind not in (*SETS, "drop"):
            raise UserError(f"--kind-map: given {rule}; allowed PATTERN=KIND, KIND {' | '.join(SETS)} | drop")
    for text in settings.licences:
        if "=" not in text:
            raise UserError(f"--licences: given {text}; allowed FILENAME=LICENCE")
    if settings.source == "sandbox" and (settings.files or settings.eval_files):
        raise UserError("--files: given, but --source is sandbox; add --source files")
    if settings.source == "sandbox" and settings.targets:
        raise UserError(
            "--targets: given, but --source is sandbox, whose prompts have theirs; add --source files"
        )
    if settings.source == "files" and not settings.files:
        raise UserError("--files: none given; give FILE or KIND=FILE, or --source sandbox")
    if settings.trace_files and settings.trace_model:
        raise UserError("--trace-model: given together with --trace-files; give one of them")
    if settings.rainbow and settings.rl_traces and settings.trace_files:
        raise UserError(
            "--rl-traces: --trace-files have none for the prompts that --rainbow finds; give --trace-model"
        )
    if not (settings.source == "sandbox" or settings.trace_files or settings.trace_model):
        if settings.sft_prompts:
            raise UserError("--sft-prompts: no traces; give --trace-files, --trace-model or --sft-prompts 0")
        if settings.rl_traces:
            raise UserError("--rl-traces: no traces; give --trace-files, --trace-model or --rl-traces 0")
    for flag in ("trace_files", "eval_files"):
        for word in getattr(settings, flag):
            parse_word(word, f"--{flag.replace('_', '-')}")
    of_harmful = [sft for (kind, _), (sft, _) in quotas(settings).items() if kind == "harmful"]
    if of_harmful and not settings.trace_files and settings.sft_prompts not in (0, sum(of_harmful)):
        raise UserError(
            f"--sft-prompts: given {settings.sft_prompts}; the quotas S+R of --files say {sum(of_harmful)}"
        )


# -------------------------------------------------------------------------------------- the mixture


def prompts_needed(settings: Settings) -> dict[str, int]:
    """RL prompts by kind: a share lambda of all is harmful, `ambiguous_share` of the others ambiguous."""
    harmful = round(settings.lambda_harmful * settings.rl_prompts)
    ambiguous = round(settings.ambiguous_share * (settings.rl_prompts - harmful))
    return {"harmful": harmful, "harmless": settings.rl_prompts - harmful - ambiguous, "ambiguous": ambiguous}


def new_prompts(
    records: list[dict],
    seen: dict[str, str],
    dropped: Counter,
    max_chars: int = 0,
    any_length: Collection[str] = (),
) -> list[dict]:
    """The records whose prompt is new, not empty and not too long. `dropped` counts the others by reason.

    `seen` maps prompts to the reason to drop them when they come again; what is kept enters it. `any_length`: sources whose
    prompts may be longer than `max_chars`.
    """
    kept = []
    for record in records:
        key = same_prompt(record["prompt"])
        if not key:
            dropped["empty"] += 1
        elif max_chars and len(record["prompt"]) >= max_chars and record["source"] not in any_length:
            dropped["too long"] += 1
        elif key in seen:
            dropped[seen[key]] += 1
        else:
            seen[key] = "duplicate"
            kept.append(record)
    return kept


def quotas(settings: Settings) -> Quotas:
    """What --files says of how many; with --trace-files, SFT has the prompts of these, and no others for it are kept."""
    said: Quotas = {}
    names = source_names(words_of(settings))
    for given in map(parse_word, settings.files):
        key = "harmful" if given.kind == "jailbreak" else given.kind, names[given.text]
        if given.rl is not None:
            if key in said:
                raise UserError(f"--files: {'='.join(key)} has two quotas; allowed one")
            said[key] = (0 if settings.trace_files else given.sft, given.rl)
    return said


def share_out(pool: Pool, said: Quotas, sft_count: int, seed: int) -> tuple[list[dict], Pool]:
    """(SFT prompts, RL's pool). Of a source with a quota the first ones are for SFT, the next for RL, the rest for none.

    If no quota says anything of SFT, the pool's first harmful ones are for it. UserError if a source is too small.
    """
    taken: Counter = Counter()
    sft: list[dict] = []
    rest: Pool = {kind: [] for kind in pool}
    for kind, records in pool.items():
        for record in records:
            key = kind, record["source"]
            for_sft, for_rl = said.get(key, (0, len(records)))
            if taken[key] < for_sft:
                sft.append(record)
            elif taken[key] < for_sft + for_rl:
                rest[kind].append(record)
            taken[key] += 1
    for key, numbers in said.items():
        if taken[key] < sum(numbers):
            raise UserError(
                f"--files: {'='.join(key)} has {taken[key]} prompts that can be used; its quota needs {sum(numbers)}"
            )
    if (
        said
    ):  # anew: the first prompts of a large source come early in the order, and would fill a small share
        rest = {kind: in_order(records, f"{seed}/rl pool") for kind, records in rest.items()}
    if not sft:
        sft, rest["harmful"] = rest["harmful"][:sft_count], rest["harmful"][sft_count:]
    return sft, rest


def mix(pool: Pool, settings: Settings, sft_count: int) -> list[dict]:
    """RL prompts: the first of RL's pool, in random order. UserError if the pool, without SFT's `sft_count`, is too small."""
    rl = []
    for kind, count in prompts_needed(settings).items():
        start = sft_count if kind == "harmful" else 0
        if len(pool[kind]) < count:
            raise UserError(
                f"--lambda-harmful {settings.lambda_harmful:g} of --rl-prompts {settings.rl_prompts} needs "
                f"{count} {kind} prompts (and SFT {start}), and there are {len(pool[kind]) + start}: add --files, or "
                "lower --rl-prompts or --sft-prompts, or change --lambda-harmful or --ambiguous-share"
            )
        rl += pool[kind][:count]
    random.Random(f"{settings.seed}/order").shuffle(rl)
    return rl


# ------------------------------------------------------------------------------- prompts: the sandbox


def sandbox_prompts(settings: Settings) -> tuple[Pool, Pool]:
    """(training pool, evaluation sets). The world keeps them apart: other things, words, disguises, hops."""
    from lib.sandbox.world import build_pool  # here, so that real data does not need the sandbox

    def draw(split: str, kind: str, count: int) -> list[dict]:
        try:
            records = build_pool(split, kind, count, settings.seed)
        except ValueError as error:
            raise UserError(f"--rl-prompts, --sft-prompts or --eval-prompts: {error}") from error
        return [{"id": f"{split}-{kind}-{i}", **record} for i, record in enumerate(records)]

    needed = prompts_needed(settings)
    needed["harmful"] += 0 if settings.trace_files else settings.sft_prompts
    pool = {kind: draw("train", kind, count) for kind, count in needed.items()}
    return pool, {name: draw("eval", name, settings.eval_prompts) for name in SETS}


# ----------------------------------------------------------------------------- prompts: files and the hub


def file_prompts(settings: Settings) -> tuple[Pool, Pool]:
    """(training pool, evaluation sets), in the seed's order."""
    targets = read_targets(settings.targets)
    names = source_names(words_of(settings))

    def read(words: list[str]) -> Pool:
        pairs = (
            (parse_word(word).text, pair) for word in words for pair in read_prompts(word, settings, targets)
        )
        return by_set(
            [(kind, record | {"source": names[text]}) for text, (kind, record) in pairs], settings.seed
        )

    pools = read(settings.files), read(settings.eval_files)
    if alone := [name for name in targets if name not in targets.found]:
        print(f"--targets: {len(alone)} of {len(targets)} are of no prompt that was read: {some(alone)}")
    return pools


class Targets(dict[str, str]):
    """Targets by the name that a source has for its prompt. `found`: the names that were asked for."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.found: set[str] = set()

    def get(self, name: str, default: str = "") -> str:  # type: ignore[override]
        self.found.add(name)
        return super().get(name, default)


def read_targets(path: str) -> Targets:
    """The file of --targets; none without one. UserError if it is no {id: text}."""
    if not path:
        return Targets()
    try:
        targets = Targets(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--targets: {path} is no json {{id: text}} ({error})") from error
    for name, text in targets.items():
        if not isinstance(text, str):
            raise UserError(f"--targets: {path}: {name}: is {text!r}; allowed: some text")
    return targets


def some(names: Sequence[str]) -> str:
    """The first few."""
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def by_set(pairs: list[tuple[str, dict]], seed: int) -> Pool:
    return {
        name: in_order([record for other, record in pairs if other == name], f"{seed}/{name}")
        for name in SETS
    }


def in_order(records: list[dict], seed: str) -> list[dict]:
    """In the order of a hash of seed and prompt: another file more does not change which are taken of the others."""
    return sorted(
        records,
        key=lambda r: hashlib.sha256(f"{seed}/{r['prompt']}".encode("utf-8", "backslashreplace")).digest(),
    )


def hold_out(pool: Pool, evaluation: Pool, count: int, seed: int) -> None:
    """Fill, in place, evaluation sets without a file: from the training pool, with half of it at most."""
    for name in SETS:
        if pool[name] and not evaluation[name]:
            here = min(count, len(pool[name]) // 2)
            evaluation[name], pool[name] = pool[name][:here], pool[name][here:]
            print(f"no --eval-files for {name}: {here} prompts of --files are held out")
    # to train on, a jailbreak is a harmful prompt like others
    pool["harmful"] = in_order(pool["harmful"] + pool.pop("jailbreak"), f"{seed}/pool")


def with_rainbow(rl: list[dict], settings: Settings, seen: dict[str, str], dropped: Counter) -> list[dict]:
    """RL prompts, a share of the harmful ones replaced by prompts that --rainbow answers harmfully; `seen` is not used again."""
    from lib.attacks.rainbow_run import search  # here, because torch is slow to import

    harmful = [record for record in rl if record["kind"] == "harmful"]
    found = new_prompts(search(settings, harmful), seen, dropped)
    replaced = {record["id"] for record in harmful[len(harmful) - len(found) :]}
    new = iter(found)
    return [next(new) if record["id"] in replaced else record for record in rl]


# -------------------------------------------------------------------------------------------- traces


def file_traces(traced: Traced, settings: Settings, seen: dict[str, str], dropped: Counter) -> Traces:
    """--trace-files: `sft_prompts` of their prompts with traces. They count as harmful, and enter `seen`."""
    records, pairs, empty = traced
    dropped["empty trace"] += empty
    usable = new_prompts(list(records.values()), dict(seen), dropped, settings.max_chars)
    if len(usable) < settings.sft_prompts:
        raise UserError(
            f"--sft-prompts: given {settings.sft_prompts}; the trace files have {len(usable)} with traces"
        )
    chosen = random.Random(f"{settings.seed}/traces").sample(usable, settings.sft_prompts)
    seen |= {same_prompt(record["prompt"]): "in SFT" for record in chosen}
    return [(record, pairs[same_prompt(record["prompt"])][: settings.traces_per_prompt]) for record in chosen]


def file_rl_traces(traced: Traced, settings: Settings, rl: list[dict]) -> Traces:
    """--rl-traces of --trace-files: for those RL prompts that have some. UserError if none has."""
    if not (settings.trace_files and settings.rl_traces):
        return []
    pairs = traced[1]
    found = [record for record in rl if same_prompt(record["prompt"]) in pairs]
    if not found:
        raise UserError(
            f"--rl-traces: --trace-files have none for the {len(rl)} RL prompts; add files that do, or give 0"
        )
    return [(record, pairs[same_prompt(record["prompt"])][: settings.rl_traces]) for record in found]


def model_traces(settings: Settings, records: list[dict], count: int, progress: Path) -> Traces:
    """--trace-model: self-written; `progress` is a file that lets a stopped run go on."""
    from lib.sources.traces import TraceWriter, write_all  # here, because torch is slow to import

    writer = TraceWriter(
        settings.trace_model,
        device=settings.device,
        temperature=settings.trace_temperature,
        max_new_tokens=settings.trace_max_new_tokens,
        max_batch_tokens=settings.trace_max_batch_tokens,
    )
    written = write_all(writer, records, count, settings.seed, progress)
    return list(zip(records, written, strict=True))


def sandbox_traces(settings: Settings, records: list[dict], count: int, use: str) -> Traces:
    """The world's own writer, diverse and imperfect; `use` is one of its WRONG_VERDICTS."""
    from lib.sandbox.traces import WRONG_VERDICTS, write_trace

    rng = random.Random(f"{settings.seed}/{use}")
    return [(r, [write_trace(r, rng, WRONG_VERDICTS[use]) for _ in range(count)]) for r in records]


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


# ---------------------------------------------------------------------------------------------- main


def main() -> None:
    settings = parse_settings(Settings, "mixture")
    check(settings)
    out = Path(settings.out)
    script, next_out, model = "02_sft_warmstart.py", "sft", settings.trace_model
    if not settings.sft_prompts:
        script, next_out, model = "03_rl_train.py", "rl", settings.rainbow
    given = {"data": out, "out": beside(out, next_out)} | ({"model": model} if model else {})
    following = next_command(script, settings, ("mixture",), **given)
    lock_folder(settings.out)
    if settings.trace_model or settings.rainbow:
        from lib.chat import set_date  # here, because torch is slow to import

        settings.date = date_of_run(out, settings.date)
        set_date(settings.date)
    print(f"reading {' '.join(settings.files + settings.eval_files) or 'the sandbox'}; writing to {out}")
    pool, evaluation = (sandbox_prompts if settings.source == "sandbox" else file_prompts)(settings)
    seen: dict[str, str] = {}
    dropped: Counter = Counter()
    evaluation = {name: new_prompts(records, seen, dropped) for name, records in evaluation.items()}
    evaluation = {name: records[: settings.eval_prompts] for name, records in evaluation.items()}
    seen = dict.fromkeys(seen, "in evaluation")
    traced = traced_prompts(settings)
    traces = file_traces(traced, settings, seen, dropped) if settings.trace_files else []
    names = source_names(words_of(settings))
    any_length = {
        names[word.text]
        for word in map(parse_word, settings.files)
        if word.name and SOURCES[word.name].any_length
    }
    pool = {
        name: new_prompts(records, seen, dropped, settings.max_chars, any_length)
        for name, records in pool.items()
    }
    if settings.source == "files":
        hold_out(pool, evaluation, settings.eval_prompts, settings.seed)
    sft_count = 0 if settings.trace_files else settings.sft_prompts
    sft_prompts, pool = share_out(pool, quotas(settings), sft_count, settings.seed)
    rl = mix(pool, settings, len(sft_prompts))
    rl_traces = file_rl_traces(traced, settings, rl)
    # After all inputs have been read: a mistake in one of them must not cost an earlier run.
    config = {
        **asdict(settings),
        **checksums(*inputs(settings), *([settings.rainbow] if settings.rainbow else [])),
    }
    read = [*map(str, inputs(settings)), settings.trace_model, settings.rainbow, settings.rainbow_attacker]
    claim_folder(settings.out, config, overwrite=settings.overwrite, inputs=read)
    if (out / "manifest.json").exists():
        print(f"{out} is finished. Next: {following}")
        return

    if settings.rainbow:
        rl = with_rainbow(rl, settings, seen, dropped)
    progress, rl_progress = out / "traces.partial.jsonl", out / "rl_traces.partial.jsonl"
    if settings.sft_prompts and settings.trace_model:
        traces = model_traces(settings, sft_prompts, settings.traces_per_prompt, progress)
    elif settings.sft_prompts and not settings.trace_files:
        traces = sandbox_traces(settings, sft_prompts, settings.traces_per_prompt, "traces")
    if settings.rl_traces and settings.trace_model:
        rl_traces = model_traces(settings, rl, settings.rl_traces, rl_progress)
    elif settings.rl_traces and not settings.trace_files:
        rl_traces = sandbox_traces(settings, rl, settings.rl_traces, "rl traces")
    files = {"sft": sft_records(traces, dropped), "rl": rl}
    files |= {"sft_rl": sft_records(rl_traces, dropped)}
    files |= {f"eval_{name}": records for name, records in evaluation.items()}
    files = {f"{name}.jsonl": records for name, records in files.items() if records}
    for name, records in files.items():
        write_jsonl(out / name, records)
    write_json(out / "manifest.json", manifest(settings, files, pool, dropped))
    progress.unlink(missing_ok=True)
    rl_progress.unlink(missing_ok=True)

    for name, records in files.items():
        kinds = Counter(record["kind"] for record in records)
        print(f"{len(records):6}  {name:22} {', '.join(f'{count} {kind}' for kind, count in kinds.items())}")
    if without := [record["id"] for record in evaluation["harmful"] if not record["target"]]:
        print(
            f"{len(without)} harmful evaluation prompts have no target: GCG needs --targets ({some(without)})"
        )
    print(f"left out: {', '.join(f'{count} {reason}' for reason, count in dropped.items()) or 'nothing'}")
    print(f"next: {following}")


if __name__ == "__main__":
    run_main(main)
