"""`Run`: one run of a stage, what its chapter calls. See the door, lib/run/__init__.py."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from lib import UserError
from lib.batches import masked_batch, micro_batches
from lib.chat import set_date
from lib.run.card import describe
from lib.run.checkpoint import PROGRESS, load_progress, save_policy, save_progress
from lib.run.data import NO_SIGNAL, SILENT, groups_to_show, rollout_line, summarise
from lib.run.files import append_jsonl
from lib.run.folder import checksums, claim_folder, date_of_run, stated_reasoning, take_folder
from lib.run.processes import pick_device, start_processes, stop_processes
from lib.run.settings import following
from lib.run.shards import full_weights, gathered
from lib.run.training import load_model, precision, rehearse, set_learning_rate, sum_and_clip

T = TypeVar("T")


class Run:
    """Without `join`, as in tests, a single process that owns no folder yet."""

    model = load_model
    rehearse = rehearse

    def __init__(self, settings: Any, stages: Sequence[str] = ()) -> None:
        self.settings, self.stages, self.out = settings, stages, Path(settings.out)
        self.rank, self.size, self.local_rank = 0, 1, 0
        self.shard = getattr(settings, "shard", False)
        self.resumes = False  # whether OUT holds this very run
        self.state: dict[str, Any] = {}  # of the chapter: kept in resume points; tensors on the leader alone
        self.config: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}  # of this step, by phase
        self.lap_began = time.perf_counter()
        self.rate, self.silent_steps, self.step = 0.0, 0, 0

    # ---- beginning ----

    def join(self) -> None:
        """Meet the other processes, fix the date, lock OUT, and look whether it holds this run or another."""
        settings, stage = self.settings, self.stages[0]
        if stage != "mixture":
            self.rank, self.size, self.local_rank = start_processes(settings, waits=stage == "eval")
        settings.date = self.gather(date_of_run(self.out, settings.date))[0]
        set_date(settings.date)
        if stage == "rl" and stated_reasoning(settings.model) not in (None, settings.reasoning):
            given = "reasoning" if settings.reasoning else "no-reasoning"
            raise UserError(f"--{given}: {settings.model} was trained the other way")
        inputs = settings.inputs()
        self.config = {**asdict(settings), **checksums(*inputs)}
        if self.leader:
            self.resumes = claim_folder(self.out, self.config, overwrite=settings.overwrite, inputs=inputs)
        last = "manifest.json" if stage == "mixture" else "config.json"  # what it writes last
        done = (self.out / last).exists() and not (self.out / PROGRESS).exists()
        if self.gather(self.resumes and done)[0]:
            self.say(f"{self.out} is finished. Next: {following(settings, self.stages)}")
            self.stop()
            raise SystemExit(0)

    def begin(self) -> None:
        """Take OUT for this run: called when all inputs have been read: a mistake costs no earlier run."""
        if self.leader and not self.resumes:
            take_folder(self.out, self.config)
        self.gather(None)  # nobody reads the folder before it is claimed

    @property
    def leader(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @cached_property
    def device(self) -> torch.device:
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
        """Every process's `obj`, in the order of ranks."""
        everyone = [obj] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(everyone, obj)
        return everyone

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
        stop_processes()

    # ---- data and models ----

    def drop_too_long(self, items: Sequence[Any], most: int, what: str) -> list[Any]:
        """Those of `items`, which have `ids` and a `record`, of at most `most` tokens; says what is left out.

        A few long ones must not end a run over a data set (the authors' script drops them, too). UserError
        when less than half is left: then the limit is wrong.
        """
        kept = [item for item in items if len(item.ids) <= most]
        if long := [f"{item.record['id']} ({len(item.ids)})" for item in items if len(item.ids) > most]:
            found = f"{len(long)} of {len(items)} have more than the {most} tokens that fit"
            text = f"{what}: {found}, such as {', '.join(long[:3])}"
            if len(long) > len(kept):
                raise UserError(f"{text}: shorten them, or change a limit")
            self.say(f"{text}: left out")
        return kept

    def rounds(self, lengths: Sequence[int], most: int) -> list[list[int]]:
        """Sequences by micro-batch; under shards with empty ones behind, as many on each process."""
        batches = micro_batches(lengths, most)
        rounds = max(self.gather(len(batches))) if self.shard else len(batches)
        return batches + [[]] * (rounds - len(batches))

    def micro_batches(
        self, items: Sequence[Any], pad_id: int, most: int, share: bool = False
    ) -> Iterator[tuple[list[Any], Any, Any, Any]]:
        """`items`, which have `ids` and a `mask` of what is learned, in batches of at most `most` tokens.

        Each comes with its tensors on the device: ids (B, T) int64, padded on the right, attention_mask and
        completion_mask (B, T) bool. With `share` the items are those of all processes, and this one takes its
        part. Under shards a process that has no batch left gets an empty completion_mask.
        """
        mine = items[self.rank :: self.size] if share else items
        for indices in self.rounds([len(item.ids) for item in mine], most):
            batch = [mine[i] for i in indices] or [items[0]]
            rows, masks = [item.ids for item in batch], [item.mask for item in batch]
            ids, attention_mask, completion_mask = masked_batch(rows, masks, pad_id, self.device)
            yield batch, ids, attention_mask, completion_mask & bool(indices)

    @contextlib.contextmanager
    def sampling(self, policy: Any) -> Iterator[None]:
        """Shards are gathered while it lasts: each process may sample. Broken logits end the run."""
        with precision(self.device, self.settings.dtype), gathered(policy):
            try:
                yield
            except FloatingPointError as error:
                kept = "the last checkpoint is kept: lower --learning-rate, or try another --model"
                raise UserError(f"step {self.step}: {error}; {kept}") from error

    def weights(self, model: Any) -> dict[str, Any]:
        """A copy of all weights on the CPU, for the leader; all processes have to call it."""
        return {name: weight.clone() for name, weight in full_weights(model).items()}

    @property
    def adamw(self) -> dict[str, Any]:
        """Of the optimizer: peak rate, epsilon, weight decay."""
        settings = self.settings
        return {"lr": settings.learning_rate, "eps": settings.adam_eps, "weight_decay": settings.weight_decay}

    # ---- an update ----

    def backward(self, loss: Any) -> None:
        """Add the gradient of a loss whose sum over all processes is meant."""
        (loss * self.size if self.shard else loss).backward()  # shards get the mean of all processes

    def clip_and_step(self, optimizer: Any, loss: float) -> float:
        """Sum gradients over processes, clip their L2 norm, take the step. Returns the norm before clipping.

        Raises UserError instead of a step if `loss` or the norm is not finite: the weights would be ruined.
        """
        norm = sum_and_clip(optimizer, self.settings.max_grad_norm, self.size, self.shard)
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                kept = f"stopped before the update; the last checkpoint in {self.out} is kept"
                what = "lower --learning-rate, or look at the last lines of metrics.jsonl"
                raise UserError(f"step {self.step}: {name} is {value}, {kept}: {what}")
        optimizer.step()
        optimizer.zero_grad()  # not only before the next gradient: sampling needs the memory
        return norm

    def steps(self, total: int, policy: Any, optimizer: Any, name: str = "step") -> Iterator[int]:
        """The steps that are left of `total`: from 0, or from where a killed run of the same settings was."""
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
        settings, described = self.settings, self.gather_lists([rollout_line(r, step) for r in rollouts])
        line: dict[str, Any] = {"step": step}
        if described:
            size = settings.group_size
            line |= summarise(described, size, getattr(settings, "one_reward", False), self.seconds)
            silent = line["zero_advantage_groups"] * size == len(described)
            self.silent_steps = self.silent_steps + 1 if silent else 0
        line |= {**metrics, "learning_rate": self.rate}
        if not self.leader:
            return
        values = {key: line.get(key) for key in ("reward", "format_rate", "kl", "loss")}
        self.bar.set_postfix({key: f"{value:.2f}" for key, value in values.items() if value is not None})
        if self.silent_steps == SILENT:
            known = ", ".join(f"{key} {line[key]}" for key in ("reward", "format_rate", "unknown_verdicts"))
            self.bar.write(NO_SIGNAL.format(known))
        append_jsonl(self.out / "metrics.jsonl", line)
        if described and step % settings.rollouts_every == 0:
            for rollout in groups_to_show(described, settings.group_size):
                append_jsonl(self.out / "rollouts.jsonl", rollout)

    # ---- the end ----

    def finish(self, policy: Any, tokenizer: Any, draw: Callable[[Path, Path], None]) -> None:
        """Write the checkpoint (`state["best"]`, if a chapter kept weights there) and say what comes next.

        draw(metrics.jsonl, curves.png) draws learning curves.
        """
        weights = full_weights(policy)
        if self.leader:
            save_policy(policy, tokenizer, self.out, self.state.get("best") or weights)
            describe(self.out, tokenizer, self.config)
            draw(self.out / "metrics.jsonl", self.out / "curves.png")
            (self.out / PROGRESS).unlink(missing_ok=True)  # from now on it is a checkpoint like any other
        self.say(f"wrote {self.out}. Next: {following(self.settings, self.stages)}")
        self.stop()
