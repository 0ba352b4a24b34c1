r"""Chapter 3: reinforcement learning, pi_SFT -> pi_TARS (paper section 4.3, stage III).

GRPO by hand. For every step:

    1. take `prompts_per_step` prompts, each process its share
    2. sample a group of G completions each                      -> collect_rollouts
    3. reward  r_f * r_s on harmful prompts, r_f * r_n on others -> score_rollouts        (paper, equations 1 and 2;
       r_f format, r_s safety, r_n task completion: lib/rewards.py)
    4. advantage = (r - mean of its group) / (std + eps)         -> group_advantages, assign_advantages
    5. one policy-gradient update with a KL term                 -> grpo_loss, update_policy
    6. log, write a readable sample of rollouts, checkpoint

How this differs from textbook PPO: no value network (the group's mean is the baseline); no old-policy pass (the data is
on-policy and used once, so the ratio is 1; `--updates-per-batch` > 1 brings the clipped ratio to life); the KL to the frozen
reference is a loss term and not part of the reward; whole completions get one advantage.

`--objective rpo` is the paper's comparison with DPO in the same loop: step 2 samples from the reference, with the same seeds in
every epoch, and steps 4 and 5 compare completions in pairs instead (lib/compare/rpo.py).

    python 03_rl_train.py --preset sandbox --data runs/demo/data --model runs/demo/sft --out runs/demo/rl
    torchrun --nproc-per-node 4 03_rl_train.py --preset paper --data runs/paper/data \
        --model runs/paper/sft --out runs/paper/rl

Reads DATA/rl.jsonl. Writes a Hugging Face checkpoint, metrics.jsonl, rollouts.jsonl (read it!) and settings.json to OUT. Every
step is a function of the saved state and (seed, step): kill it at any moment, run the same command again, and the result is
the same, on a CPU to the bit (on a GPU some kernels add in an order of their own).
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from lib import UserError
from lib.batches import drop_too_long, epoch_order, micro_batches, rollout_batch
from lib.chat import Parsed, decode, encode_prompt, eos_token_ids, parse_completion, parse_direct, set_date
from lib.compare.rpo import response_seeds, update_on_preferences
from lib.judges import load_judge, models_of
from lib.policy import context_of, k3, token_logprobs
from lib.rewards import KINDS, total_reward
from lib.run.checkpoint import save_policy
from lib.run.checks import check_ids, check_tokenizer
from lib.run.files import append_jsonl, read_jsonl
from lib.run.folder import checksums, claim_folder, date_of_run, stated_reasoning
from lib.run.hub import load_tokenizer
from lib.run.logs import SILENT, describe, forecast, no_signal, speed, summarise
from lib.run.plan import Need
from lib.run.processes import Processes, gather_objects, pick_device, share, start_processes, stop_processes
from lib.run.rehearsal import HELP_HERE, plan, rehearse
from lib.run.settings import LAST_SEED, TOKENS, model_and_out, next_command, parse_settings, run_main, setting
from lib.run.shards import (
    backward,
    check_shards,
    device_of,
    even_rounds,
    full_weights,
    gathered,
    sum_and_clip,
)
from lib.run.state import finish, is_finished, load_progress, save_progress
from lib.run.training import finite_or_stop, load_model, precision, set_learning_rate
from lib.sampler import Completion, sample


@dataclass
class Settings:
    """Every setting of this stage. Defaults come from the preset."""

    preset: str = setting("sandbox", "where the defaults come from: sandbox, smollm or paper")
    data: str = setting("runs/demo/data", "folder that 01_build_mixture.py wrote")
    model: str = setting("runs/demo/sft", "pi_SFT, also the frozen reference: a folder or a hub name")
    out: str = setting("runs/demo/rl", "folder for the checkpoint and its logs")
    overwrite: bool = setting(False, "empty OUT first if it holds a run with other settings")
    judge: str = setting(
        "sandbox", "sandbox, standin, your.module, or HARM+TASK (README). Paper: moderation API, GRM"
    )
    reasoning: bool = setting(
        True, "think before answering; --no-reasoning: answer directly (baseline, no r_f)"
    )
    objective: str = setting(
        "grpo",
        "or rpo: DPO + alpha NLL on pairs; no KL, entropy, clip, normalisation",
        choices=("grpo", "rpo"),
    )
    one_reward: bool = setting(False, "r_n for all prompts, harmful ones too (finding F7)")
    # rollouts
    prompts_per_step: int = setting(
        32, "prompts a step, over all processes. Paper: 32; rpo: 4", low=1, high=10_000
    )
    group_size: int = setting(8, "completions a prompt, G. Paper: 8", low=2, high=1000)
    temperature: float = setting(0.6, "of sampling. Paper: 0.6", low=0.01, high=10.0)
    max_new_tokens: int = setting(
        4096, "length of a completion, tokens, reasoning included. Paper: 4096", low=1
    )
    max_prompt_tokens: int = setting(
        512, "prompts of more tokens are left out, and counted. Paper: 512", low=1
    )
    # optimisation
    learning_rate: float = setting(1e-6, "peak rate of AdamW. Paper: 1e-6; rpo: 3e-4", low=0.0, high=1.0)
    epochs: float = setting(
        3.0, "passes over the prompts; may be a fraction. Paper: 3", low=0.01, high=1000.0
    )
    warmup_steps: int = setting(0, "steps of linear warm-up", low=0)
    decay: bool = setting(False, "after the warm-up, decay the rate linearly to zero")
    weight_decay: float = setting(
        0.01, "weight decay of AdamW. Paper: verl's default, 0.01", low=0.0, high=100.0
    )
    adam_eps: float = setting(
        1e-8, "epsilon of AdamW; larger, weights with tiny gradients hold still", low=1e-16, high=1.0
    )
    max_grad_norm: float = setting(1.0, "gradient clipping, L2 norm; 0: none", low=0.0)
    updates_per_batch: int = setting(
        1, "updates on each batch of rollouts. Paper: 1 (on-policy)", low=1, high=1000
    )
    # the loss
    normalisation: str = setting(
        "token",
        "what the sum over tokens is divided by. token: all tokens of the batch (verl, DAPO; paper); "
        "sequence: each completion's length, then completions (GRPO, DeepSeekMath eq. 3); constant: max_new_tokens (Dr. GRPO)",
        choices=("token", "sequence", "constant"),
    )
    std_normalisation: bool = setting(
        True, "divide advantages by the group's std (GRPO, paper); without: Dr. GRPO"
    )
    kl_estimator: str = setting(
        "k3", "of KL(policy || reference), by Schulman. Paper: k3, clamped", choices=("k1", "k2", "k3")
    )
    kl_coef: float = setting(1e-3, "weight of the KL term in the loss. Paper: 1e-3", low=0.0, high=1000.0)
    entropy_coef: float = setting(
        0.0, "weight of the entropy bonus. Authors' script: 1e-3; paper: nothing", low=0.0, high=1000.0
    )
    clip_range: float = setting(
        0.2, "epsilon of the clipped ratio (PPO eq. 7); idle at one update a batch", low=0.0, high=10.0
    )
    rpo_beta: float = setting(0.01, "with rpo: beta of DPO. Paper: 0.01", low=0.0, high=1000.0)
    rpo_alpha: float = setting(
        3.0, "with rpo: weight of the NLL of the chosen, by its length. Paper: 3", low=0.0, high=1000.0
    )
    # machinery
    max_batch_tokens: int = setting(
        16384, "tokens (padding too) of a micro-batch: lower it when out of memory", low=16, high=TOKENS
    )
    max_sample_tokens: int = setting(
        65536, "rows x columns of the sampler's KV cache, tokens", low=16, high=TOKENS
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
    save_every: int = setting(10, "steps between resume points", low=1)
    rollouts_every: int = setting(5, "steps between samples in rollouts.jsonl", low=1)
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = setting(
        "float32", "to compute in, the weights stay float32. Paper: bfloat16", choices=("float32", "bfloat16")
    )
    seed: int = setting(0, "of the prompt order and of sampling", low=0, high=LAST_SEED)
    date: str = setting(
        "", "day that chat templates are told, e.g. 2026-11-26; none: that of the run in OUT, or today"
    )
    dry_run: str = setting("", HELP_HERE)

    @property
    def has_bonus(self) -> bool:
        """Whether the loss has an entropy bonus."""
        return self.entropy_coef > 0 and self.objective == "grpo"

    def need(self, longest: int, processes: int) -> Need:
        """Of memory; longest: tokens of the longest prompt and completion."""
        rollouts = math.ceil(self.prompts_per_step / processes) * self.group_size
        sample_tokens, batch_tokens = min(self.max_sample_tokens, rollouts * longest), self.max_batch_tokens
        if self.objective == "grpo":  # a budget beyond all rollouts is never used
            batch_tokens = min(batch_tokens, rollouts * longest)
        longest *= 2 if self.objective == "rpo" else 1  # a pair is in one micro-batch
        how = (
            sample_tokens,
            True,
            self.dtype,
            self.gradient_checkpointing,
            self.shard,
            self.offload,
            processes,
        )
        return Need(batch_tokens, longest, *how, entropy_gradient=self.has_bonus)


# Settings that say how to compute, not what: a run may go on with others.
MACHINERY = (
    "device",
    "save_every",
    "rollouts_every",
    "shard",
    "offload",
    "max_batch_tokens",
    "max_sample_tokens",
    "gradient_checkpointing",
)


@dataclass
class Rollout:
    """One completion of one prompt with all that is known about it."""

    record: dict
    prompt_ids: list[int]
    completion: Completion
    text: str
    parsed: Parsed
    reasoning_tokens: int
    harm: float | None = None
    task: float | None = None
    reward: float | None = None  # None: unknown, the judge had no verdict
    advantage: float = 0.0
    old_logprobs: torch.Tensor | None = field(
        default=None, repr=False
    )  # (completion length,), set by the first update


def load_prompts(settings: Settings, tokenizer, context: int, leader: bool = True) -> list[dict]:
    """The mixture, each record with its `prompt_ids`, without the prompts that are too long (`lib.batches.drop_too_long`).

    Every limit in tokens is checked here, before the first step, at the longest completion there may be. `leader`: says what
    is left out. Raises UserError.
    """
    path = Path(settings.data) / "rl.jsonl"
    records = read_jsonl(path, ("id", "prompt", "kind"))
    together = 2 if settings.objective == "rpo" else 1  # a pair is in one micro-batch
    allowed = min(settings.max_prompt_tokens, context - settings.max_new_tokens)
    room = min(settings.max_batch_tokens // together, settings.max_sample_tokens) - settings.max_new_tokens
    for place, record in enumerate(records):
        if record["kind"] not in KINDS:
            raise UserError(
                f"{path}: {record['id']}: kind is {record['kind']!r}; allowed: {', '.join(KINDS)}"
            )
        record["place"] = place
        record["prompt_ids"] = encode_prompt(tokenizer, record["prompt"], reasoning=settings.reasoning)
    limits = (
        f"context {context}, --max-prompt-tokens {settings.max_prompt_tokens}, --max-new-tokens {settings.max_new_tokens}, "
        f"--max-batch-tokens {settings.max_batch_tokens}{' for a pair' * (together - 1)}, "
        f"--max-sample-tokens {settings.max_sample_tokens}"
    )
    lengths = [len(record["prompt_ids"]) for record in records]
    return drop_too_long(records, records, lengths, allowed, room, f"{path}: prompts", limits, leader)


def prompts_of_step(records: list[dict], step: int, settings: Settings) -> list[dict]:
    """Prompts of one step out of the endless stream of shuffled epochs: a function of (seed, step), so resuming is exact."""
    places = range(step * settings.prompts_per_step, (step + 1) * settings.prompts_per_step)
    orders = {e: epoch_order(len(records), settings.seed, e) for e in {p // len(records) for p in places}}
    return [records[orders[p // len(records)][p % len(records)]] for p in places]


def collect_rollouts(
    policy, tokenizer, records: list[dict], step: int, settings: Settings, processes: Processes
) -> list[Rollout]:
    """Step 2: this process's share of the prompts, G completions each.

    The seeds of all completions are drawn by every process alike and then shared out, so that a completion is the same
    whichever process samples it.
    """
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    seeds = torch.randint(2**62, (len(records), settings.group_size), generator=generator)
    if settings.objective == "rpo":  # offline: every epoch sees the same responses
        seeds = response_seeds([record["place"] for record in records], settings.group_size, settings.seed)
    mine = share(
        records, processes
    )  # in blocks, so the rollouts of all ranks, one after the other, are in the order of one
    try:
        with precision(device_of(policy), settings.dtype), gathered(policy):
            completions = sample(
                policy,
                [record["prompt_ids"] for record in mine],
                group_size=settings.group_size,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                eos_token_ids=eos_token_ids(policy, tokenizer),
                max_batch_tokens=settings.max_sample_tokens,
                seeds=sum(share(seeds.tolist(), processes), []),
                progress=processes.rank == 0,
            )
    except FloatingPointError as error:
        raise UserError(
            f"step {step}: {error}; the last checkpoint is kept: lower --learning-rate, or try another --model"
        ) from error
    rollouts = []
    for i, completion in enumerate(completions):  # prompt-major: completions of one prompt stand together
        record = mine[i // settings.group_size]
        text = decode(tokenizer, completion.token_ids)
        parsed = parse_completion(text) if settings.reasoning else parse_direct(text)
        reasoning_tokens = (
            len(tokenizer.encode(parsed.reasoning, add_special_tokens=False)) if parsed.reasoning else 0
        )
        rollouts.append(Rollout(record, record["prompt_ids"], completion, text, parsed, reasoning_tokens))
    return rollouts


def score_rollouts(rollouts: list[Rollout], judge, step: int, one_reward: bool = False) -> None:
    """Step 3, equations 1 and 2: judges see the prompt and the answer, never the reasoning.

    Where the judge has no verdict the reward is unknown, None, and that is counted. Raises UserError for a score out of
    range, before it can reach the weights.
    """
    prompts = [r.record["prompt"] for r in rollouts]
    answers = [r.parsed.answer for r in rollouts]
    harms, tasks = judge.harm_score(prompts, answers), judge.task_score(prompts, answers)
    for rollout, harm, task in zip(rollouts, harms, tasks, strict=True):
        rollout.harm, rollout.task = harm, task
        try:
            kind, well_formed = rollout.record["kind"], rollout.parsed.well_formed
            rollout.reward = total_reward(kind, rollout.harm, rollout.task, well_formed, one_reward)
        except ValueError as error:
            where = f"step {step}, prompt {rollout.record['id']}"
            raise UserError(
                f"{where}: {error}; the last checkpoint is kept: mend --judge {judge.name}"
            ) from error


def group_advantages(rewards: torch.Tensor, std_normalisation: bool, eps: float = 1e-6) -> torch.Tensor:
    """Step 4: rewards (prompts, G) -> advantages (prompts, G), fp32. The group is its own baseline (DeepSeekMath, section 4.1).

    The std is the sample's (n - 1), and eps is added to it; where all of a group are rewarded alike, all advantages are 0.
    A reward of NaN is unknown: it is left out of its group's mean and std, and its advantage is 0. So that completion moves
    the policy neither way. It stays in the batch: its KL and entropy terms count, and so do its tokens in the normaliser,
    as those of any completion of advantage 0.

    >>> group_advantages(torch.tensor([[1.0, 0.0, torch.nan], [1.0, 1.0, 1.0]]), std_normalisation=False)
    tensor([[ 0.5000, -0.5000,  0.0000],
            [ 0.0000,  0.0000,  0.0000]])
    """
    rewards = (
        rewards.double()
    )  # in fp32 the mean of eight times 1/3 is not 1/3, and eps would magnify the difference
    known = ~rewards.isnan()
    centred = (rewards - rewards.nanmean(dim=1, keepdim=True)).where(known, 0.0)
    if not std_normalisation:
        return centred.float()
    variance = (centred**2).sum(dim=1, keepdim=True) / (known.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    return (centred / (variance.sqrt() + eps)).float()


def assign_advantages(rollouts: list[Rollout], settings: Settings) -> None:
    """Step 4 for all rollouts, in whose order the completions of a prompt stand together."""
    known = [math.nan if r.reward is None else r.reward for r in rollouts]
    rewards = torch.tensor(known, dtype=torch.float64).view(-1, settings.group_size)
    for rollout, advantage in zip(
        rollouts, group_advantages(rewards, settings.std_normalisation).flatten(), strict=True
    ):
        rollout.advantage = advantage.item()


def kl_estimate(logprobs: torch.Tensor, reference_logprobs: torch.Tensor, estimator: str) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy (Schulman, "Approximating KL divergence").

    k1 is unbiased but may be negative, k2 biased and never negative, k3 unbiased and never negative ("low variance", the
    paper's). As a term of the loss they differ more: the gradient of k1 is that of log pi, zero on average over samples of
    pi, so it adds noise and pulls nowhere; that of k2 is, on average, the gradient of the KL itself; that of k3 the gradient
    of KL(reference || policy), the other direction, which is nearly the same as long as the two are near. k3 grows as
    e^gap, so it is clamped to [-10, 10], with no gradient beyond (`lib.policy.k3`).
    """
    gap = reference_logprobs - logprobs
    return {"k1": lambda: -gap, "k2": lambda: gap**2 / 2, "k3": lambda: k3(gap)}[estimator]()


def grpo_loss(
    logprobs: torch.Tensor,  # (B, T) of the policy, with gradient
    old_logprobs: torch.Tensor,  # (B, T) when the rollouts were sampled
    reference_logprobs: torch.Tensor,  # (B, T) of the frozen reference
    advantages: torch.Tensor,  # (B,)
    completion_mask: torch.Tensor,  # (B, T) bool
    weights: torch.Tensor,  # (B,) from `sequence_weights`
    settings: Settings,
) -> torch.Tensor:
    """Step 5, the objective of DeepSeekMath eq. 3 with its sign turned, a scalar to minimise; but what the sum over tokens is
    divided by is `sequence_weights`' choice. All log-probabilities are of the distribution that was sampled, at --temperature."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - settings.clip_range, 1 + settings.clip_range)
    gain = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])  # (B, T)
    kl = kl_estimate(logprobs, reference_logprobs, settings.kl_estimator)
    per_token = (settings.kl_coef * kl - gain) * completion_mask
    return (per_token.sum(dim=1) * weights).sum()


def sequence_weights(
    lengths: torch.Tensor, total_tokens: int, total_rollouts: int, settings: Settings
) -> torch.Tensor:
    """What each completion's token sum is multiplied by: (B,) lengths -> (B,). Totals are over all processes, so that
    micro-batches and processes add up to the loss of the whole batch."""
    if settings.normalisation == "token":
        return torch.full(lengths.shape, 1.0 / total_tokens)
    if settings.normalisation == "sequence":
        return 1.0 / (lengths * total_rollouts)
    return torch.full(lengths.shape, 1.0 / (settings.max_new_tokens * total_rollouts))


def update_policy(
    policy,
    reference,
    optimizer,
    rollouts: list[Rollout],
    pad_id: int,
    settings: Settings,
    processes: Processes,
):
    """Step 5: the gradient over all rollouts, this process's share summed with those of the others; `main` takes the step.

    The loss is `grpo_loss`, minus --entropy-coef times the entropy of the policy at --temperature, its tokens weighed
    as those of the loss (verl; the paper's text does not mention it).

    Returns the loss, per-token means over all processes (kl, entropy, and sampler_gap: how far the sampler's
    log-probabilities are from these) and the gradient norm before clipping.
    """
    totals = gather_objects([sum(len(r.completion.token_ids) for r in rollouts), len(rollouts)], processes)
    total_tokens, total_rollouts = (sum(column) for column in zip(*totals, strict=True))
    sums = {"loss": 0.0, "kl": 0.0, "entropy": 0.0, "sampler_gap": 0.0}
    optimizer.zero_grad()
    batches = micro_batches(
        [len(r.prompt_ids) + len(r.completion.token_ids) for r in rollouts], settings.max_batch_tokens
    )
    for indices in even_rounds(batches, policy, processes):
        batch = [rollouts[i] for i in indices] or rollouts[-1:]  # nothing left: any one, at weight 0
        lengths = [len(r.completion.token_ids) for r in batch]
        ids, attention_mask, mask = rollout_batch(batch, pad_id, device_of(policy))  # (B, T) each
        with precision(device_of(policy), settings.dtype):
            logprobs, entropy = token_logprobs(
                policy,
                ids,
                attention_mask,
                mask,
                temperature=settings.temperature,
                with_entropy=True,
                entropy_gradient=settings.has_bonus,
            )  # (B, T) each, 0 outside the mask
        with torch.no_grad(), precision(device_of(policy), settings.dtype):
            reference_logprobs = token_logprobs(
                reference, ids, attention_mask, mask, temperature=settings.temperature
            )
        old_logprobs = logprobs.detach().clone()
        for row, rollout in enumerate(batch):
            if rollout.old_logprobs is None:
                rollout.old_logprobs = old_logprobs[
                    row, mask[row]
                ]  # first update: on-policy, the ratio is exactly 1
            old_logprobs[row, mask[row]] = rollout.old_logprobs
        advantages = torch.tensor([r.advantage for r in batch], device=ids.device)
        weights = sequence_weights(torch.tensor(lengths), total_tokens, total_rollouts, settings).to(
            ids.device
        ) * bool(indices)
        loss = grpo_loss(logprobs, old_logprobs, reference_logprobs, advantages, mask, weights, settings)
        if settings.has_bonus:  # keeps samples diverse; the mean over tokens, weighed as the loss is
            loss = loss - settings.entropy_coef * (entropy.sum(dim=1) * weights).sum()
        backward(loss, policy, processes)
        if not indices:
            continue
        sampled = torch.tensor([x for r in batch for x in r.completion.logprobs], device=ids.device)
        sums["loss"] += loss.item()
        sums["kl"] += (
            kl_estimate(logprobs.detach(), reference_logprobs, settings.kl_estimator)[mask].sum().item()
        )
        sums["entropy"] += entropy[mask].sum().item()
        sums["sampler_gap"] += (logprobs.detach()[mask] - sampled).abs().sum().item()
    grad_norm = sum_and_clip(policy, settings.max_grad_norm, processes)
    everyone = gather_objects(sums, processes)
    metrics = {
        key: sum(part[key] for part in everyone) / (1 if key == "loss" else total_tokens) for key in sums
    }
    return metrics | {"grad_norm": grad_norm}


def main() -> None:
    settings = parse_settings(Settings, "rl")
    if settings.dry_run not in ("", "here"):
        longest = settings.max_prompt_tokens + settings.max_new_tokens
        return plan(
            settings.dry_run,
            settings.model,
            partial(settings.need, longest),
            models_of(settings.judge),
            disk=6,
        )
    processes = start_processes(settings.device)
    out, leader = Path(settings.out), processes.rank == 0
    check_shards(settings.shard, settings.offload, processes)
    if processes.size > settings.prompts_per_step:
        raise UserError(
            f"--prompts-per-step {settings.prompts_per_step}: fewer than the {processes.size} processes"
        )
    if stated_reasoning(settings.model) not in (None, settings.reasoning):
        raise UserError(
            f"--{'no-' if not settings.reasoning else ''}reasoning: {settings.model} was trained the other way"
        )
    settings.date = gather_objects(date_of_run(out, settings.date), processes)[0]
    set_date(settings.date)
    config = {**asdict(settings), **checksums(settings.model, Path(settings.data) / "rl.jsonl")}
    claim = partial(claim_folder, settings.out, config, overwrite=settings.overwrite, ignore=MACHINERY)
    if leader and not settings.dry_run:
        claim(begin=False)
    gather_objects(None, processes)  # what is refused here costs nobody any time
    tokenizer, judge = load_tokenizer(settings.model), load_judge(settings.judge)
    device = pick_device(settings.device, processes.local_rank)
    policy = load_model(settings, device, processes)
    reference = load_model(settings, device, processes, trained=False)
    records = load_prompts(settings, tokenizer, context_of(policy.config), leader)
    check_tokenizer(policy, tokenizer, [r["prompt"] for r in records[:8]], reasoning=settings.reasoning)
    check_ids(policy, [r["prompt_ids"] for r in records], [r["id"] for r in records])
    if settings.overwrite or not is_finished(
        out
    ):  # what does not fit ends here, not when the longest rollouts come
        for score in (judge.harm_score, judge.task_score):  # loads its models: they take memory, too
            score([records[0]["prompt"]], [f"no {time.time_ns()}"])  # which no cache of verdicts knows
        prompt_tokens = max(len(record["prompt_ids"]) for record in records)
        need = settings.need(prompt_tokens + settings.max_new_tokens, processes.size)
        rehearse(policy, reference, need, prompt_tokens, processes)
    if (
        leader and not settings.dry_run
    ):  # after all inputs have been read: a mistake in one must not cost an earlier run
        claim()
    gather_objects(None, processes)  # nobody reads the folder before it is claimed
    following = next_command("04_attack_eval.py", settings, "rl", data=settings.data, **model_and_out(out))
    if is_finished(out) and not settings.dry_run:
        print(f"{out} is finished. Next: {following}" * leader)
        return stop_processes()
    total = max(1, round(settings.epochs * len(records) / settings.prompts_per_step))
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        lr=settings.learning_rate,
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
    )
    logs = ["metrics.jsonl", "rollouts.jsonl"]
    start = 0 if settings.dry_run else load_progress(out, policy, optimizer, processes, logs)["step"]
    if leader:
        print(
            f"read {len(records)} prompts from {settings.data}; policy and reference {settings.model}; judge {settings.judge}"
        )
        amount = f"{total} steps of {settings.prompts_per_step} x {settings.group_size} on {processes.size} x {device}"
        print(f"{amount}; writing to {out}")

    rpo = settings.objective == "rpo"
    sampler, update_model = (reference, update_on_preferences) if rpo else (policy, update_policy)
    silent = 0  # steps in a row without a signal
    bar = tqdm(
        range(start, total), "RPO" if rpo else "RL", total, initial=start, unit="step", disable=not leader
    )
    for step in bar:
        clock = [time.perf_counter()]
        rollouts = collect_rollouts(
            sampler, tokenizer, prompts_of_step(records, step, settings), step, settings, processes
        )
        clock.append(time.perf_counter())
        score_rollouts(rollouts, judge, step, settings.one_reward)
        assign_advantages(rollouts, settings)
        clock.append(time.perf_counter())
        rate = set_learning_rate(
            optimizer, settings.learning_rate, step, settings.warmup_steps, total, settings.decay
        )
        for _ in range(settings.updates_per_batch):
            update = update_model(
                policy, reference, optimizer, rollouts, tokenizer.pad_token_id, settings, processes
            )
            finite_or_stop("loss", update["loss"], step, out)
            finite_or_stop("gradient norm", update["grad_norm"], step, out)
            if (
                update.get("pairs") != 0
            ):  # without a pair there is nothing to learn, see update_on_preferences
                optimizer.step()
        optimizer.zero_grad()  # not only before the next gradient: sampling needs the memory
        clock.append(time.perf_counter())
        described = [
            r for part in gather_objects([describe(r, step) for r in rollouts], processes) for r in part
        ]
        summary = summarise(described, settings.group_size, settings.one_reward)
        metrics = {"step": step, **summary, **update, "learning_rate": rate, **speed(described, clock)}
        if settings.dry_run:
            if leader:
                print(forecast(metrics, total, settings.max_new_tokens))
            return stop_processes()
        silent = silent + 1 if summary["zero_advantage_groups"] == settings.prompts_per_step else 0
        if leader and silent == SILENT:
            bar.write(no_signal(metrics, silent), file=sys.stderr)
        bar.set_postfix(
            {
                key: f"{metrics[key]:.2f}"
                for key in ("reward", "format_rate", "kl")
                if metrics[key] is not None
            }
        )
        if leader:
            append_jsonl(out / "metrics.jsonl", metrics)
            if step % settings.rollouts_every == 0:
                for shown in described[
                    : 2 * settings.group_size
                ]:  # whole groups: each completion beside its rivals
                    append_jsonl(out / "rollouts.jsonl", shown)
        if (step + 1) % settings.save_every == 0:
            save_progress(out, step + 1, policy, optimizer, processes)
    weights = full_weights(policy)
    if leader:
        save_policy(policy, tokenizer, out, weights)
        finish(out)
        print(f"wrote {out}. Next: {following}")
    stop_processes()


if __name__ == "__main__":
    run_main(main)
