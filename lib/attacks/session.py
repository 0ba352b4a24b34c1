"""Around the attacks: what is given, checks before anything is searched, shares of processes, files that survive a kill."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lib import UserError
from lib.attacks.attacker import check_attacker, load_attacker
from lib.attacks.gcg import CONTROL, check_suffixes
from lib.attacks.suffix import target_of
from lib.attacks.table import ATTACKS, steps_of
from lib.attacks.victim import Victim
from lib.chat import encode_text
from lib.rewards import KINDS
from lib.run.checks import check_tokenizer
from lib.run.files import append_jsonl, read_jsonl, resume_log
from lib.run.flags import named
from lib.run.folder import reasons, stated_reasoning
from lib.run.hub import load_policy, load_tokenizer
from lib.sampler import draw_seeds, random_numbers

FILES = {  # set -> file of stage 1
    "direct": "eval_harmful.jsonl",
    "jailbreak": "eval_jailbreak.jsonl",
    "harmless": "eval_harmless.jsonl",
    "ambiguous": "eval_ambiguous.jsonl",
}
FORGING = {"gcg_forged", "gcg_twin", "prefill_reasoning", "prefill_answer"}  # attacks that may use `forged`
COPIED = ("id", "kind", "category", "hops", "prompt")  # from a record to its line of completions.jsonl
Tries = dict[tuple[str, int], list[tuple[dict, dict]]]  # (set or attack, step) -> records, and what is sent


@dataclass(frozen=True)
class Model:
    """A model under evaluation. `reasoning`: it thinks first, so its turn is opened with "<think>\\n"."""

    name: str
    path: str
    reasoning: bool
    system: str


def read_models(settings: Any) -> list[Model]:
    """NAME=PATH ... -> models. A checkpoint of 02 or 03 says if it reasons; others do unless in --direct."""
    paths = named("--models", settings.models, "FOLDER or NAME=HUB-NAME, e.g. tars=runs/demo/rl")
    systems = named("--systems", settings.systems, "TEXT")
    if not paths:
        raise UserError("--models: none given; allowed NAME=FOLDER or NAME=HUB-NAME, e.g. tars=runs/demo/rl")
    unclear = any(stated_reasoning(path) is None for path in paths.values())
    for flag, names in (("--systems", systems), ("--direct", settings.direct if unclear else ())):
        for name in names:
            if name not in paths:
                raise UserError(f"{flag}: given {name}; allowed the names in --models: {', '.join(paths)}")
    return [Model(n, p, reasons(n, p, settings.direct), systems.get(n, "")) for n, p in paths.items()]


def read_sets(settings: Any, names: Sequence[str]) -> tuple[dict[str, list[dict]], list[dict]]:
    """The sets that stage 1 wrote, name -> records; and the first direct ones, which are attacked: with a target if an
    attack needs one. They get a "twin", a request that deserves an answer, where stage 1 gave none."""
    sets = {}
    for name, path in files_of(settings.data).items():
        needs, texts = (
            ("id", "prompt", "kind", "category"),
            ("category", "target", "prefill", "twin", "context"),
        )
        sets[name] = read_jsonl(path, needs, texts)[: settings.limit or None]
        for record in sets[name]:
            if record["kind"] not in KINDS:
                allowed = ", ".join(KINDS)
                raise UserError(f"{path}: {record['id']}: kind is {record['kind']!r}; allowed: {allowed}")
    benign = sets.get("harmless") or sets.get("ambiguous")
    if not benign:
        path = Path(settings.data) / FILES["harmless"]
        raise UserError(f"{path}: no such file, nor {FILES['ambiguous']}: a defence must be used, too")
    aiming = any(ATTACKS[name].target for name in names)
    able = [record for record in sets["direct"] if target_of(record) or not aiming]
    if settings.behaviours and not able:
        path = Path(settings.data) / FILES["direct"]
        raise UserError(
            f"{path}: attacks need a target, no request has one: stage 1 --targets, or --behaviours 0"
        )
    behaviours = able[: settings.behaviours]
    for i, behaviour in enumerate(behaviours):
        behaviour["twin"] = behaviour.get("twin") or benign[i % len(benign)]["prompt"]
    return sets, behaviours


def files_of(data: str) -> dict[str, Path]:
    """The files of stage 1 that are there; that of direct requests must be."""
    paths = {name: Path(data) / file for name, file in FILES.items()}
    return {name: path for name, path in paths.items() if name == "direct" or path.exists()}


class Lab:
    """The models, one at a time in memory, and the attacker, from when it is first needed. `search`: chapter 4's."""

    def __init__(self, settings: Any, run: Any, judge: Any, search: Callable) -> None:
        self.settings, self.run, self.judge, self.search = settings, run, judge, search
        self.loaded: Victim | None = None
        self.seconds: Counter[str] = Counter()  # by model

    def victim(self, model: Model) -> Victim:
        if self.loaded is None or self.loaded.name != model.name:
            self.loaded = None  # before the next one comes
            settings = self.settings
            self.loaded = Victim(
                name=model.name,
                # GCG wants gradients of its suffix, not of the weights
                model=load_policy(model.path, device=self.run.device, dtype=settings.dtype).requires_grad_(
                    False
                ),
                tokenizer=load_tokenizer(model.path),
                reasoning=model.reasoning,
                judge=self.judge,
                max_new_tokens=settings.max_new_tokens if model.reasoning else settings.answer_tokens,
                temperature=settings.temperature,
                max_batch_tokens=settings.max_batch_tokens,
                system=model.system,
                progress=self.run.leader,
            )
        return self.loaded

    @cached_property
    def attacker(self) -> Any:
        limits = {
            "max_new_tokens": self.settings.attacker_tokens,
            "max_batch_tokens": self.settings.max_batch_tokens,
        }
        return load_attacker(
            self.settings.attacker, device=self.run.device, dtype=self.settings.dtype, **limits
        )

    def is_new(self) -> bool:
        """Whether nothing is there yet to go on with. The leader says so for all."""
        path = self.run.out / "attacks.jsonl"
        return self.run.gather(self.settings.overwrite or not path.exists())[0]

    # ---- before anything is searched -----------------------------------------------------------------------

    def check(
        self, models: Sequence[Model], sets: dict, behaviours: Sequence[dict], names: Sequence[str]
    ) -> None:
        """Tries judge, attacker and every model, and looks at all that they will read: what is wrong costs no search."""
        if behaviours and self.settings.attacker != "sandbox" and any(ATTACKS[n].attacker for n in names):
            check_attacker(self.settings.attacker, talks="pair" in names)
            self.attacker.load()
        first = sets["direct"][:8]
        for model in models:
            victim = self.victim(model)
            prompts = [record["prompt"] for record in first]
            check_tokenizer(
                victim.model, victim.tokenizer, prompts, reasoning=victim.reasoning, system=victim.system
            )
            for name, records in sets.items():
                check_prompts(victim, records, files_of(self.settings.data)[name])
            if behaviours:
                check_behaviours(victim, behaviours, names, self.settings)
        self.victim(models[0]).judged(first[:1], [{"answer": "No."}])

    # ---- the work ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Claims the folder, and reads what an earlier run of the same settings has left."""
        self.run.begin()
        self.attempts = Log(self.run, "attacks.jsonl", ("model", "attack"))
        self.completions = Log(self.run, "completions.jsonl", ("model", "set", "step"))

    def attack(self, model: Model, name: str, behaviours: Sequence[dict]) -> list[dict]:
        """Lines of attacks.jsonl. Part by part: each process attacks its share, then the part is saved."""
        started, attack, lines = time.perf_counter(), ATTACKS[name], list[dict]()
        together = attack.at_once * len(self.run.gather(0)) or len(behaviours)
        steps = 1 if attack.asks else max(1, steps_of(name, self.settings))
        total = steps * (len(behaviours) if attack.at_once else 1)
        unit = "behaviour" if steps == 1 else "step"
        with tqdm(total=total, desc=f"{model.name}: {name}", unit=unit, disable=not self.run.leader) as bar:
            on_step = bar.update if steps > 1 else lambda: None
            for begin in range(0, len(behaviours), together):
                part, key = behaviours[begin : begin + together], {"model": model.name, "attack": name}
                lines += self.attempts.part(key, part, partial(self._attempts, model, name, part, on_step))
                bar.update(total * len(lines) // len(behaviours) - bar.n)
        self.seconds[model.name] += time.perf_counter() - started
        return lines

    def _attempts(self, model: Model, name: str, part: Sequence[dict], on_step: Callable) -> list[dict]:
        attack = ATTACKS[name]
        mine = self.run.share(part) if attack.at_once else part if self.run.leader else []
        generators = [random_numbers(self.settings.seed, f"{name}/{b['id']}") for b in mine]
        given = [self.search] if attack.search else [self.attacker] if attack.attacker else []
        attempts = []
        if mine:
            attempts = attack.run(self.victim(model), mine, self.settings, generators, on_step, *given)
        return self._gathered([asdict(attempt) for attempt in attempts])

    def ask(self, model: Model, tries: Tries) -> list[dict]:
        """Lines of completions.jsonl: what the model answers to all tries, and the judge's verdicts."""
        started, lines = time.perf_counter(), list[dict]()
        bar = tqdm(tries.items(), desc=f"{model.name}: answers", unit="set", disable=not self.run.leader)
        for (name, step), asked in bar:
            key = {"model": model.name, "set": name, "step": step}
            records = [record for record, _ in asked]
            lines += self.completions.part(
                key, records, partial(self._answers, model, f"{name}/{step}", asked)
            )
        self.seconds[model.name] += time.perf_counter() - started
        return lines

    def _answers(self, model: Model, label: str, asked: list[tuple[dict, dict]]) -> list[dict]:
        seeds = draw_seeds(random_numbers(self.settings.seed, label), len(asked))  # the same for all models
        new = [(*pair, seed) for pair, seed in zip(asked, seeds, strict=True) if "completion" not in pair[1]]
        answers = []
        if mine := self.run.share(new):
            sent, openings = [t["sent"] for _, t, _ in mine], [t["opening"] for _, t, _ in mine]
            answers = self.victim(model).ask([r for r, _, _ in mine], sent, openings, [s for _, _, s in mine])
        found, lines = iter(self._gathered(answers)), []
        for record, attempt in asked:
            line = {key: record[key] for key in COPIED if key in record}
            line |= {key: attempt[key] for key in ("technique", "sent", "opening") if key in attempt}
            lines.append(line | (attempt.get("completion") or next(found)))
        return lines

    def _gathered(self, lines: list[dict]) -> list[dict]:
        return [line for share in self.run.gather(lines) for line in share]


def check_prompts(victim: Victim, records: Sequence[dict], file: Path) -> None:
    rows = []
    for record in records:
        with of(f"{file}: {record['id']}: prompt"):
            rows.append(victim.encode(record["prompt"]))
    if not any(victim.fits(ids) for ids in rows):
        flag = "--max-new-tokens" if victim.reasoning else "--answer-tokens"
        raise UserError(
            f"{flag}: given {victim.max_new_tokens}; with it all prompts of {file} exceed the model's context "
            f"({victim.name}): lower it, or leave the model out"
        )


def check_behaviours(victim: Victim, behaviours: Sequence[dict], names: Sequence[str], settings: Any) -> None:
    needed = {"prefill": "prefill_answer" in names, "twin": "gcg_twin" in names}
    needed["target"] = any(ATTACKS[name].target for name in names)
    for behaviour in behaviours:
        for key in needed:
            text = behaviour.get(key)
            with of(f"behaviour {behaviour['id']}: its {key}"):
                if text and needed[key] and not encode_text(victim.tokenizer, text):
                    raise UserError(f"{text!r} has no tokens; write another")
    if victim.reasoning and FORGING & {*names}:
        with of("forged"):
            encode_text(victim.tokenizer, settings.forged)
    if CONTROL in names:  # which comes with every search for a suffix
        with of("gcg_init"):
            victim.encode(settings.initial_suffix())
        check_suffixes(victim, behaviours, settings)


@contextmanager
def of(what: str) -> Iterator[None]:
    """An error within names `what`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def attack_summary(attempts: Sequence[dict], access: str) -> dict[str, Any]:
    """What an attack achieved and cost, from its lines of attacks.jsonl; no seconds, for they differ from run to run."""
    cost = {key: sum(a["cost"][key] for a in attempts) for key in attempts[0]["cost"] if key != "seconds"}
    tried = [a["trace"] for a in attempts if a["trace"] and a["trace"][0]["loss"] is not None]
    before, after = (sum(t[k]["loss"] for t in tried) / len(tried) if tried else None for k in (0, -1))
    return {"access": access, "behaviours": len(attempts), "loss_before": before, "loss_after": after, **cost}


class Log:
    """A jsonl file that grows as a run goes, by parts: one that a kill cut short is done again, and so is one with lines
    twice, as after two runs at once. The leader reads and writes it, for all processes. `keys`: of a line, beside its id."""

    def __init__(self, run: Any, file: str, keys: tuple[str, ...]) -> None:
        self.run, self.path = run, run.out / file
        self.lines: dict[tuple, list[dict]] = defaultdict(list)
        for line in resume_log(self.path) if run.leader else []:
            self.lines[tuple(line[key] for key in keys)].append(line)

    def part(self, key: dict, records: Sequence[dict], make: Callable[[], list[dict]]) -> list[dict]:
        """The lines of these records under `key`: as the file has them all, or else made now and added to it."""
        ids = [record["id"] for record in records]
        known = [line for line in self.lines[tuple(key.values())] if line["id"] in {*ids}]
        known = self.run.gather(known)[0]
        if [line["id"] for line in known] == ids:
            return known
        if known and self.run.leader:
            resume_log(self.path, lambda line: line not in known)
        lines = [key | line for line in make()]
        for line in lines if self.run.leader else []:
            append_jsonl(self.path, line)
        return lines
