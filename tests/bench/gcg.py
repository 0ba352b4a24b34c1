"""Our GCG beside nanogcg 0.3.0: the same model, prompts, targets and budget, in pairs (tests/bench/README.md).

    python -m benchmarks.gcg --model smollm2 --harmbench ../shared/data/harmbench --nanogcg nanogcg-env/bin/python

Each behaviour and seed is searched by both, one right after the other; who begins alternates. What counts is the loss
of the suffix as *text*: it goes through the chat template, and all is encoded anew and read by one plain forward pass,
the same one for both. OUT/pairs.jsonl grows pair by pair, and the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib import UserError
from lib.attacks import ATTACKS, Budget
from lib.attacks.core import attach
from lib.attacks.victim import Victim
from lib.chat import encode_prompt
from lib.judges import load_judge
from lib.metrics import student_t
from lib.report.figures import show
from lib.run.command import run_main
from lib.run.files import append_jsonl, resume_log
from lib.run.hub import load_policy, load_tokenizer
from lib.sampler import random_numbers

WORKER = Path(__file__).with_name("nanogcg_worker.py")
SAME = 1e-3  # nats, by which the initial losses of two libraries may differ


def read_behaviours(folder: Path, count: int) -> list[dict]:
    """The first ones of HarmBench's validation set."""
    with (folder / "harmbench_behaviors_text_val.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:count]
    targets = json.loads((folder / "harmbench_targets_text_val.json").read_text())
    if any(row["ContextString"] for row in rows):
        raise UserError(
            f"--behaviours: given {count}; one of them has a context, which this benchmark does not send"
        )
    return [
        {"id": r["BehaviorID"], "prompt": r["Behavior"].strip(), "target": targets[r["BehaviorID"]].strip()}
        for r in rows
    ]


# ---- two searches ------------------------------------------------------------------------------------------


def ours(victim: Victim, behaviour: dict, budget: Budget, seed: int) -> dict:
    """{"curve": best loss after each step, "sent": the whole text, "seconds", "cpu_seconds"}"""
    with torch.no_grad():
        victim.model(torch.arange(100)[None])  # as the worker does
    generator = random_numbers(seed, f"gcg/{behaviour['id']}")
    with tqdm(total=budget.gcg_steps, desc="ours", leave=False) as bar:
        wall, cpu = time.perf_counter(), time.process_time()
        attempt = ATTACKS["gcg"].run(victim, [behaviour], budget, [generator], bar.update)[0]
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    curve = [step["loss"] for step in attempt.trace]
    return {"curve": curve, "sent": attempt.trace[-1]["sent"], "seconds": wall, "cpu_seconds": cpu}


def theirs(python: str, model: str, behaviour: dict, budget: Budget, seed: int) -> dict:
    """The same of nanogcg, which runs in another process. Its suffix begins with the space behind the prompt."""
    job = {"model": model, "prompt": behaviour["prompt"], "target": behaviour["target"], "seed": seed}
    job |= {"steps": budget.gcg_steps, "width": budget.gcg_width, "top_k": budget.gcg_top_k}
    job |= {"init": " " + budget.initial_suffix(), "threads": torch.get_num_threads()}
    done = subprocess.run([python, str(WORKER)], input=json.dumps(job), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"--nanogcg: {python} {WORKER.name} ended with {done.returncode}; see above")
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "sent": behaviour["prompt"] + found.pop("suffix")}


@torch.no_grad()
def rescore(victim: Victim, sent: str, target: str) -> float:
    """Mean negative log-likelihood of the target behind the text, by one forward pass without any cache."""
    prompt = encode_prompt(victim.tokenizer, sent, reasoning=False)
    ids = victim.tokenizer.encode(target, add_special_tokens=False)
    logits = victim.model(torch.tensor([prompt + ids]), use_cache=False).logits[0]
    return F.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(ids)).item()


def pair(victim: Victim, args, behaviour: dict, budget: Budget, seed: int, ours_first: bool) -> dict:
    """Both searches of one behaviour. UserError if they do not begin at the same loss: they would not be comparable."""
    searches = {
        "ours": lambda: ours(victim, behaviour, budget, seed),
        "nanogcg": lambda: theirs(args.nanogcg, args.model, behaviour, budget, seed),
    }
    line = {"id": behaviour["id"], "seed": seed, "ours_first": ours_first}
    line["first"] = rescore(victim, attach(behaviour["prompt"], budget.initial_suffix()), behaviour["target"])
    for name in sorted(searches, reverse=ours_first):
        line[name] = searches[name]()
        sent = line[name].pop("sent")
        line[name] |= {
            "suffix": sent[len(behaviour["prompt"]) :],
            "final": rescore(victim, sent, behaviour["target"]),
        }
        if abs(line[name]["curve"][0] - line["first"]) > SAME:
            begin = f"{line[name]['curve'][0]:.4f}, not {line['first']:.4f}"
            raise UserError(
                f"{behaviour['id']}: the first loss of {name} is {begin}: another model, prompt or target"
            )
    return line


# ---- report ------------------------------------------------------------------------------------------------


def report(lines: list[dict]) -> str:
    """Markdown: a row a pair, then means with Student's t intervals over pairs (of ratios: geometric)."""
    rows = [
        "| behaviour | seed | first loss | final: ours | nanogcg | seconds: ours | nanogcg | ratio | ratio of CPU time |"
    ]
    rows.append("| --- |" + " ---: |" * 8)
    gaps, walls, cpus = [], [], []
    for line in lines:
        a, b = line["ours"], line["nanogcg"]
        gaps.append(a["final"] - b["final"])
        walls.append(math.log(a["seconds"] / b["seconds"]))
        cpus.append(math.log(a["cpu_seconds"] / b["cpu_seconds"]))
        losses = f"{line['first']:.3f} | {a['final']:.3f} | {b['final']:.3f}"
        times = (
            f"{a['seconds']:.1f} | {b['seconds']:.1f} | {math.exp(walls[-1]):.3f} | {math.exp(cpus[-1]):.3f}"
        )
        rows.append(f"| {line['id']} | {line['seed']} | {losses} | {times} |")
    changed = {
        name: sum(abs(x[name]["final"] - x[name]["curve"][-1]) > SAME for x in lines)
        for name in ("ours", "nanogcg")
    }
    rows += ["", f"Suffixes whose text has another loss than the search said: {changed['ours']} of ours, "]
    rows[-1] += f"{changed['nanogcg']} of nanogcg's, of {len(lines)} each."
    if len(lines) > 1:
        wall, cpu = (
            f"{show({**t, **{k: math.exp(t[k]) for k in ('mean', 'low', 'high')}})}"
            for t in map(student_t, (walls, cpus))
        )
        rows += [
            "",
            f"Final loss, ours - nanogcg: {show(student_t(gaps), '+')}. Time, ours / nanogcg: {wall}; CPU time: {cpu}.",
        ]
    return "\n".join(rows)


def draw(lines: list[dict], path: Path) -> None:
    """Best loss so far against steps, a panel a behaviour."""
    import matplotlib.pyplot as plt

    ids = list(dict.fromkeys(line["id"] for line in lines))
    figure, panels = plt.subplots(
        1, len(ids), figsize=(3 * len(ids), 2.8), squeeze=False, layout="constrained"
    )
    for name, axes in zip(ids, panels[0], strict=True):
        for line in (x for x in lines if x["id"] == name):
            for who, colour, style in (("ours", "#0072b2", "-"), ("nanogcg", "#d55e00", "--")):
                axes.plot(
                    line[who]["curve"], style, color=colour, lw=1.2, label=who if line is lines[0] else None
                )
        axes.set(title=name, xlabel="step")
        axes.title.set_fontsize(8)
    panels[0][0].set_ylabel("best loss so far, nats a token")
    panels[0][0].legend(frameon=False)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a chat model")
    parser.add_argument(
        "--harmbench",
        required=True,
        type=Path,
        help="folder with HarmBench's validation behaviours and targets",
    )
    parser.add_argument("--nanogcg", required=True, help="python of the environment with nanogcg (README.md)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-gcg"), help="folder for the pairs")
    parser.add_argument(
        "--figure", type=Path, default=Path("tests/bench/gcg.png"), help="loss curves (matplotlib)"
    )
    parser.add_argument("--behaviours", type=int, default=4, help="the first ones")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--width", type=int, default=64, help="candidates a step")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    budget = Budget(
        gcg_steps=args.steps, gcg_width=args.width, gcg_top_k=256, gcg_suffix_tokens=20, gcg_init="!"
    )
    behaviours = read_behaviours(args.harmbench, args.behaviours)
    model, tokenizer = load_policy(args.model, device="cpu").requires_grad_(False), load_tokenizer(args.model)
    victim = Victim(
        "victim", model, tokenizer, False, load_judge("sandbox"), max_new_tokens=1, temperature=0.0
    )
    path = args.out / "pairs.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    lines = resume_log(path)
    done = {(line["id"], line["seed"]) for line in lines}
    todo = [
        (i, b, seed) for seed in args.seeds for i, b in enumerate(behaviours) if (b["id"], seed) not in done
    ]
    for i, behaviour, seed in tqdm(todo, desc="pairs"):
        lines.append(pair(victim, args, behaviour, budget, seed, ours_first=(i + seed) % 2 == 0))
        append_jsonl(path, lines[-1])
        tqdm.write(report(lines[-1:]).splitlines()[2])
    print(report(lines))
    draw(lines, args.figure)


if __name__ == "__main__":
    run_main(main)
