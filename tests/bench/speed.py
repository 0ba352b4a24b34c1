"""How fast, beside what else there is: the sampler and a GRPO step; and how the sampler's seconds grow.

    python -m tests.bench.speed --model FOLDER --out OUT          (a chat model; a table, and OUT/speed.json)
    python -m tests.bench.speed --model FOLDER --out OUT --only grpo --runs 5 --trl-python VENV/bin/python

Rivals: `generate` of transformers, and TRL's GRPOTrainer (`pip install trl==1.16.0`, in an environment of its
own or this one; left out where there is none). Each pair has the same prompts (this file's own text) and
alternates, so a machine that slows down slows both. A GRPO step runs in a process of its own, with no setting
that a user's run has not, so its peak memory is that of a whole run. Medians, with the least and the largest.

The bound beside them is the time of the model's matrix products alone: its linear layers, for as many tokens,
at shapes as large as they come, with no attention, softmax, cache or optimizer. Nothing can be faster here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.batches import pad_batch
from lib.chat import encode_prompt, encode_text, eos_token_ids
from lib.run.data import Prompt
from lib.run.hub import load_policy, load_tokenizer
from lib.run.plumbing import Run
from lib.sampler import Completion, sample

GROUP, PROMPTS, NEW, BUDGET = 8, 2, 64, 1024  # of a GRPO step; the budget is that of --preset smollm
STEPS = 3  # of a process; the first warms up
TRL = {"trl": {"gradient_checkpointing": True}, "trl, no checkpointing": {"gradient_checkpointing": False}}


def texts(tokenizer, lengths: list[int]) -> list[str]:
    """Pieces of this file, of so many tokens."""
    ids = encode_text(tokenizer, Path(__file__).read_text(encoding="utf-8"))
    return [tokenizer.decode(ids[37 * i : 37 * i + length]) for i, length in enumerate(lengths)]


def score(completions: list[str]) -> list[float]:
    """A reward that tells completions apart."""
    return [text.count("e") % 7 / 7 for text in completions]


def seconds(function: Callable[..., Any], *args: Any) -> float:
    begin = time.perf_counter()
    function(*args)
    return time.perf_counter() - begin


def in_words(values: Sequence[float], unit: str = "s", per: Sequence[float] = ()) -> str:
    """Median, least and largest; of ratios, if there are values of runs side by side to divide by."""
    values = [a / b for a, b in zip(values, per or [1.0] * len(values), strict=True)]
    return f"{statistics.median(values):.2f} {unit} [{min(values):.2f}, {max(values):.2f}]"


def products(model: torch.nn.Module, rows: int) -> float:
    """Seconds that the products of all linear layers take for `rows` tokens; median of six."""
    weights = [layer.weight.detach() for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    inputs = [torch.randn(rows, weight.shape[1]).to(weight) for weight in weights]

    def once() -> None:
        results = [torch.nn.functional.linear(*pair) for pair in zip(inputs, weights, strict=True)]
        results[-1][0, 0].item()  # waits for a GPU

    return statistics.median(seconds(once) for _ in range(6))


# ---- a GRPO step, in a process of its own ----


def ours(model: str, length: int) -> list[float]:
    """Chapter 3's step."""
    rl, tokenizer = importlib.import_module("03_rl_train"), load_tokenizer(model)
    settings = rl.Settings(model=model, group_size=GROUP, max_new_tokens=NEW, temperature=1.0)
    settings.max_batch_tokens = BUDGET
    run = Run(settings, ["rl"])
    policy, reference = run.model(model), run.model(model, frozen=True)
    optimizer = torch.optim.AdamW(policy.parameters(), **run.adamw)
    pieces = enumerate(texts(tokenizer, [length] * PROMPTS))
    prompts = [Prompt({"id": i, "prompt": text}, encode_text(tokenizer, text), i) for i, text in pieces]

    def step(number: int) -> None:
        rollouts = rl.collect_rollouts(policy, tokenizer, prompts, number, settings, run)
        for rollout, reward in zip(rollouts, score([r.text for r in rollouts]), strict=True):
            rollout.reward = reward
        rl.assign_advantages(rollouts, settings)
        rl.update_policy(policy, reference, optimizer, rollouts, tokenizer.pad_token_id, settings, run)

    return [seconds(step, number) for number in range(STEPS)][1:]


def trl(model: str, length: int, options: dict[str, Any]) -> list[float]:
    """TRL's, with its own defaults but for what is compared: KL in the loss, as many completions, fp32."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer, ends = load_tokenizer(model), list[float]()

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

        on_step_end = on_step_begin

    options = options | {"num_generations": GROUP, "max_completion_length": NEW, "beta": 1e-3}
    options |= {"max_steps": STEPS}
    options |= {"per_device_train_batch_size": GROUP, "gradient_accumulation_steps": PROMPTS, "bf16": False}
    options |= {"use_cpu": not torch.cuda.is_available(), "report_to": [], "save_strategy": "no"}
    config = GRPOConfig(output_dir=f"/tmp/speed-{time.time_ns()}", disable_tqdm=True, **options)
    data = Dataset.from_list([{"prompt": text} for text in texts(tokenizer, [length] * PROMPTS)])
    reward = lambda completions, **columns: score(completions)  # noqa: E731
    policy, rest = load_policy(model, device="cpu", dtype="float32"), {"callbacks": [Clock()]}
    trainer = GRPOTrainer(policy, reward, args=config, train_dataset=data, processing_class=tokenizer, **rest)
    trainer.train()
    return [end - begin for begin, end in zip(ends[::2], ends[1::2], strict=True)][1:]


def worker(name: str, model: str, length: int) -> None:
    """One line of JSON: seconds of each step, peak memory of this process in GB."""
    found = ours(model, length) if name == "ours" else trl(model, length, TRL[name])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in kB
    print(json.dumps({"seconds": statistics.mean(found), "GB": peak}))


def bounds_of_step(options: argparse.Namespace) -> dict[int, float]:
    """Of prompts of so many tokens the seconds of a step's matrix products: each token once in decoding, and
    in the update four times: the policy forward, twice as much backward, the reference forward."""
    model = load_policy(options.model, device=options.device)  # gone before a worker is measured
    decoding = (NEW - 1) * products(model, PROMPTS * GROUP)
    return {n: decoding + 4 * products(model, PROMPTS * (n + GROUP * NEW)) for n in (32, 400)}


def grpo(options: argparse.Namespace) -> dict[str, Any]:
    """Ours beside TRL's: short prompts, and prompts of 400 tokens."""
    found: dict[str, Any] = {}
    bounds = bounds_of_step(options)
    trl_python = options.trl_python or sys.executable
    there = subprocess.run([trl_python, "-c", "import trl"], capture_output=True).returncode == 0
    names = ["ours", *(TRL if there else [])]
    for length, bound in bounds.items():
        lines: dict[str, list[dict]] = {name: [] for name in names}
        for _ in range(options.runs):
            for name in names:
                python = sys.executable if name == "ours" else trl_python
                command = [python, "-m", "tests.bench.speed", "--model", options.model, "--out", options.out]
                command += ["--worker", name, "--length", str(length)]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                lines[name].append(json.loads(output.strip().splitlines()[-1]))
        for name, measured in lines.items():
            spent, memory = [line["seconds"] for line in measured], [line["GB"] for line in measured]
            row = {"a step": in_words(spent), "peak memory": in_words(memory, "GB")}
            if name != "ours":
                row["TRL / ours"] = in_words(spent, "times", [line["seconds"] for line in lines["ours"]])
            found[f"{name}, {length}-token prompts"] = row
        found[f"bound, {length}-token prompts"] = {"a step": f"{bound:.2f} s"}
    return found


# ---- here ----


def sampler(options: argparse.Namespace) -> dict[str, Any]:
    """Groups of eight completions for prompts of mixed length, beside `generate`; greedy, the same tokens?

    First most run to the limit, which suits `generate`; then each ends behind its first full stop.
    """
    model, tokenizer = load_policy(options.model, device=options.device), load_tokenizer(options.model)
    pieces = texts(tokenizer, [8, 20, 40, 80, 120, 200])
    prompts = [encode_prompt(tokenizer, f"Explain: {text}", reasoning=False) for text in pieces]
    eos, limit, rows = eos_token_ids(model, tokenizer), 2 * NEW, len(prompts) * GROUP
    ids, mask = pad_batch(prompts, tokenizer.pad_token_id, side="left")
    batch = {"input_ids": ids.to(model.device), "attention_mask": mask.long().to(model.device)}
    usual = {"pad_token_id": tokenizer.pad_token_id, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    greedy = sample(model, prompts, max_new_tokens=NEW, temperature=0.0, eos_token_ids=eos)
    same = 0
    for prompt, completion in zip(prompts, greedy, strict=True):
        alone = torch.tensor([prompt], device=model.device)
        row = model.generate(alone, **usual, max_new_tokens=NEW, eos_token_id=eos, do_sample=False)
        same += row[0, len(prompt) :].tolist() == completion.token_ids
    found = {"greedy": {"the same tokens": f"{same} of {len(prompts)}"}}
    ends = {"to the limit": eos, "to a full stop": [*eos, *encode_text(tokenizer, ".")]}
    for name, stops in ends.items():

        def generate(stops=stops) -> Tensor:
            drawn = {"do_sample": True, "temperature": 1.0, "num_return_sequences": GROUP}
            return model.generate(**batch, **usual, **drawn, max_new_tokens=limit, eos_token_id=stops)

        def groups(stops=stops) -> list[Completion]:
            return sample(model, prompts, group_size=GROUP, max_new_tokens=limit, eos_token_ids=stops)

        lengths = [len(completion.token_ids) for completion in groups()]  # this and the next warm up, too
        generate()
        ours, theirs = zip(*[(seconds(groups), seconds(generate)) for _ in range(options.runs)], strict=True)
        row = {"tokens, mean": f"{statistics.mean(lengths):.0f}", "sample": in_words(ours)}
        row |= {"generate": in_words(theirs), "generate / sample": in_words(theirs, "times", ours)}
        found[f"{rows} completions {name}"] = row
    bound = products(model, rows) * (limit - 1)
    found[f"bound, {rows} completions to the limit"] = {"sample": f"{bound:.2f} s"}
    return found


def growth(options: argparse.Namespace) -> dict[str, Any]:
    """Exponents of `sample`'s seconds in prompts, group size, new tokens and prompt length: 1 is linear."""
    model, tokenizer = load_policy(options.model, device=options.device), load_tokenizer(options.model)

    def spent(prompts: int = 4, group: int = 4, new: int = 32, length: int = 32) -> float:
        ids = [encode_text(tokenizer, text) for text in texts(tokenizer, [length] * prompts)]
        kept = {"group_size": group, "max_new_tokens": new, "eos_token_ids": [], "max_batch_tokens": 16384}
        return statistics.median(seconds(lambda: sample(model, ids, **kept)) for _ in range(options.runs))

    found, _ = {}, spent()
    grown = {"prompts": [16, 32, 64], "group": [4, 16, 64], "new": [64, 128, 256], "length": [64, 256, 512]}
    for name, values in grown.items():
        times = [spent(**{name: value}) for value in values]
        slope = np.polyfit([math.log(v) for v in values], [math.log(t) for t in times], 1)[0]
        row = {f"{value}": f"{s:.2f} s" for value, s in zip(values, times, strict=True)}
        found[name] = {"exponent": f"{slope:.2f}", **row}
    return found


PARTS = {"sampler": sampler, "grpo": grpo, "growth": growth}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a chat model: a folder or a hub name")
    parser.add_argument("--out", required=True, help="folder for speed.json")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each rival")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trl-python", default="", help="the Python of an environment with trl")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker, options.model, options.length)
    threads = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.runs} runs"
    found: dict[str, Any] = {"versions": threads}
    for name in options.only:
        found[name] = PARTS[name](options)
        for row, columns in found[name].items():
            text = "; ".join(f"{key} {value}" for key, value in columns.items())
            print(f"{name}: {row}: {text}", flush=True)
    Path(options.out).mkdir(parents=True, exist_ok=True)
    (Path(options.out) / "speed.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
