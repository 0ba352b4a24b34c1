"""Around the attacks: models and sets, checks before a search, shares of processes, files to go on with."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lib import UserError
from lib.attacks.attacker import Attacker, load_attacker
from lib.attacks.core import COSTS, Attempt, Victim, random_numbers
from lib.attacks.gcg import Slot, draw_suffix
from lib.attacks.table import ATTACKS, CONTROL
from lib.chat import encode_text
from lib.metrics import SETS
from lib.run.files import append_jsonl, read_jsonl, resume_log
from lib.run.folder import reasons
from lib.run.hub import check_tokenizer, load_policy, load_tokenizer
from lib.run.settings import named, preset_values
from lib.sampler import draw_seeds

FILES = {name: f"eval_{name}.jsonl" for name in SETS} | {"direct": "eval_harmful.jsonl"}  # of stage 1
FORGING = {"gcg_forged", "gcg_twin", "prefill_reasoning", "prefill_answer"}  # attacks that may use `forged`
LOGS = {"attacks.jsonl": ("model", "attack", "id"), "completions.jsonl": ("model", "set", "step", "id")}
COPIED = ("id", "kind", "category", "hops", "prompt")  # from a record to its line of completions.jsonl
Part = tuple[dict, list[dict], Callable[[], list[dict]]]  # of a log: key, records, who makes their lines
Tries = dict[tuple[str, int], list[tuple[dict, dict]]]  # (set or attack, step) -> records, and what is sent


@dataclass(frozen=True)
class Model:
    """A model under evaluation. `reasoning`: it thinks first, so its turn is opened with "<think>\\n"."""

    name: str
    path: str
    reasoning: bool
    system: str


def read_models(settings: Any) -> list[Model]:
    """NAME=PATH ... -> models. Those of 02 and 03 say if they reason; others do unless in --no-reasoning."""
    paths, systems = named("--models", settings.models), named("--systems", settings.systems, "TEXT")
    if not paths:
        raise UserError("--models: none given; allowed NAME=FOLDER or NAME=HUB-NAME, e.g. tars=runs/demo/rl")
    usual = preset_values(type(settings), settings.preset, "eval")  # of the preset's own models
    without, given = settings.no_reasoning, settings.no_reasoning != usual["no_reasoning"]
    for flag, names in (("--systems", systems), ("--no-reasoning", without if given else [])):
        for name in names:
            if name not in paths:
                raise UserError(f"{flag}: given {name}; allowed the names in --models: {', '.join(paths)}")
    return [Model(n, p, reasons(n, p, without, given), systems.get(n, "")) for n, p in paths.items()]


def files_of(data: str) -> dict[str, Path]:
    """The files of stage 1 that are there; that of direct requests must be."""
    paths = {name: Path(data) / file for name, file in FILES.items()}
    return {name: path for name, path in paths.items() if name == "direct" or path.exists()}


def read_sets(settings: Any, names: Sequence[str]) -> tuple[dict[str, list[dict]], list[dict]]:
    """The sets of stage 1, name -> records; and the first direct ones, which are attacked, if they can be.

    These get what stage 1 did not give: as "twin" a request that deserves an answer, as "prefill" the target.
    """
    needs, texts = ("id", "prompt", "kind", "category"), ("category", "target", "prefill", "twin", "context")
    sets, folder = {}, Path(settings.data)
    for name, path in files_of(settings.data).items():
        sets[name] = read_jsonl(path, needs, texts)[: settings.limit or None]
    benign = sets.get("harmless") or sets.get("ambiguous")
    if not benign:
        missing = f"{folder / FILES['harmless']}: no such file, nor {FILES['ambiguous']}"
        raise UserError(f"{missing}: a defence must be used, too")
    for record in sets["direct"]:
        record["target"] = (record.get("target") or "").strip()
    aiming = any(ATTACKS[name].target for name in names)
    behaviours = [record for record in sets["direct"] if record["target"] or not aiming]
    if settings.behaviours and not behaviours:
        missing = f"{folder / FILES['direct']}: attacks need a target, no request has one"
        raise UserError(f"{missing}: give records a target, or --behaviours 0")
    behaviours = behaviours[: settings.behaviours]
    for i, behaviour in enumerate(behaviours):
        behaviour["twin"] = behaviour.get("twin") or benign[i % len(benign)]["prompt"]
        behaviour["prefill"] = behaviour.get("prefill") or behaviour["target"]
    return sets, behaviours


class Lab:
    """The models, one at a time in memory, the attacker, and the files. `search` is chapter 4's."""

    def __init__(self, settings: Any, run: Any, judge: Any, search: Callable | None) -> None:
        self.settings, self.run, self.judge, self.search = settings, run, judge, search
        self.how = {"device": run.device, "dtype": settings.dtype}
        self.loaded: Victim | None = None
        self.seconds: dict[str, float] = defaultdict(float)  # by model

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
    def attacker(self) -> Attacker:
        limits = self.settings.attacker_tokens, self.settings.max_batch_tokens
        return load_attacker(self.settings.attacker, *limits, **self.how)

    def check(self, models: list[Model], sets: dict, behaviours: list[dict], names: Sequence[str]) -> None:
        """Tries attacker, models and judge, and encodes what models will read: a fault costs no search.
        Where an earlier run has left something to go on with, it has passed."""
        begun = not self.settings.overwrite and (self.run.out / "attacks.jsonl").exists()
        if self.run.gather(begun)[0]:
            return
        if behaviours and any(ATTACKS[name].helper == "attacker" for name in names):
            self.attacker.check(names, [behaviour["prompt"] for behaviour in behaviours])
        for model in models:
            check_victim(self.victim(model), sets, behaviours, names, self.settings)
        self.victim(models[-1]).judged([(sets["direct"][0], {"answer": "No."})])

    def begin(self) -> None:
        """Claims the folder, and reads what an earlier run of the same settings has left (the leader, for all
        processes)."""
        self.run.begin()
        self.known: dict[tuple, dict] = {}
        for file, keys in LOGS.items() if self.run.leader else ():
            for line in resume_log(self.run.out / file):
                self.known[tuple(line[key] for key in keys)] = line

    def attack(self, model: Model, name: str, behaviours: list[dict]) -> list[dict]:
        """Lines of attacks.jsonl. Part by part: each process attacks its share, then the part is saved."""
        key, together = {"model": model.name, "attack": name}, ATTACKS[name].at_once * self.run.size
        together = together or len(behaviours)
        shares = [behaviours[k : k + together] for k in range(0, len(behaviours), together)]
        parts = [(key, share, partial(self._attempts, model, name, share)) for share in shares]
        return self._grow("attacks.jsonl", model, name, parts)

    def _attempts(self, model: Model, name: str, part: list[dict]) -> list[dict]:
        attack, alone = ATTACKS[name], part if self.run.leader else []
        mine = self.run.share(part) if attack.at_once else alone  # one search for all has no shares
        attempts = [Attempt(b, random_numbers(self.settings.seed, f"{name}/{b['id']}")) for b in mine]
        if attempts:  # who has nothing to do loads no model
            helper = getattr(self, attack.helper) if attack.helper else None
            attack.run(self.victim(model), attempts, self.settings, helper)
        lines = [{"id": a.behaviour["id"], "trace": a.trace, "cost": a.cost} for a in attempts]
        return self.run.gather_lists(lines)

    def ask(self, model: Model, tries: Tries) -> list[dict]:
        """Lines of completions.jsonl: what the model answers to all tries, and the judge's verdicts."""
        parts = list[Part]()
        for (name, step), asked in tries.items():
            key = {"model": model.name, "set": name, "step": step}
            parts.append((key, [record for record, _ in asked], partial(self._answers, model, key, asked)))
        return self._grow("completions.jsonl", model, "answers", parts)

    def _answers(self, model: Model, key: dict, asked: list[tuple[dict, dict]]) -> list[dict]:
        numbers = random_numbers(self.settings.seed, f"{key['set']}/{key['step']}")  # the same for all models
        seeded = zip(asked, draw_seeds(numbers, len(asked)), strict=True)
        mine = self.run.share([pair for pair in seeded if "completion" not in pair[0][1]])
        # As above; and what an attack has asked already is not asked again.
        answers = self.victim(model).ask([a for a, _ in mine], [seed for _, seed in mine]) if mine else []
        found, lines = iter(self.run.gather_lists(answers)), []
        for record, attempt in asked:
            line = {name: record[name] for name in COPIED if name in record}
            line |= {name: attempt[name] for name in ("technique", "sent", "opening") if name in attempt}
            lines.append(line | (attempt.get("completion") or next(found)))
        return lines

    def _grow(self, file: str, model: Model, title: str, parts: Sequence[Part]) -> list[dict]:
        """The lines of all parts. One that the file has as a whole is not made again; any other is, and its
        lines are saved: a kill may have left the first of them."""
        began, lines = time.perf_counter(), list[dict]()
        for key, records, make in tqdm(parts, f"{model.name}: {title}", disable=not self.run.leader):
            places = [(*key.values(), record["id"]) for record in records]
            found = self.run.gather([self.known.get(place) for place in places])[0]
            if not all(found):
                found = [key | line for line in make()]
                for place, line in zip(places, found, strict=True):
                    if self.run.leader and place not in self.known:
                        append_jsonl(self.run.out / file, line)
            lines += found
        self.seconds[model.name] += time.perf_counter() - began
        return lines


def check_victim(victim: Victim, sets: dict, behaviours: list[dict], names: Sequence[str], settings) -> None:
    """UserError for what its tokenizer cannot read, for a set of which no prompt fits its context, and where
    no suffix can be searched for."""
    for name, records in sets.items():
        prompts = [victim.encode(record["prompt"]) for record in records]
        if not any(map(victim.fits, prompts)):
            flag = "--max-new-tokens" if victim.reasoning else "answer_tokens"
            given = f"{flag}: given {victim.max_new_tokens}; with it all prompts of {FILES[name]} exceed"
            raise UserError(f"{given} the context of {victim.name}: lower it, or leave the model out")
    first = [record["prompt"] for record in sets["direct"][:8]]
    check_tokenizer(victim.model, victim.tokenizer, first, reasoning=victim.reasoning)
    for behaviour in behaviours:
        for key in ("target", "prefill", "twin"):
            encode_text(victim.tokenizer, behaviour[key])
    if behaviours and victim.reasoning and FORGING & {*names}:
        if victim.tokenizer.unk_token_id in encode_text(victim.tokenizer, settings.forged):
            given = f"forged: given {settings.forged!r}; {victim.name} does not know all of its words"
            raise UserError(f"{given}: write another in the preset")
    if behaviours and CONTROL in names:  # which comes with every search for a suffix
        slots = [Slot(victim, Attempt(b), b["target"], settings) for b in behaviours]
        draw_suffix(slots[0], torch.Generator().manual_seed(0))


def summary(attempts: Sequence[dict], name: str) -> dict[str, Any]:
    """What an attack achieved and cost, from its lines of attacks.jsonl."""
    cost = {key: sum(a["cost"][key] for a in attempts) for key in COSTS}
    tried = [a["trace"] for a in attempts if a["trace"] and a["trace"][0]["loss"] is not None]
    before, after = (sum(t[k]["loss"] for t in tried) / len(tried) if tried else None for k in (0, -1))
    result = {"access": ATTACKS[name].access, "behaviours": len(attempts)}
    return {**result, "loss_before": before, "loss_after": after, **cost}
