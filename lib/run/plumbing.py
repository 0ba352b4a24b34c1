"""`Run`: one run of a stage, what its chapter calls. See the door, lib/run/__init__.py."""

from __future__ import annotations

import contextlib
import datetime
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from lib import UserError
from lib.batches import masked_batch, micro_batches
from lib.chat import set_date
from lib.policy import shares_prompts, token_logprobs
from lib.run.checkpoint import PROGRESS, describe, load_progress, save_policy, save_progress
from lib.run.data import NO_SIGNAL, SILENT, groups_to_show, rollout_line, summarise
from lib.run.files import append_jsonl, read_log, sha256_file
from lib.run.folder import checksums, claim_folder, read_settings, take_folder
from lib.run.hub import check_ids, check_tokenizer, load_policy
from lib.run.processes import (
    full_weights,
    gathered,
    pick_device,
    shard_model,
    start_processes,
    stop_processes,
)
from lib.run.settings import following
from lib.run.text import visible

T = TypeVar("T")
CPU_SAMPLE_TOKENS = 65536  # the sampler's budget where memory cannot be asked


class Run:
    """Without `join`, as in tests, a single process that owns no folder yet."""

    def __init__(self, settings: Any, stages: Sequence[str] = ()) -> None:
        self.settings, self.stages, self.out = settings, stages, Path(settings.out)
        self.rank, self.size, self.local_rank = 0, 1, 0
        self.shard = getattr(settings, "shard", False)
        self.shares_prompts = True  # until a model is loaded that cannot: see lib/policy.py
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
        known = settings.date or read_settings(self.out).get("date")  # chat templates may tell it
        settings.date = self.gather(known or datetime.date.today().isoformat())[0]
        set_date(settings.date)
        if stage == "rl" and read_settings(settings.model).get("reasoning") not in (None, settings.reasoning):
            given = "reasoning" if settings.reasoning else "no-reasoning"
            raise UserError(f"--{given}: {settings.model} was trained the other way")
        inputs = settings.inputs()
        keys = ("judge", "refusals", "attacker", "rainbow_judge", "rainbow_attacker")
        named = "+".join(getattr(settings, key, "") for key in keys).split("+")
        modules = [f"{name.replace('.', '/')}.py" for name in named]  # those of yours, if they are files here
        models = filter(None, (name.rpartition("=")[2].partition("@")[0] for name in named))  # grm=MODEL@cuda
        self.config = {**asdict(settings), **checksums(*inputs, *modules, *models)}
        if code := getattr(sys.modules[type(settings).__module__], "__file__", None):  # of the command itself
            self.config[f"sha256 of {Path(code).name}"] = sha256_file(code)[:32]
        if self.leader:
            self.resumes = claim_folder(self.out, self.config, overwrite=settings.overwrite, inputs=inputs)
        last = "manifest.json" if stage == "mixture" else "README.md"  # what it writes last
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

    def usable(self, items: Sequence[Any], model: Any, tokenizer: Any, most: int, what: str) -> list[Any]:
        """Those of `items`, which have `ids` and a `record`, of at most `most` tokens; says what is left out.

        A few long ones must not end a run over a data set (the authors' script drops them, too). UserError
        when less than half is left: then the limit is wrong; or when model and tokenizer do not fit the data.
        """
        prompts = [item.record["prompt"] for item in items[:8]]
        check_tokenizer(model, tokenizer, prompts, reasoning=self.settings.reasoning)
        for item in items:
            check_ids(model, item.ids, f"{what}: {item.record['id']}")
        kept = [item for item in items if len(item.ids) <= most]
        if long := [f"{item.record['id']} ({len(item.ids)})" for item in items if len(item.ids) > most]:
            found = f"{len(long)} of {len(items)} have more than the {most} tokens that fit"
            text = f"{what}: {found}, such as {', '.join(long[:3])}"
            if len(long) > len(kept):
                raise UserError(f"{text}: shorten them, or change a limit")
            self.say(f"{text}: left out")
        return kept

    def rounds(self, lengths: Sequence[int], most: int, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Sequences by micro-batch; under shards with empty ones behind, as many on each process."""
        batches = micro_batches(lengths, most, prompts if self.shares_prompts else None)
        rounds = max(self.gather(len(batches))) if self.shard else len(batches)
        return batches + [[]] * (rounds - len(batches))

    def micro_batches(
        self, items: Sequence[Any], pad_id: int, most: int, share: bool = False
    ) -> Iterator[tuple[list[Any], Any, Any, Any]]:
        """`items`, which have `ids` and a `mask` of what is learned, in batches, those of a prompt together,
        and computed once, of at most `most` tokens that are computed.

        Each with its tensors on the device: ids (B, T) int64, padded on the right, attention_mask and
        completion_mask (B, T) bool. With `share` this process takes its part of the items. Under shards one
        that has no batch left gets an empty completion_mask.
        """
        mine = items[self.rank :: self.size] if share else items
        prompts = [item.ids[: item.mask.index(True)] for item in mine]
        for indices in self.rounds([len(item.ids) for item in mine], most, prompts):
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

    def model(self, path: str, *, frozen: bool = False) -> PreTrainedModel:
        """The model in `path` to train, or a frozen reference; fp32 weights, log-probabilities in --dtype.

        With --shard it is read on the CPU, and this process's part of it stays: load one after the other.
        """
        settings, device = self.settings, self.device
        half, shard = settings.dtype == "bfloat16", settings.shard
        model = load_policy(
            path,
            device="cpu" if shard else device,
            dtype=settings.dtype if shard and frozen else "float32",
            gradient_checkpointing=settings.gradient_checkpointing and not frozen,
        )
        model.requires_grad_(not frozen)
        if shard:
            shard_model(model, device, self.size, settings.dtype, settings.offload)
        elif half and frozen:
            halve_linear_layers(model)
        if half:
            inner = getattr(model, "within_forward", None) or (lambda function, *args: function(model, *args))
            # what `lib.policy.token_logprobs` calls
            model.within_forward = precision(device, "bfloat16")(inner)  # type: ignore[assignment]
        if self.shares_prompts and not shares_prompts(model):
            self.shares_prompts = False
            self.say(f"{path}: its attention has windows, or is not SDPA: each row computes its prompt anew")
        return model

    def rehearse(
        self,
        policy: PreTrainedModel,
        reference: PreTrainedModel | None,
        rows: int,
        longest: int,
        together: int = 1,
    ) -> None:
        """Compute the largest micro-batch there may be, with room taken for the optimizer and the key-value
        cache, and forget it: what does not fit memory, or a budget of tokens, ends here, before step 1.

        Call it before the optimizer has its state. rows: sequences of an update, on this process; longest:
        tokens of the longest; together: sequences that a micro-batch never parts.
        """
        settings = self.settings
        tokens = min(settings.max_batch_tokens, rows * longest)  # a budget beyond all rows is never used
        self.say(f"rehearsing the largest batch: {tokens} tokens")
        own = sum(p.numel() for p in policy.parameters()) // (self.size if self.shard else 1)
        moments = torch.empty(8 * own, dtype=torch.uint8, device="cpu" if settings.offload else self.device)
        if reference is not None:
            with self.sampling(policy):
                room_of_cache(policy, rows * longest, settings, self.device)
        for name, least in (("max_batch_tokens", together * longest), ("max_sample_tokens", longest)):
            if least > (most := getattr(settings, name, least)):
                flag = f"--{name.replace('_', '-')} {most}"
                found = f"a sequence may have {longest} tokens, and {least} must fit"
                raise UserError(f"{flag}: {found}: raise it to {least} or more")
        height = -(-tokens // longest)  # the longest rows might leave some of the budget unused
        width = tokens // height
        # No row begins as the one above: no token is spared.
        ids = torch.arange(height, device=self.device)[:, None].repeat(1, width) % 2
        seen = torch.ones_like(ids, dtype=torch.bool)
        learned = seen.cumsum(1) > 1
        both: Any = {"with_entropy": True, "entropy_gradient": getattr(settings, "entropy_coef", 0) > 0}
        logprobs, entropy = token_logprobs(policy, ids, seen, learned, **both)
        if reference is not None:
            with torch.no_grad():
                token_logprobs(reference, ids, seen, learned)
        self.backward(0.0 * (logprobs + entropy).sum())
        policy.zero_grad(set_to_none=True)
        del moments

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

        What DistributedDataParallel does, by hand: that sums in every backward pass, so all processes would
        need equally many micro-batches, and takes the mean. Here each scales its loss by the count over all
        of them. Raises UserError instead of a step if `loss` or the norm is not finite.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in parameters if self.size > 1 and not self.shard else ():  # shards have summed theirs
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
        found: Any = torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm or math.inf)
        norm = (found.full_tensor() if hasattr(found, "full_tensor") else found).item()
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
        where = f"on {self.size} x {self.device}, saved to {self.out} every {self.settings.save_every} steps"
        self.say(f"from step {first} of {total}, {where}")
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
            line |= summarise(described, settings.group_size, self.seconds)
            silent = line["zero_advantage_groups"] * settings.group_size == len(described)
            self.silent_steps = self.silent_steps + 1 if silent else 0
        line |= {**metrics, "learning_rate": self.rate}
        if not self.leader:
            return
        values = {key: line.get(key) for key in ("reward", "format_rate", "kl", "loss")}
        self.bar.set_postfix({key: f"{value:.2f}" for key, value in values.items() if value is not None})
        if self.silent_steps == SILENT:
            self.bar.write(NO_SIGNAL)
        append_jsonl(self.out / "metrics.jsonl", line)
        if described and step % settings.rollouts_every == 0:
            for rollout in groups_to_show(described, settings.group_size):
                append_jsonl(self.out / "rollouts.jsonl", rollout)

    # ---- the end ----

    def finish(self, policy: Any, tokenizer: Any, draw: Callable[[Path, Path], None]) -> None:
        """Write the checkpoint (`state["best"]`, if a chapter kept weights there) and say what comes next."""
        weights = full_weights(policy)
        if self.leader:
            save_policy(policy, tokenizer, self.out, self.state.get("best") or weights)
            draw(self.out / "metrics.jsonl", self.out / "curves.png")
            describe(self.out, tokenizer, self.config)  # its last file says that the run is finished
            for path in self.out.glob(f"*{PROGRESS}*"):  # from now on it is a checkpoint like any other
                path.unlink()
            for line in read_log(self.out / "rollouts.jsonl")[-1:]:
                prompt, text = (" ".join(visible(line[key]).split()) for key in ("prompt", "completion"))
                self.say(f"a sample: {prompt} => {text} (reward {line['reward']})")
            if (curves := self.out / "curves.png").exists():  # where matplotlib is
                self.say(f"its curves: {curves}")
        self.say(f"to talk to it: python -m lib.tools.chat {shlex.quote(str(self.out))}")
        self.say(f"wrote {self.out}. Next: {following(self.settings, self.stages)}")
        self.stop()


def precision(device: torch.device, dtype: str) -> torch.autocast:
    """A context to compute in: bfloat16 over fp32 weights, or fp32 as it is.

    In bfloat16 the weights themselves would have 8 bits of precision, and an update of 1e-6 on a weight of
    0.02 would be rounded away: training would run, and change nothing.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def halve_linear_layers(model: torch.nn.Module) -> None:
    """Keep in bfloat16 what autocast would cast anyway: a frozen reference takes half as much, and computes
    to the bit what the policy of equal weights does, so KL begins at 0. (In shards all of it is bfloat16.)"""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and id(module.weight) not in embeddings:  # a tied head stays
            module.to(torch.bfloat16)


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: Any, step: int, total: int) -> float:
    """Linear warm-up, then constant, or with `decay` linear to zero at `total`. Returns the rate."""
    warmup = settings.warmup_steps
    rate = settings.learning_rate * min(1.0, (step + 1) / max(1, warmup))
    if settings.decay and step >= warmup:
        rate = settings.learning_rate * (total - step) / max(1, total - warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


@torch.no_grad()
def room_of_cache(model: PreTrainedModel, most: int, settings: Any, device: torch.device) -> Tensor:
    """Memory of the sampler's key-value cache, and of one layer more while it is repacked; taken, not used.

    Where the budget is 0 it becomes what fits beside all that is loaded: of a GPU's free memory 3/4, since
    reading prompts, and logits, take some. `most` tokens are never exceeded. (In bfloat16 autocast keeps a
    copy of each weight while it computes: the pass below has made them.)
    """
    cache: Any = DynamicCache()
    model(input_ids=torch.ones(1, 1, dtype=torch.long, device=device), cache=cache, use_cache=True)
    layers = cache.layers
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) * (len(layers) + 1) // len(layers)
    if settings.max_sample_tokens == 0 and device.type == "cuda":
        torch.cuda.empty_cache()
        settings.max_sample_tokens = max(1, torch.cuda.mem_get_info(device)[0] * 3 // 4 // size)
    settings.max_sample_tokens = settings.max_sample_tokens or CPU_SAMPLE_TOKENS
    tokens = min(settings.max_sample_tokens, most)
    return torch.empty(size * tokens, dtype=torch.uint8, device=device)
