r"""Chapter 2: a light warm start, pi_base -> pi_SFT (paper section 4.1, stage I).

Before RL can reward good reasoning, the model has to reason at all: it learns the format `<think> z </think> y` from about
a thousand harmful prompts with a few traces each. Two things matter more than the loss:

1. **Light**: a low learning rate, few epochs, an early stop. RL chooses among samples, so the samples must stay diverse
   (finding F5: `--learning-rate` x 3, twice the `--epochs` and `--held-out-share 0`, no early stop, is "heavy", and ends in
   a worse frontier).
2. **Imperfect traces are fine**: some comply where they should not. RL sorts that out; variety is what it needs.

The loss is the negative log-likelihood of reasoning and answer, markers included; the prompt carries none.
`--no-reasoning` drops the traces and learns the answers alone: the start of the baseline "RL without reasoning".

    python 02_sft_warmstart.py --preset sandbox --data runs/demo/data --out runs/demo/sft
    torchrun --nproc-per-node 4 02_sft_warmstart.py --preset paper --data runs/paper/data0 --out runs/paper/sft

The paper's comparison "SFT" is this stage once more, from pi_SFT and on 8 traces for each RL prompt (01's `--rl-traces 8`):

    python 02_sft_warmstart.py --preset paper --traces sft_rl.jsonl --model runs/paper/sft --learning-rate 3e-4 --epochs 3 \
        --data FOLDER-THAT-HAS-THEM --out runs/paper/sft-8

Reads DATA/TRACES. Writes an ordinary Hugging Face checkpoint, metrics.jsonl and settings.json to OUT. A killed run goes on
when the same command is run again.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from lib import UserError
from lib.batches import drop_too_long, epoch_order, masked_batch, micro_batches
from lib.chat import encode_example, set_date
from lib.policy import context_of, token_logprobs
from lib.run.checkpoint import save_policy
from lib.run.checks import check_ids, check_tokenizer
from lib.run.files import append_jsonl, read_jsonl
from lib.run.folder import checksums, claim_folder, date_of_run
from lib.run.hub import load_tokenizer
from lib.run.plan import Need
from lib.run.processes import Processes, gather_objects, pick_device, start_processes, stop_processes
from lib.run.rehearsal import HELP_HERE, plan, rehearse
from lib.run.settings import (
    LAST_SEED,
    TOKENS,
    beside,
    model_and_out,
    next_command,
    parse_settings,
    run_main,
    setting,
)
from lib.run.shards import backward, check_shards, device_of, even_rounds, full_weights, sum_and_clip
from lib.run.state import finish, is_finished, load_progress, save_progress
from lib.run.training import finite_or_stop, load_model, precision, set_learning_rate
from lib.sources import same_prompt


@dataclass
class Settings:
    """Every setting of this stage. Defaults come from the preset."""

    preset: str = setting("sandbox", "where the defaults come from: sandbox, smollm or paper")
    data: str = setting("runs/demo/data", "folder that 01_build_mixture.py wrote")
    traces: str = setting(
        "sft.jsonl", "file in DATA to learn from; sft_rl.jsonl: the traces of the RL prompts"
    )
    model: str = setting(
        "lib/sandbox/base", "pi_base: a folder or a hub name. Paper: Qwen/Qwen2.5-1.5B-Instruct"
    )
    out: str = setting("runs/demo/sft", "folder for the checkpoint and its logs")
    overwrite: bool = setting(False, "empty OUT first if it holds a run with other settings")
    reasoning: bool = setting(
        True, "learn reasoning and answer; --no-reasoning: the answer alone (baseline of the paper)"
    )
    learning_rate: float = setting(
        3e-5, "peak rate of AdamW. Paper: 3e-5 (light), 1e-4 (heavy)", low=0.0, high=1.0
    )
    epochs: int = setting(3, "passes over the traces. Paper: 3 (light), 6 (heavy)", low=1, high=1000)
    batch_size: int = setting(16, "traces per update, over all processes. Paper: 16", low=1, high=10_000)
    warmup_steps: int = setting(10, "updates of linear warm-up", low=0)
    decay: bool = setting(True, "after the warm-up, decay the rate linearly to zero")
    weight_decay: float = setting(0.0, "weight decay of AdamW", low=0.0, high=100.0)
    adam_eps: float = setting(
        1e-8, "epsilon of AdamW; larger, weights with tiny gradients hold still", low=1e-16, high=1.0
    )
    max_grad_norm: float = setting(1.0, "gradient clipping, L2 norm", low=0.0)
    held_out_share: float = setting(
        0.05, "share of the prompts held out to decide the early stop", low=0.0, high=0.5
    )
    patience: int = setting(
        1, "stop after this many epochs without a better held-out loss; the best weights are kept", low=1
    )
    max_batch_tokens: int = setting(
        16384, "tokens (padding too) of a micro-batch: lower it when out of memory", low=16, high=TOKENS
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, slower"
    )
    shard: bool = setting(
        False, "with torchrun: each process keeps a part of the model (FSDP2), for one that fits no GPU"
    )
    offload: bool = setting(
        False, "with --shard: keep the shards of weights and optimizer in the CPU's memory"
    )
    save_every: int = setting(50, "updates between resume points", low=1)
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = setting(
        "float32", "to compute in, the weights stay float32. Paper: bfloat16", choices=("float32", "bfloat16")
    )
    seed: int = setting(0, "of the held-out split and the data order", low=0, high=LAST_SEED)
    date: str = setting(
        "", "day that chat templates are told, e.g. 2026-11-26; none: that of the run in OUT, or today"
    )
    dry_run: str = setting("", HELP_HERE)

    def need(self, longest: int, processes: int) -> Need:
        """Of memory; longest: tokens of the longest trace."""
        how = (0, False, self.dtype, self.gradient_checkpointing, self.shard, self.offload, processes)
        return Need(self.max_batch_tokens, longest, *how)


# Settings that say how to compute, not what: a run may go on with others.
MACHINERY = ("device", "save_every", "shard", "offload", "max_batch_tokens", "gradient_checkpointing")
ASSUMED_TOKENS = 2048  # of the longest trace, for a plan before there are any


@dataclass
class Example:
    """One trace as token ids (T,) with a mask of the tokens to learn."""

    ids: list[int]
    mask: list[bool]
    prompt: str = ""


def load_examples(
    settings: Settings, tokenizer, context: int, leader: bool = True
) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples. The split is by prompt, so no held-out prompt has a trace among the training ones.

    Traces that are too long are left out (`lib.batches.drop_too_long`); `leader` says which. Raises UserError.
    """
    path = Path(settings.data) / settings.traces
    records = read_jsonl(
        path, ("id", "prompt", "reasoning", "answer") if settings.reasoning else ("id", "prompt", "answer")
    )
    examples = []
    for record in records:
        reasoning = record["reasoning"] if settings.reasoning else None
        ids, mask = encode_example(tokenizer, record["prompt"], reasoning, record["answer"])
        examples.append(Example(ids, mask, record["prompt"]))
    lengths = [len(example.ids) for example in examples]
    limits = f"context {context}, --max-batch-tokens {settings.max_batch_tokens}"
    examples = drop_too_long(
        examples, records, lengths, context, settings.max_batch_tokens, f"{path}: traces", limits, leader
    )
    # Of those that are one prompt to a reader, the first stands for all.
    first = {same_prompt(example.prompt): example.prompt for example in reversed(examples)}
    prompts = sorted(first.values())
    count = round(settings.held_out_share * len(prompts))
    held_out_prompts = {prompts[i] for i in epoch_order(len(prompts), settings.seed, -1)[:count]}
    train: list[Example] = []
    held_out: list[Example] = []
    for example in examples:
        (held_out if first[same_prompt(example.prompt)] in held_out_prompts else train).append(example)
    if not train:
        raise UserError(f"{path}: no trace left to train on: lower --held-out-share")
    return train, held_out


def negative_log_likelihood(
    model,
    examples: list[Example],
    pad_id: int,
    settings: Settings,
    processes: Processes,
    backward_scale: float = 0.0,
) -> float:
    """Sum of -log p over this process's share of all learned tokens, in micro-batches; with `backward_scale`, adds its scaled
    gradient to .grad. `examples` are those of all processes."""
    total = 0.0
    mine = examples[processes.rank :: processes.size]
    nothing = Example(
        examples[0].ids, [False] * len(examples[0].ids)
    )  # for a process with none left: a loss of 0
    for indices in even_rounds(
        micro_batches([len(e.ids) for e in mine], settings.max_batch_tokens), model, processes
    ):
        batch = [mine[i] for i in indices] or [nothing]
        ids, attention_mask, mask = masked_batch(
            [e.ids for e in batch], [e.mask for e in batch], pad_id, device_of(model)
        )
        with torch.set_grad_enabled(backward_scale > 0), precision(device_of(model), settings.dtype):
            loss = -token_logprobs(model, ids, attention_mask, mask).sum()
        if backward_scale:
            backward(loss * backward_scale, model, processes)
        total += loss.item()
    return total


def train_step(model, optimizer, batch: list[Example], pad_id: int, settings: Settings, processes: Processes):
    """The clipped gradient of `batch` (the same list on every rank), in .grad; `main` takes the step. Returns (mean loss per
    token, gradient norm before clipping)."""
    tokens = sum(sum(e.mask) for e in batch)  # over all ranks, so that shares of any size add up to the mean
    optimizer.zero_grad()
    loss = negative_log_likelihood(model, batch, pad_id, settings, processes, backward_scale=1 / tokens)
    loss = sum(gather_objects(loss, processes)) / tokens
    return loss, sum_and_clip(model, settings.max_grad_norm, processes)


def held_out_loss(
    model, examples: list[Example], pad_id: int, settings: Settings, processes: Processes
) -> float:
    loss = negative_log_likelihood(model, examples, pad_id, settings, processes)
    return sum(gather_objects(loss, processes)) / sum(sum(e.mask) for e in examples)


def main() -> None:
    settings = parse_settings(Settings, "sft")
    if settings.dry_run not in ("", "here"):
        return plan(settings.dry_run, settings.model, partial(settings.need, ASSUMED_TOKENS), [], disk=8)
    processes = start_processes(settings.device)
    out, leader = Path(settings.out), processes.rank == 0
    check_shards(settings.shard, settings.offload, processes)
    settings.date = gather_objects(date_of_run(out, settings.date), processes)[0]
    set_date(settings.date)
    config = {**asdict(settings), **checksums(settings.model, Path(settings.data) / settings.traces)}
    claim = partial(claim_folder, settings.out, config, overwrite=settings.overwrite, ignore=MACHINERY)
    if leader and not settings.dry_run:
        claim(begin=False)
    gather_objects(None, processes)  # what is refused here costs nobody any time
    tokenizer = load_tokenizer(settings.model)
    device = pick_device(settings.device, processes.local_rank)
    model = load_model(settings, device, processes)
    train, held_out = load_examples(settings, tokenizer, context_of(model.config), leader)
    check_tokenizer(model, tokenizer, [e.prompt for e in train[:8]], reasoning=settings.reasoning)
    check_ids(model, [e.ids for e in train + held_out], [e.prompt[:40] for e in train + held_out])
    if settings.overwrite or not is_finished(
        out
    ):  # what does not fit ends here, and not when the longest traces come
        longest = max(train + held_out, key=lambda e: len(e.ids))
        need = settings.need(len(longest.ids), processes.size)
        most = max(settings.batch_size, len(held_out)) * need.longest  # a budget beyond is never used
        need = replace(need, batch_tokens=min(need.batch_tokens, most))
        rehearse(model, None, need, longest.mask.index(True), processes)
    if (
        leader and not settings.dry_run
    ):  # after all inputs have been read: a mistake in one must not cost an earlier run
        claim()
    gather_objects(None, processes)  # nobody reads the folder before it is claimed
    name = os.path.basename(os.path.abspath(out))
    next_out = beside(out, name.replace("sft", "rl") if "sft" in name else f"{name}-rl")
    following = next_command("03_rl_train.py", settings, "sft", data=settings.data, model=out, out=next_out)
    if not settings.reasoning:
        following += "\n(an answer alone is short: add its length, --max-new-tokens)"
    if settings.traces != "sft.jsonl":  # a comparison: what it makes is a rival of RL, not its start
        following = next_command(
            "04_attack_eval.py", settings, "sft", data=settings.data, **model_and_out(out)
        )
    if is_finished(out) and not settings.dry_run:
        print(f"{out} is finished. Next: {following}" * leader)
        return stop_processes()
    steps_per_epoch = math.ceil(len(train) / settings.batch_size)
    total = settings.epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
    )
    state: dict = (
        {"step": 0}
        if settings.dry_run
        else load_progress(out, model, optimizer, processes, ["metrics.jsonl"])
    )
    best_loss, best_weights, bad_epochs = (
        state.get("best_loss", math.inf),
        state.get("best"),
        state.get("bad_epochs", 0),
    )
    if leader:
        print(
            f"read {len(train)} traces (+ {len(held_out)} held out) from {settings.data}; start {settings.model}, {device}"
        )
        print(
            f"{total} updates at most, {'reasoning and answer' if settings.reasoning else 'answers only'}; writing to {out}"
        )

    bar = tqdm(
        range(state["step"], total), "SFT", total, initial=state["step"], unit="update", disable=not leader
    )
    for step in bar:
        if bad_epochs >= settings.patience:
            break
        started = time.perf_counter()
        epoch, place = divmod(step, steps_per_epoch)
        order = epoch_order(len(train), settings.seed, epoch)
        batch = [train[i] for i in order[place * settings.batch_size : (place + 1) * settings.batch_size]]
        rate = set_learning_rate(
            optimizer, settings.learning_rate, step, settings.warmup_steps, total, settings.decay
        )
        loss, norm = train_step(model, optimizer, batch, tokenizer.pad_token_id, settings, processes)
        finite_or_stop("loss", loss, step, out)
        finite_or_stop("gradient norm", norm, step, out)
        optimizer.step()
        metrics = {"step": step, "epoch": epoch, "loss": loss, "grad_norm": norm, "learning_rate": rate}
        if held_out and place == steps_per_epoch - 1:  # the early stop: light means no longer than it helps
            metrics["held_out_loss"] = held_out_loss(
                model, held_out, tokenizer.pad_token_id, settings, processes
            )
            bad_epochs = 0 if metrics["held_out_loss"] < best_loss else bad_epochs + 1
            if not bad_epochs:
                best_loss = metrics["held_out_loss"]
                best_weights = {k: v.clone() for k, v in full_weights(model).items()}  # on rank 0
        metrics["seconds"] = time.perf_counter() - started
        if settings.dry_run:
            if leader:
                print(
                    f"one update: {metrics['seconds']:.2f} s; {total} updates: {total * metrics['seconds'] / 3600:.2f} hours"
                )
            return stop_processes()
        bar.set_postfix(loss=f"{loss:.3f}")
        if leader:
            append_jsonl(out / "metrics.jsonl", metrics)
        if (step + 1) % settings.save_every == 0 or "held_out_loss" in metrics:
            best = {"best": best_weights} if best_weights else {}
            save_progress(
                out, step + 1, model, optimizer, processes, best_loss=best_loss, bad_epochs=bad_epochs, **best
            )
    weights = full_weights(model)
    if leader:
        save_policy(model, tokenizer, out, best_weights or weights)
        finish(out)
        print(f"wrote {out}. Next: {following}")
    stop_processes()


if __name__ == "__main__":
    run_main(main)
