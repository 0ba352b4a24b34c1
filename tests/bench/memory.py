"""The memory formula of `--dry-run` (lib/run/plan.py) beside measured peaks of stage 3 on a CPU (tests/bench/README.md).

    python -m benchmarks.memory --model smollm2

Each case is a process of its own: it loads policy and reference, makes an update on sequences of random tokens, samples, and
makes another, with stage 3's own functions. Measured is the process's largest resident set, less what the interpreter and its
libraries held before the models were loaded. The random models have proportions that SmolLM2 has not: wide and shallow, one
token in the vocabulary for twenty of SmolLM2's, no grouped heads.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lib.run.plan import memory, shape_of_model
from lib.run.rehearsal import rehearse
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from lib import UserError
from lib.chat import Parsed
from lib.run.command import run_main
from lib.run.hub import load_policy
from lib.run.processes import start_processes
from lib.run.training import halve_linear_layers
from lib.sampler import Completion, sample

PROMPT = 16  # tokens


@dataclass(frozen=True)
class Case:
    """batch_tokens: of a micro-batch; longest: of a sequence; sample_tokens: of the sampler's cache."""

    model: str  # given: the one of --model
    batch_tokens: int
    longest: int
    sample_tokens: int
    dtype: str = "float32"
    checkpointing: bool = False


CASES = [
    Case("given", 512, 128, 512),
    Case("given", 2048, 256, 2048),
    Case("given", 512, 128, 16384),
    Case("shallow", 4096, 256, 4096),
    Case("deep", 8192, 256, 8192),
    Case("deep", 8192, 256, 8192, checkpointing=True),
    Case("deep", 8192, 256, 8192, dtype="bfloat16"),
]


def random_model(name: str) -> PreTrainedModel:
    """shallow: 2 wide layers, 50 M parameters; deep: 16 narrow ones with grouped heads, 5 M."""
    if name == "shallow":
        wide = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16)
        return LlamaForCausalLM(LlamaConfig(vocab_size=8000, num_key_value_heads=16, **wide))
    deep = dict(
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=16,
        num_attention_heads=5,
        num_key_value_heads=1,
    )
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=2000, tie_word_embeddings=True, **deep))


def resident(field: str) -> int:
    """Bytes: VmRSS, resident now, or VmHWM, at most so far. Raises UserError where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        raise UserError("memory is measured from /proc/self/status, which only Linux has") from None
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def measure(case: Case, folder: str) -> dict:
    """What the formula says and what stage 3 takes, bytes."""
    stage = importlib.import_module("03_rl_train")
    settings = stage.Settings(
        prompts_per_step=2,
        max_batch_tokens=case.batch_tokens,
        max_sample_tokens=case.sample_tokens,
        dtype=case.dtype,
    )
    processes = start_processes("cpu")
    torch.nn.Linear(8, 8)(torch.ones(8)).sum().backward()  # what torch loads when it is first used
    before = resident("VmRSS")
    policy = load_policy(folder, device="cpu", gradient_checkpointing=case.checkpointing)
    reference = load_policy(folder, device="cpu").requires_grad_(False)
    if case.dtype == "bfloat16":
        halve_linear_layers(reference)
    shape, vocabulary = shape_of_model(policy), policy.config.vocab_size
    new = case.longest - PROMPT
    need = stage.Need(
        case.batch_tokens, case.longest, case.sample_tokens, True, case.dtype, case.checkpointing
    )
    rehearse(policy, reference, need, PROMPT, processes)
    optimizer = torch.optim.AdamW(policy.parameters())

    prompts = torch.randint(vocabulary, (case.sample_tokens // case.longest, PROMPT)).tolist()
    rollouts = []
    for _ in range(
        2 * case.batch_tokens // case.longest
    ):  # two micro-batches: the second meets the first's gradients
        done = Completion(torch.randint(vocabulary, (new,)).tolist(), [0.0] * new, "length")
        parsed = Parsed("", "", False)
        rollouts.append(stage.Rollout({}, prompts[0], done, "", parsed, 0, advantage=1.0))
    for step in range(2):
        with stage.precision(torch.device("cpu"), case.dtype):
            if step:  # beside AdamW's moments
                sample(
                    policy,
                    prompts,
                    max_new_tokens=new,
                    eos_token_ids=[-1],
                    max_batch_tokens=case.sample_tokens,
                )
        stage.update_policy(policy, reference, optimizer, rollouts, 0, settings, processes)
        optimizer.step()
        optimizer.zero_grad()
    return {
        "formula": memory(shape, need)["peak"],
        "measured": resident("VmHWM") - before,
        "parameters": shape.parameters,
    }


def report(lines: list[dict]) -> str:
    rows = [
        "| model | parameters | computes in | tokens: micro-batch | cache | formula | measured | formula / measured |"
    ]
    rows += ["|---|---|---|---|---|---|---|---|"]
    for x in lines:
        how = x["dtype"] + ", checkpointing" * x["checkpointing"]
        sizes = f"{x['parameters'] / 1e6:.0f} M | {how} | {x['batch_tokens']} | {x['sample_tokens']}"
        peaks = (
            f"{x['formula'] / 1e9:.2f} GB | {x['measured'] / 1e9:.2f} GB | {x['formula'] / x['measured']:.2f}"
        )
        rows.append(f"| {x['model']} | {sizes} | {peaks} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a chat model: a folder or a hub name")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)  # the process of one case
    args = parser.parse_args()
    if args.case is not None:
        return print(json.dumps(measure(CASES[args.case], args.model)))
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for i, case in enumerate(tqdm(CASES, desc="cases")):
            path = args.model if case.model == "given" else f"{folder}/{case.model}"
            if case.model != "given" and not Path(path).exists():
                random_model(case.model).save_pretrained(path)
            command = [sys.executable, "-m", "benchmarks.memory", "--model", path, "--case", str(i)]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if run.returncode:
                raise UserError(f"case {i} failed, with the words above: {case}")
            lines.append({**asdict(case), **json.loads(run.stdout.splitlines()[-1])})
            lines[-1]["model"] = Path(args.model).name if case.model == "given" else case.model
            tqdm.write(report(lines[-1:]).splitlines()[2])
    print(report(lines))


if __name__ == "__main__":
    run_main(main)
