"""Around the attacks: models and sets, checks before a search, shares of processes, files to go on with."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lib import UserError
from lib.attacks.attacker import load_attacker
from lib.attacks.gcg import CONTROL, check_suffixes
from lib.attacks.suffix import target_of
from lib.attacks.table import ATTACKS, steps_of
from lib.attacks.victim import Victim
from lib.chat import encode_text
from lib.metrics import SETS
from lib.rewards import KINDS
from lib.run.checks import check_tokenizer
from lib.run.files import append_jsonl, read_jsonl, resume_log
from lib.run.folder import reasons
from lib.run.hub import load_policy, load_tokenizer
from lib.run.settings import named, preset_values
from lib.sampler import draw_seeds, random_numbers

FILES = {name: f"eval_{name}.jsonl" for name in SETS} | {"direct": "eval_harmful.jsonl"}  # of stage 1
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
    paths, systems = named("--models", settings.models), named("--systems", settings.systems, "TEXT")
    if not paths:
        raise UserError("--models: none given; allowed NAME=FOLDER or NAME=HUB-NAME, e.g. tars=runs/demo/rl")
    usual = preset_values(type(settings), settings.preset, "eval")["direct"]  # of the preset's own models
    direct = [] if settings.direct == usual else settings.direct
    for flag, names in (("--systems", systems), ("--direct", direct)):
        for name in names:
            if name not in paths:
                raise UserError(f"{flag}: given {name}; allowed the names in --models: {', '.join(paths)}")
    return [Model(n, p, reasons(n, p, settings.direct), systems.get(n, "")) for n, p in paths.items()]


def files_of(data: str) -> dict[str, Path]:
    """The files of stage 1 that are there; that of direct requests must be."""
    paths = {name: Path(data) / file for name, file in FILES.items()}
    return {name: path for name, path in paths.items() if name == "direct" or path.exists()}


def read_sets(settings: Any, names: Sequence[str]) -> tuple[dict[str, list[dict]], list[dict]]:
    """The sets of stage 1, name -> records; and the first direct ones, which are attacked, if they can be.

    These get a "twin", a request that deserves an answer, where stage 1 gave none.
    """
    needs, texts = ("id", "prompt", "kind", "category"), ("category", "target", "prefill", "twin", "context")
    sets, folder = {}, Path(settings.data)
    for name, path in files_of(settings.data).items():
        sets[name] = read_jsonl(path, needs, texts)[: settings.limit or None]
        for record in sets[name]:
            if record["kind"] not in KINDS:
                allowed = f"kind is {record['kind']!r}; allowed: {', '.join(KINDS)}"
                raise UserError(f"{path}: {record['id']}: {allowed}")
    benign = sets.get("harmless") or sets.get("ambiguous")
    if not benign:
        missing = f"{folder / FILES['harmless']}: no such file, nor {FILES['ambiguous']}"
        raise UserError(f"{missing}: a defence must be used, too")
    aiming = any(ATTACKS[name].target for name in names)
    behaviours = [record for record in sets["direct"] if target_of(record) or not aiming]
    if settings.behaviours and not behaviours:
        missing = f"{folder / FILES['direct']}: attacks need a target, no request has one"
        raise UserError(f"{missing}: give records a target, or --behaviours 0")
    behaviours = behaviours[: settings.behaviours]
    for i, behaviour in enumerate(behaviours):
        behaviour["twin"] = behaviour.get("twin") or benign[i % len(benign)]["prompt"]
    return sets, behaviours


class Lab:
    """The models, one at a time in memory, the attacker, and the files. `search` is chapter 4's."""

    def __init__(self, settings: Any, run: Any, judge: Any, search: Callable) -> None:
        self.settings, self.run, self.judge, self.search = settings, run, judge, search
        self.how = {"device": run.device, "dtype": settings.dtype}
        self.loaded: Victim | None = None
        self.seconds: dict[str, float] = defaultdict(float)  # by model
        started = settings.overwrite or not (run.out / "attacks.jsonl").exists()
        self.is_new: bool = run.gather(started)[0]  # nothing is there yet to go on with

    def victim(self, model: Model) -> Victim:
        if self.loaded is None or self.loaded.name != model.name:
            self.loaded = None  # before the next one comes
            settings = self.settings
            self.loaded = Victim(
                model.name,
                load_policy(model.path, **self.how).requires_grad_(False),  # gradients are of the suffix
                load_tokenizer(model.path),
                model.reasoning,
                self.judge,
                max_new_tokens=settings.max_new_tokens if model.reasoning else settings.answer_tokens,
                temperature=settings.temperature,
                max_batch_tokens=settings.max_batch_tokens,
                system=model.system,
                progress=self.run.leader,
            )
        return self.loaded

    @cached_property
    def attacker(self) -> Any:
        settings = self.settings
        limits = {"max_new_tokens": settings.attacker_tokens, "max_batch_tokens": settings.max_batch_tokens}
        return load_attacker(settings.attacker, **self.how, **limits)

    def check(self, models: list[Model], sets: dict, behaviours: list[dict], names: Sequence[str]) -> None:
        """Tries attacker, models and judge, and encodes what models will read: a fault costs no search."""
        if behaviours and any(ATTACKS[name].attacker for name in names):
            self.attacker.check(names, [behaviour["prompt"] for behaviour in behaviours])
        first, missing = sets["direct"][:8], sum(not target_of(record) for record in sets["direct"])
        if behaviours and missing and any(ATTACKS[name].target for name in names):
            self.run.say(f"{missing} direct requests have no target, and are not attacked")
        for model in models:
            victim = self.victim(model)
            for name, path in files_of(self.settings.data).items():
                check_prompts(victim, sets[name], path)
            pair, prompts = (victim.model, victim.tokenizer), [record["prompt"] for record in first]
            check_tokenizer(*pair, prompts, reasoning=model.reasoning)
            if behaviours:
                check_behaviours(victim, behaviours, names, self.settings)
        victim.judged(first[:1], [{"answer": "No."}])

    def begin(self) -> None:
        """Claims the folder, and reads what an earlier run of the same settings has left."""
        self.run.begin()
        self.attempts = Log(self.run, "attacks.jsonl", ("model", "attack"))
        self.completions = Log(self.run, "completions.jsonl", ("model", "set", "step"))

    def attack(self, model: Model, name: str, behaviours: list[dict]) -> list[dict]:
        """Lines of attacks.jsonl. Part by part: each process attacks its share, then the part is saved."""
        began, attack, lines = time.perf_counter(), ATTACKS[name], list[dict]()
        together = attack.at_once * self.run.size or len(behaviours)
        steps = 1 if attack.asks else max(1, steps_of(name, self.settings))
        total, label = steps * (len(behaviours) if attack.at_once else 1), f"{model.name}: {name}"
        with tqdm(total=total, desc=label, unit="step", disable=not self.run.leader) as bar:
            for begin in range(0, len(behaviours), together):
                part, key = behaviours[begin : begin + together], {"model": model.name, "attack": name}
                lines += self.attempts.part(key, part, partial(self._attempts, model, name, part, bar.update))
                bar.update(total * len(lines) // len(behaviours) - bar.n)
        self.seconds[model.name] += time.perf_counter() - began
        return lines

    def _attempts(self, model: Model, name: str, part: list[dict], on_step: Callable) -> list[dict]:
        attack, mine = ATTACKS[name], part if self.run.leader else []
        if attack.at_once:  # else there is one search for all, which has no shares
            mine = self.run.share(part)
        generators = [random_numbers(self.settings.seed, f"{name}/{b['id']}") for b in mine]
        attempts = []
        if mine:  # who has nothing to do loads no model
            given = [self.search] if attack.search else [self.attacker] if attack.attacker else []
            attempts = attack.run(self.victim(model), mine, self.settings, generators, on_step, *given)
        return self.run.gather_lists([asdict(attempt) for attempt in attempts])

    def ask(self, model: Model, tries: Tries) -> list[dict]:
        """Lines of completions.jsonl: what the model answers to all tries, and the judge's verdicts."""
        began, lines = time.perf_counter(), list[dict]()
        for (name, step), asked in tqdm(tries.items(), f"{model.name}: answers", disable=not self.run.leader):
            key, records = {"model": model.name, "set": name, "step": step}, [record for record, _ in asked]
            lines += self.completions.part(key, records, partial(self._answers, model, key, asked))
        self.seconds[model.name] += time.perf_counter() - began
        return lines

    def _answers(self, model: Model, key: dict, asked: list[tuple[dict, dict]]) -> list[dict]:
        numbers = random_numbers(self.settings.seed, f"{key['set']}/{key['step']}")  # the same for all models
        new = [(*pair, seed) for pair, seed in zip(asked, draw_seeds(numbers, len(asked)), strict=True)]
        mine = self.run.share([row for row in new if "completion" not in row[1]])
        answers = []
        if mine:  # as above: what an attack has asked already is not asked again
            sent, openings = [t["sent"] for _, t, _ in mine], [t["opening"] for _, t, _ in mine]
            answers = self.victim(model).ask([r for r, *_ in mine], sent, openings, [s for *_, s in mine])
        found, lines = iter(self.run.gather_lists(answers)), []
        for record, attempt in asked:
            line = {name: record[name] for name in COPIED if name in record}
            line |= {name: attempt[name] for name in ("technique", "sent", "opening") if name in attempt}
            lines.append(line | (attempt.get("completion") or next(found)))
        return lines


def check_prompts(victim: Victim, records: list[dict], path: Path) -> None:
    fitting = []
    for record in records:
        try:
            fitting.append(victim.fits(victim.encode(record["prompt"])))
        except UserError as error:
            raise UserError(f"{path}: {record['id']}: {error}") from error
    if not any(fitting):
        flag = "--max-new-tokens" if victim.reasoning else "answer_tokens"
        given = f"{flag}: given {victim.max_new_tokens}; with it all prompts of {path} exceed"
        raise UserError(f"{given} the context of {victim.name}: lower it, or leave the model out")


def check_behaviours(victim: Victim, behaviours: list[dict], names: Sequence[str], settings: Any) -> None:
    """UserError for what an attack needs and the model's tokenizer cannot read."""
    for behaviour in behaviours:
        texts = {key: behaviour.get(key) for key in ("prefill", "twin")} | {"target": target_of(behaviour)}
        for key, text in texts.items():
            if text and not encode_text(victim.tokenizer, text):
                nothing = f"its {key} {text!r} has no tokens"
                raise UserError(f"behaviour {behaviour['id']}: {nothing}; write another")
    if victim.reasoning and FORGING & {*names}:
        if victim.tokenizer.unk_token_id in encode_text(victim.tokenizer, settings.forged):
            given = f"forged: given {settings.forged!r}; {victim.name} does not know all of its words"
            raise UserError(f"{given}: write another in the preset")
    if CONTROL in names:  # which comes with every search for a suffix
        check_suffixes(victim, behaviours, settings)


def summary(attempts: Sequence[dict], name: str) -> dict[str, Any]:
    """What an attack achieved and cost, from its lines of attacks.jsonl. No seconds: they vary."""
    cost = {key: sum(a["cost"][key] for a in attempts) for key in attempts[0]["cost"] if key != "seconds"}
    tried = [a["trace"] for a in attempts if a["trace"] and a["trace"][0]["loss"] is not None]
    before, after = (sum(t[k]["loss"] for t in tried) / len(tried) if tried else None for k in (0, -1))
    result = {"access": ATTACKS[name].access, "behaviours": len(attempts)}
    return {**result, "loss_before": before, "loss_after": after, **cost}


class Log:
    """A jsonl file that grows by parts. One that a kill cut short, or that stands there twice, is done again.

    The leader reads and writes it, for all processes. `keys`: of a line, beside its id.
    """

    def __init__(self, run: Any, file: str, keys: tuple[str, ...]) -> None:
        self.run, self.path = run, run.out / file
        self.lines: dict[tuple, list[dict]] = defaultdict(list)
        for line in resume_log(self.path) if run.leader else []:
            self.lines[tuple(line[key] for key in keys)].append(line)

    def part(self, key: dict, records: Sequence[dict], make: Callable[[], list[dict]]) -> list[dict]:
        """The lines of these records under `key`: as the file has them all, or else made now and added."""
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
