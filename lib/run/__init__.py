"""The plumbing of all chapters behind one object, `run`: what is not a chapter's lesson.

    settings, run = start(Settings, "rl")    flags and preset; OUT claimed or resumed; processes, device
    run.model(path)                          loaded, maybe in shards, maybe recomputing activations
    run.share(items), gather(x), total(x)    this process's part; lists and sums over all processes
    run.micro_batches(items, ...)            padded tensors under a budget of tokens
    run.backward(loss)                       the gradient of a loss whose sum over all processes is meant
    run.clip_and_step(optimizer, loss)       summed over processes, clipped; stops at what is not finite
    run.steps(total, policy, optimizer)      the loop: resumes, sets the rate, shows a bar, saves
    run.log(step, metrics, rollouts)         metrics.jsonl, rollouts.jsonl
    run.finish(policy, tokenizer)            the checkpoint, and the next command

On one device each is a line or nothing. You may skip this room: a chapter reads the same without it. Inside:
settings and presets (one module a preset), folder (claims, locks), files (atomic writes, logs), text, hub and
checks (opening a model), processes and shards (several GPUs), training (rate, rehearsal), state (resuming),
logs, checkpoint and card, command (ends in one line). Tests: tests/test_run.py, and runs of whole stages in
tests/test_rl.py and tests/test_sft.py.

Nothing here imports torch before it is needed: parsing a command line takes no second.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from lib import UserError
from lib.run.command import run_main
from lib.run.files import append_jsonl
from lib.run.folder import checksums, claim_folder, date_of_run, stated_reasoning
from lib.run.settings import following, parse_settings

__all__ = ["Run", "run_main", "start"]
T = TypeVar("T")
S = TypeVar("S")
WEEK = 7 * 24 * 3600  # seconds; in stage 4 one process may search alone while the others wait


def start(cls: type[S], *stages: str, argv: Sequence[str] | None = None) -> tuple[S, Run]:
    """The settings of a stage, and its run: what can be refused is refused here, before anything is loaded.

    `stages` are those of `parse_settings`. A run that is finished says so, and ends. Raises UserError.
    """
    settings = parse_settings(cls, *stages, argv=argv)
    run = Run(settings, stages)
    run.join()
    return settings, run


class Run:
    """One run of a stage. Without `join`, as in tests, a single process that owns no folder yet."""

    def __init__(self, settings: Any, stages: Sequence[str] = ()) -> None:
        self.settings, self.stages, self.out = settings, stages, Path(settings.out)
        self.rank, self.size, self.local_rank = 0, 1, 0
        self.shard = getattr(settings, "shard", False)
        self.state: dict[str, Any] = {}  # of the chapter: kept in resume points; tensors on the leader alone
        self.config: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}  # of this step, by phase
        self.lap_began = time.perf_counter()
        self.rate, self.silent_steps, self.step = 0.0, 0, 0

    # ---- beginning ----

    def join(self) -> None:
        """Meet the other processes, fix the date, lock OUT, and look whether it holds this run or another."""
        settings = self.settings
        if self.stages[0] != "mixture":
            from lib.chat import set_date
            from lib.run.processes import check_processes, start_processes

            timeout = WEEK if self.stages[0] == "eval" else 7200
            self.rank, self.size, self.local_rank = start_processes(settings.device, timeout)
            check_processes(settings, self.size)
            settings.date = self.gather(date_of_run(self.out, settings.date))[0]
            set_date(settings.date)
        else:
            settings.date = date_of_run(self.out, settings.date)
        if self.stages[0] == "rl" and stated_reasoning(settings.model) not in (None, settings.reasoning):
            given = "reasoning" if settings.reasoning else "no-reasoning"
            raise UserError(f"--{given}: {settings.model} was trained the other way")
        self.config = {**asdict(settings), **checksums(*settings.inputs())}
        same = self.leader and self._claim(begin=False)
        last = "manifest.json" if self.stages[0] == "mixture" else "config.json"  # what it writes last
        done = (self.out / last).exists() and not (self.out / "state").exists()
        if self.gather(same and done)[0]:
            self.say(f"{self.out} is finished. Next: {following(settings, self.stages)}")
            self.stop()
            raise SystemExit(0)

    def begin(self) -> None:
        """Take OUT for this run: called when all inputs have been read: a mistake costs no earlier run."""
        if self.leader:
            self._claim(begin=True)
        self.gather(None)  # nobody reads the folder before it is claimed

    def _claim(self, begin: bool) -> bool:
        overwrite, inputs = self.settings.overwrite, self.settings.inputs()
        return claim_folder(self.settings.out, self.config, overwrite=overwrite, inputs=inputs, begin=begin)

    @property
    def leader(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @cached_property
    def device(self) -> Any:
        from lib.run.processes import pick_device

        return pick_device(self.settings.device, self.local_rank)

    def say(self, text: str) -> None:
        if self.leader:
            print(text, flush=True)

    # ---- processes ----

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of `items`, a block: the blocks of all ranks, one after the other, are all."""
        first, last = (len(items) * rank // self.size for rank in (self.rank, self.rank + 1))
        return items[first:last]

    def gather(self, obj: Any) -> list[Any]:
        """Every process's `obj`, in the order of ranks.

        Objects travel as JSON even where there is but one process, so that nothing depends on their number:
        tuples arrive as lists, keys as text.
        """
        text = json.dumps(obj)
        if self.size == 1:
            return [json.loads(text)]
        from lib.run.processes import gather_texts

        return [json.loads(theirs) for theirs in gather_texts(text, self.size)]

    def gather_lists(self, items: Sequence[Any]) -> list[Any]:
        """The lists of all processes, one after the other: what `share` took apart."""
        return [item for part in self.gather(list(items)) for item in part]

    def total(self, x: Any) -> Any:
        """The sum over all processes of a number, or of each number in a dict."""
        everyone = self.gather(x)
        if isinstance(x, dict):
            return {key: sum(part[key] for part in everyone) for key in x}
        return sum(everyone)

    def stop(self) -> None:
        from lib.run.processes import stop_processes

        stop_processes()

    # ---- models ----

    def model(self, path: str, *, frozen: bool = False) -> Any:
        """The policy, or a frozen reference: fp32 weights; see `lib.run.training.load_model`."""
        from lib.run.training import load_model

        return load_model(path, self.settings, self.device, self.size, frozen=frozen)

    def rehearse(self, policy: Any, reference: Any, rows: int, longest: int, prompt_tokens: int) -> None:
        """Compute the largest batch there may be, and forget it: what does not fit memory ends here, before
        step 1.

        rows: sequences of an update, on this process; longest: tokens of the longest; prompt_tokens: of its
        prompt.
        """
        from lib.run.training import rehearse

        rehearse(self, policy, reference, rows, longest, prompt_tokens)

    def rounds(self, lengths: Sequence[int], most: int) -> list[list[int]]:
        """Sequences by micro-batch; under shards with empty ones behind, as many on each process."""
        from lib.batches import micro_batches

        batches = micro_batches(lengths, most)
        rounds = max(self.gather(len(batches))) if self.shard else len(batches)
        return batches + [[]] * (rounds - len(batches))

    def micro_batches(
        self, items: Sequence[Any], pad_id: int, most: int, share: bool = False
    ) -> Iterator[tuple[list[Any], Any, Any, Any]]:
        """`items`, which have `ids` and a `mask` of what is learned, in batches of at most `most` tokens.

        Each comes with its tensors on the device: ids (B, T) int64, padded on the right, attention_mask and
        completion_mask (B, T) bool. With `share` the items are those of all processes, and this one takes its
        part. Under shards all processes pass equally often; one that has no batch left gets an empty
        completion_mask.
        """
        from lib.batches import masked_batch

        mine = items[self.rank :: self.size] if share else items
        for indices in self.rounds([len(item.ids) for item in mine], most):
            batch = [mine[i] for i in indices] or [items[0]]
            rows, masks = [item.ids for item in batch], [item.mask for item in batch]
            ids, attention_mask, completion_mask = masked_batch(rows, masks, pad_id, self.device)
            yield batch, ids, attention_mask, completion_mask & bool(indices)

    @contextlib.contextmanager
    def sampling(self, policy: Any) -> Iterator[None]:
        """Shards are gathered while it lasts: each process may sample. Broken logits end the run."""
        from lib.run.shards import gathered
        from lib.run.training import precision

        with precision(self.device, self.settings.dtype), gathered(policy):
            try:
                yield
            except FloatingPointError as error:
                kept = "the last checkpoint is kept: lower --learning-rate, or try another --model"
                raise UserError(f"step {self.step}: {error}; {kept}") from error

    def weights(self, model: Any) -> dict[str, Any]:
        """A copy of all weights on the CPU, for the leader; all processes have to call it."""
        from lib.run.shards import full_weights

        return {name: weight.clone() for name, weight in full_weights(model).items()}

    @property
    def adamw(self) -> dict[str, Any]:
        """Of the optimizer: peak rate, epsilon, weight decay."""
        settings = self.settings
        return {"lr": settings.learning_rate, "eps": settings.adam_eps, "weight_decay": settings.weight_decay}

    # ---- an update ----

    def backward(self, loss: Any) -> None:
        """Add the gradient of a loss whose sum over all processes is meant."""
        from lib.run.processes import lost_process

        with lost_process("gloo", "NCCL", "Connection"):
            (loss * self.size if self.shard else loss).backward()  # shards get the mean of all processes

    def clip_and_step(self, optimizer: Any, loss: float) -> float:
        """Sum the gradients over processes, clip their L2 norm, take the step. Returns the norm before
        clipping.

        Raises UserError instead of a step if `loss` or the norm is not finite: the weights would be ruined.
        """
        from lib.run.training import finite_or_stop, sum_and_clip

        norm = sum_and_clip(optimizer, self.settings.max_grad_norm, self.size, self.shard)
        for name, value in (("loss", loss), ("gradient norm", norm)):
            finite_or_stop(f"step {self.step}: {name}", value, self.out)
        optimizer.step()
        optimizer.zero_grad()  # not only before the next gradient: sampling needs the memory
        return norm

    def steps(self, total: int, policy: Any, optimizer: Any, name: str = "step") -> Iterator[int]:
        """The steps that are left of `total`: from 0, or from where a killed run of the same settings was."""
        from tqdm import tqdm

        from lib.run.state import load_progress, save_progress
        from lib.run.training import set_learning_rate

        self.begin()
        first = load_progress(self, policy, optimizer)
        self.say(f"{total - first} of {total} steps on {self.size} x {self.device}; writing to {self.out}")
        with tqdm(range(first, total), name, total, initial=first, disable=not self.leader) as self.bar:
            for step in self.bar:
                self.rate = set_learning_rate(optimizer, self.settings, step, total)
                self.step, self.seconds, self.lap_began = step, {}, time.perf_counter()
                yield step
                if (step + 1) % self.settings.save_every == 0:
                    save_progress(self, step + 1, policy, optimizer)

    def lap(self, name: str) -> None:
        """Book the time since the last call, or the step's begin, under `name`."""
        now = time.perf_counter()
        self.seconds[name], self.lap_began = now - self.lap_began, now

    def log(self, step: int, metrics: dict[str, Any], rollouts: Sequence[Any] = ()) -> None:
        """A line for metrics.jsonl; now and then groups of `rollouts`, this process's, for rollouts.jsonl."""
        from lib.run.logs import describe, groups_to_show, no_signal, speed, summarise

        settings, described = self.settings, self.gather_lists([describe(r, step) for r in rollouts])
        line: dict[str, Any] = {"step": step}
        if described:
            line |= summarise(described, settings.group_size, getattr(settings, "one_reward", False))
            metrics = metrics | speed(described, self.seconds)
            silent = line["zero_advantage_groups"] * settings.group_size == len(described)
            self.silent_steps = self.silent_steps + 1 if silent else 0
        line |= {**metrics, "learning_rate": self.rate}
        if not self.leader:
            return
        shown = {
            key: line[key] for key in ("reward", "format_rate", "kl", "loss") if line.get(key) is not None
        }
        self.bar.set_postfix({key: f"{value:.2f}" for key, value in shown.items()})
        if warning := no_signal(line, self.silent_steps):
            self.bar.write(warning)
        append_jsonl(self.out / "metrics.jsonl", line)
        if described and step % settings.rollouts_every == 0:
            for rollout in groups_to_show(described, settings.group_size):
                append_jsonl(self.out / "rollouts.jsonl", rollout)

    def drop_too_long(self, items: Sequence[Any], most: int, budget: int, what: str) -> list[Any]:
        """Those of `items`, which have `ids` and a `record`, that have at most `most` tokens; says what is
        left out.

        A few long ones must not end a run over a data set (the authors' script drops them, too). Raises
        UserError when less than half is left: then the limit is wrong. And when one that is kept exceeds
        `budget`, which says how to compute: a run may go on with another, so it must not decide what is
        learned from.
        """
        long = [f"{item.record['id']} ({len(item.ids)})" for item in items if len(item.ids) > most]
        names = ", ".join(long[:3])
        text = (
            f"{what}: {len(long)} of {len(items)} have more than the {most} tokens that fit, such as {names}"
        )
        if 2 * len(long) > len(items):
            raise UserError(f"{text}: shorten them, or change a limit")
        if long:
            self.say(f"{text}: left out")
        kept = [item for item in items if len(item.ids) <= most]
        longest = max(kept, key=lambda item: len(item.ids))
        if len(longest.ids) > budget:
            name, tokens = longest.record["id"], len(longest.ids)
            raise UserError(
                f"{what}: {name} has {tokens} tokens, but only {budget} fit a batch: "
                "raise --max-batch-tokens (stage 3: and --max-sample-tokens), or shorten it"
            )
        return kept

    # ---- the end ----

    def finish(self, policy: Any, tokenizer: Any, draw: Callable[[Path, Path], None] | None = None) -> None:
        """Write the checkpoint (`state["best"]`, if a chapter kept weights there) and say what comes next.

        draw(metrics.jsonl, curves.png) draws learning curves.
        """
        from lib.run.card import describe
        from lib.run.checkpoint import save_policy
        from lib.run.shards import full_weights
        from lib.run.state import drop_progress

        weights = full_weights(policy)
        if self.leader:
            save_policy(policy, tokenizer, self.out, self.state.get("best") or weights)
            describe(self.out, tokenizer, self.config)
            if draw:
                draw(self.out / "metrics.jsonl", self.out / "curves.png")
            drop_progress(self.out)
        self.say(f"wrote {self.out}. Next: {following(self.settings, self.stages)}")
        self.stop()
