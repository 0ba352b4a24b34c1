r"""Chapter 2: a light warm start, pi_base -> pi_SFT (paper section 4.1, stage I).

Before RL can reward good reasoning, the model has to reason at all: it learns the format `<think> z </think>
y` from about a thousand harmful prompts with a few traces each. For every update:

    1. take the next `batch_size` traces of a shuffled epoch
    2. loss = -log p(z, y | prompt), the mean over the tokens of reasoning, answer and markers
    3. one step of AdamW                                                         -> train_step
    4. after each epoch the loss of held-out prompts decides about an early stop -> held_out_loss

Two things matter more than the loss:

- **Light**: a low rate, few epochs, an early stop. RL chooses among samples, so samples must stay diverse.
  *Heavy* is 10/3 of the `--learning-rate`, twice the `--epochs`, no early stop (`--held-out-share 0`). The
  paper finds that it ends in a worse frontier, DSR against compliance (F5 in docs/results.md). The sandbox's
  preset has one epoch, so there the early stop never acts.
- **Imperfect traces are fine**: some comply where they should not (of the sandbox's, half). RL sorts that
  out; variety is what it needs.

    python 02_sft_warmstart.py --preset sandbox --data runs/demo/data --out runs/demo/sft
    torchrun --nproc-per-node 4 02_sft_warmstart.py --preset paper --data runs/paper/data0

`--no-reasoning` learns the answers alone: the start of the baseline "RL without reasoning". The paper's
comparison "SFT" is this stage once more, from pi_SFT and on 8 traces for each RL prompt (01's `--rl-traces
8`): `--traces sft_rl.jsonl --model runs/paper/sft --out runs/paper/sft8 --learning-rate 3e-4`. Reads
DATA/TRACES. Writes a Hugging Face checkpoint, metrics.jsonl, curves.png and settings.json to OUT. A killed
run goes on when the same command is run again.

**What you should see** (sandbox, seed 0, 20 seconds): the loss falls from 7.5 to about 0.3 in the first
hundred of 238 updates, as the format is learned, and creeps to 0.2 after that. The held-out loss ends at
0.20, too: nothing is learned by heart. A model of this stage reasons, and gives in to two of five plain
harmful requests of chapter 4.

To think about: the traces are of harmful prompts only, so what will pi_SFT do with a harmless one? And why
does a model that was trained to the lowest loss leave RL the least to choose from?
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from lib import UserError
from lib.batches import epoch_order
from lib.chat import encode_example
from lib.policy import context_of, token_logprobs
from lib.report import draw_curves
from lib.run import run_main, start
from lib.run.files import read_jsonl
from lib.run.hub import load_tokenizer
from lib.run.settings import Training, setting
from lib.run.text import same_prompt


@dataclass
class Settings(Training):
    traces: str = setting("sft.jsonl", "file in DATA to learn from; sft_rl.jsonl: traces of the RL prompts")
    learning_rate: float = setting(3e-5, "peak rate. Paper: 3e-5 (light), 1e-4 (heavy)", low=0.0, high=1.0)
    epochs: int = setting(3, "passes over the traces. Paper: 3 (light), 6 (heavy)", low=1, high=1000)
    batch_size: int = setting(16, "traces per update, over all processes. Paper: 16", low=1, high=10_000)
    warmup_steps: int = setting(10, "updates of linear warm-up", low=0, flag=False)
    decay: bool = setting(True, "after the warm-up, decay the rate linearly to zero", flag=False)
    held_out_share: float = setting(0.05, "share of prompts held out for the early stop", low=0.0, high=0.5)
    patience: int = setting(1, "epochs without a better held-out loss before the stop", low=1, flag=False)

    def inputs(self) -> list[str]:
        return [self.model, f"{self.data}/{self.traces}"]


@dataclass
class Example:
    """A trace as token ids (T,) and a mask of the tokens to learn."""

    record: dict
    ids: list[int]
    mask: list[bool]


def load_examples(settings: Settings, tokenizer, model, run) -> list[Example]:
    """The traces that fit. Raises UserError for texts that the model cannot read."""
    path, context = Path(settings.data) / settings.traces, context_of(model.config)
    keys = ("id", "prompt", "reasoning", "answer") if settings.reasoning else ("id", "prompt", "answer")
    examples = []
    for record in read_jsonl(path, keys):
        reasoning = record["reasoning"] if settings.reasoning else None
        ids, mask = encode_example(tokenizer, record["prompt"], reasoning, record["answer"])
        examples.append(Example(record, ids, mask))
    return run.usable(examples, model, tokenizer, context, f"{path} (context {context})")


def split_by_prompt(examples: list[Example], settings: Settings) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples: no held-out prompt has a trace among the training ones."""
    names: dict[str, str] = {}  # prompts that read alike (`same_prompt`) count as one, named by the first
    for example in examples:
        names.setdefault(same_prompt(example.record["prompt"]), example.record["prompt"])
    prompts = sorted(names.values())
    count = round(settings.held_out_share * len(prompts))
    order = epoch_order(len(prompts), settings.seed, -1)  # an order that no epoch of training uses
    held_out_prompts = {prompts[i] for i in order[:count]}
    train: list[Example] = []
    held_out: list[Example] = []
    for example in examples:
        is_held_out = names[same_prompt(example.record["prompt"])] in held_out_prompts
        (held_out if is_held_out else train).append(example)
    if not train:
        raise UserError(f"{settings.data}: no trace left to train on: lower --held-out-share")
    return train, held_out


def train_step(model, optimizer, batch: list[Example], pad_id: int, most: int, run) -> dict:
    """One update on `batch`, the same on every process: the mean loss per token, and the gradient's norm.

    Each process computes its share of the batch, in micro-batches of at most `most` tokens.
    """
    ### BEGIN SOLUTION sft_loss
    tokens = sum(sum(example.mask) for example in batch)  # of all processes: their shares add up to the mean
    total = 0.0
    for _, ids, attention_mask, mask in run.micro_batches(batch, pad_id, most, share=True):
        loss = -token_logprobs(model, ids, attention_mask, mask).sum()  # log p: (B, T), 0 outside the mask
        run.backward(loss / tokens)
        total += loss.item()
    loss = run.total(total) / tokens
    return {"loss": loss, "grad_norm": run.clip_and_step(optimizer, loss)}
    ### END SOLUTION


@torch.no_grad()
def held_out_loss(model, examples: list[Example], pad_id: int, most: int, run) -> float:
    """The mean loss per token."""
    total = 0.0
    for _, ids, attention_mask, mask in run.micro_batches(examples, pad_id, most, share=True):
        total -= token_logprobs(model, ids, attention_mask, mask).sum().item()
    return run.total(total) / sum(sum(example.mask) for example in examples)


def main() -> None:
    settings, run = start(Settings, "sft")
    tokenizer, model = load_tokenizer(settings.model), run.model(settings.model)
    train, held_out = split_by_prompt(load_examples(settings, tokenizer, model, run), settings)
    pad_id, most = tokenizer.pad_token_id, settings.max_batch_tokens
    read = f"read {len(train)} traces (+ {len(held_out)} held out) from {settings.data}"
    run.say(f"{read}; start {settings.model}")
    longest = max(len(example.ids) for example in train + held_out)
    run.rehearse(model, None, rows=max(settings.batch_size, len(held_out)), longest=longest)

    optimizer = torch.optim.AdamW(model.parameters(), **run.adamw)
    steps_per_epoch = math.ceil(len(train) / settings.batch_size)
    run.state |= {"best_loss": math.inf, "bad_epochs": 0}  # at first: a resumed run has its own back
    for step in run.steps(settings.epochs * steps_per_epoch, model, optimizer, "SFT"):  # sets the rate, too
        if run.state["bad_epochs"] >= settings.patience:  # light means no longer than it helps
            break
        epoch, place = divmod(step, steps_per_epoch)
        order = epoch_order(len(train), settings.seed, epoch)[place * settings.batch_size :]
        batch = [train[i] for i in order[: settings.batch_size]]
        stats = {"epoch": epoch, **train_step(model, optimizer, batch, pad_id, most, run)}
        if held_out and place == steps_per_epoch - 1:
            loss = stats["held_out_loss"] = held_out_loss(model, held_out, pad_id, most, run)
            run.state["bad_epochs"] += 1
            if loss < run.state["best_loss"]:
                run.state |= {"best_loss": loss, "bad_epochs": 0, "best": run.weights(model)}
        run.log(step, stats)
    run.finish(model, tokenizer, draw_curves)  # saves state["best"], the weights of the best epoch


if __name__ == "__main__":
    run_main(main)
