r"""Chapter 3: reinforcement learning, pi_SFT -> pi_TARS (paper section 4.3, stage III).

The model writes several answers to each prompt, a judge rewards them, and what was better than its rivals
becomes more likely. Nobody shows it how to reason: a harmful prompt pays for safety and a harmless one for
help, so it pays to find out first which of the two a prompt is. This is GRPO by hand. For every step:

    1. take `prompts_per_step` prompts of the mixture                      -> lib.batches.items_of_step
    2. sample a group of G completions of each from the policy             -> collect_rollouts
    3. reward r = r_f * r_s on harmful prompts, r_f * r_n on others        -> score_rollouts (eq. 1 and 2)
       (r_f: the format was kept; r_s: the answer is safe; r_n: it does what was asked)
    4. advantage A = (r - mean of its group) / (std of its group + eps)    -> assign_advantages
    5. one step down the gradient of  -A * ratio + kl_coef * KL            -> grpo_loss, update_policy
    6. log, with whole groups to read, and save                            -> run.log, run.steps

The ratio, pi / pi_old of a token, is clipped. It is 1 at first; its gradient is that of log pi, since pi_old
is a constant. (`run` is the plumbing: lib/run/__init__.py has a line for each method called here.)

What is *not* here: no value network (the group's mean is the baseline); no old-policy pass (rollouts are used
once: the ratio is 1; `--updates-per-batch 2` takes the whole batch twice, and the clip acts); no KL in the
reward (it is a term of the loss); no advantage of a single token. For DPO: `python -m lib.compare.rpo`.

    python 03_rl_train.py --preset sandbox --data runs/demo/mixture --model runs/demo/sft --out runs/demo/rl
    torchrun --nproc-per-node 4 03_rl_train.py --preset paper

Reads DATA/rl.jsonl. Writes a Hugging Face checkpoint, metrics.jsonl, rollouts.jsonl and curves.png to OUT. A
step is a function of the saved state and (seed, step): a killed run goes on, on a CPU with the same bits.

**What you should see** (sandbox, seed 0, a minute): the reward climbs from 0.3 to about 0.9 in 50 of 75
steps. A group has a signal if two of its rewards differ: of a step's 16, about 12 at first, 7 at the end.
Refusals rise from 0.5 to 0.9 on harmful prompts, and fall from 0.5 to 0 on all others. Read rollouts.jsonl:
the early groups disagree with themselves about what a prompt is, the late ones do not.

To think about: why must the harmless prompts be in the mixture, when all that is wanted is safety? And what
would the policy learn from a group in which all eight rewards are 0?
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.batches import items_of_step, scatter
from lib.chat import Parsed, decode, encode_text, eos_token_ids, parse_completion, parse_direct
from lib.judges import load_judge
from lib.policy import k3, token_logprobs
from lib.report import draw_curves
from lib.rewards import total_reward
from lib.run import run_main, start
from lib.run.data import Prompt, load_prompts
from lib.run.hub import load_tokenizer
from lib.run.settings import TOKENS, Training, setting
from lib.sampler import Completion, sample


@dataclass
class Settings(Training):  # defaults: the paper's; the preset, `sandbox` if none is given, has its own
    model: str = setting("runs/demo/sft", "pi_SFT, also the frozen reference: a folder or a hub name")
    judge: str = setting("sandbox", "sandbox, standin, your.module, or HARM+TASK. Paper: moderation API, GRM")
    refusals: str = setting("phrases", "who labels them, for the log: phrases, strongreject, your.module")
    one_reward: bool = setting(False, "r_n for all prompts, harmful ones too (F7 in docs/results.md)")
    # rollouts
    prompts_per_step: int = setting(32, "prompts a step, over all processes. Paper: 32", low=1)
    group_size: int = setting(8, "completions a prompt, G. Paper: 8", low=2)
    temperature: float = setting(0.6, "of sampling. Paper: 0.6", low=0.01, high=10.0)
    max_new_tokens: int = setting(4096, "tokens of a completion, reasoning included. Paper: 4096", low=1)
    max_prompt_tokens: int = setting(512, "prompts of more are left out. Paper: 512", low=1, flag=False)
    max_sample_tokens: int = setting(0, "rows x columns of the cache; 0: what fits", low=0, high=TOKENS)
    # updates
    learning_rate: float = setting(1e-6, "peak rate of AdamW. Paper: 1e-6", low=0.0, high=1.0)
    weight_decay: float = setting(0.01, "of AdamW. Paper: verl's default, 0.01", low=0.0, flag=False)
    epochs: float = setting(3.0, "passes over the prompts; may be a fraction. Paper: 3", low=0.01)
    updates_per_batch: int = setting(1, "updates on each batch of rollouts. Paper: 1 (on-policy)", low=1)
    rollouts_every: int = setting(5, "steps between groups in rollouts.jsonl", low=1, flag=False)
    # what people vary
    normalisation: str = setting("token", "of the loss", choices=("token", "sequence", "constant"))
    std_normalisation: bool = setting(True, "divide advantages by the group's std (paper); no: Dr. GRPO")
    kl_estimator: str = setting("k3", "of KL(policy || reference). Paper: k3", choices=("k1", "k2", "k3"))
    kl_coef: float = setting(1e-3, "weight of the KL term. Paper: 1e-3", low=0.0)
    entropy_coef: float = setting(0.0, "weight of an entropy bonus. Authors' script: 1e-3", low=0.0)
    clip_range: float = setting(0.2, "epsilon of the clipped ratio; idle at one update a batch", low=0.0)

    def inputs(self) -> list[str]:
        return [self.model, f"{self.data}/rl.jsonl"]


@dataclass
class Rollout:
    """One completion of one prompt, with all that is known about it."""

    record: dict  # of its prompt: id, prompt, kind, source
    ids: list[int]  # (T,) of prompt and completion
    mask: list[bool]  # (T,) True on what is learned: the completion
    completion: Completion
    text: str
    parsed: Parsed
    reasoning_tokens: int
    refusal: str | None = None  # full, partial or none: for the log alone
    harm: float | None = None
    task: float | None = None
    reward: float | None = None  # None: unknown, the judge had no verdict
    advantage: float = 0.0
    old_logprobs: Tensor | None = None  # (completion length,), set by the first update


# ---- step 2: rollouts ----
def collect_rollouts(policy, tokenizer, prompts: list[Prompt], step, settings, run) -> list[Rollout]:
    """This process's share of the prompts, G completions each; those of one prompt stand together.

    All processes draw all seeds: up to rounding a completion is the same whichever process samples it.
    """
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    seeds = torch.randint(2**62, (len(prompts), settings.group_size), generator=generator)
    prompts = run.share(prompts)
    with run.sampling(policy):
        completions = sample(
            policy,
            [prompt.ids for prompt in prompts],
            group_size=settings.group_size,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            eos_token_ids=eos_token_ids(policy, tokenizer),
            max_batch_tokens=settings.max_sample_tokens or None,
            seeds=[seed for group in run.share(seeds.tolist()) for seed in group],
            progress=run.leader,
        )
    rollouts = []
    for i, completion in enumerate(completions):
        prompt, text = prompts[i // settings.group_size], decode(tokenizer, completion.token_ids)
        parsed = parse_completion(text) if settings.reasoning else parse_direct(text)
        reasoning_tokens = len(encode_text(tokenizer, parsed.reasoning))
        ids = prompt.ids + completion.token_ids
        mask = [False] * len(prompt.ids) + [True] * len(completion.token_ids)
        rollouts.append(Rollout(prompt.record, ids, mask, completion, text, parsed, reasoning_tokens))
    return rollouts


# ---- step 3: rewards ----
def score_rollouts(rollouts: list[Rollout], judge, one_reward: bool = False) -> None:
    """Equations 1 and 2: judges see the prompt and the answer, not the reasoning before </think>.

    A well-formed completion without a verdict has reward None: unknown. A score out of range ends the run.
    """
    prompts = [r.record["prompt"] for r in rollouts]
    answers = [r.parsed.answer for r in rollouts]
    harms, tasks = judge.harm_score(prompts, answers), judge.task_score(prompts, answers)
    labels = judge.refusal_labels(prompts, answers)
    for rollout, harm, task, label in zip(rollouts, harms, tasks, labels, strict=True):
        rollout.harm, rollout.task, rollout.refusal = harm, task, label
        kind, well_formed = rollout.record["kind"], rollout.parsed.well_formed
        rollout.reward = total_reward(kind, harm, task, well_formed, one_reward)


# ---- step 4: advantages ----
def group_advantages(rewards: Tensor, std_normalisation: bool, eps: float = 1e-6) -> Tensor:
    """Rewards (prompts, G) -> advantages, fp32: the group is its own baseline (DeepSeekMath, 4.1).

    The std is the sample's (n - 1). Where all of a group are rewarded alike, all advantages are 0. An unknown
    reward, NaN, is in no mean and no std; its advantage is 0, too: only KL and entropy act on it.

    >>> group_advantages(torch.tensor([[1.0, 0.0, torch.nan], [1.0, 1.0, 1.0]]), std_normalisation=False)
    tensor([[ 0.5000, -0.5000,  0.0000],
            [ 0.0000,  0.0000,  0.0000]])
    """
    ### BEGIN SOLUTION advantages
    rewards = rewards.double()  # in fp32 eight times 1/3 has a std near 0, but not 0, to divide by
    known = ~rewards.isnan()
    centred = (rewards - rewards.nanmean(dim=1, keepdim=True)).where(known, 0.0)
    if not std_normalisation:
        return centred.float()
    variance = (centred**2).sum(dim=1, keepdim=True) / (known.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    return (centred / (variance.sqrt() + eps)).float()
    ### END SOLUTION


def assign_advantages(rollouts: list[Rollout], settings: Settings) -> None:
    """One advantage a completion. To give each token its own (a value network, a process reward) change this,
    `Rollout.advantage`, its tensor in `update_policy` (by `scatter`), and `[:, None]` in `grpo_loss`.
    """
    rewards = [math.nan if r.reward is None else r.reward for r in rollouts]
    groups = torch.tensor(rewards, dtype=torch.float64).view(-1, settings.group_size)
    advantages = group_advantages(groups, settings.std_normalisation).flatten().tolist()
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        rollout.advantage = advantage


# ---- step 5: the update (`sequence_weights` and `kl_estimate`, which people vary, end this file) ----
def grpo_loss(
    logprobs: Tensor,  # (B, T) of the policy, with gradient
    old_logprobs: Tensor,  # (B, T) before the first update on these rollouts
    reference_logprobs: Tensor,  # (B, T) of the frozen reference
    advantages: Tensor,  # (B,)
    completion_mask: Tensor,  # (B, T) bool
    weights: Tensor,  # (B,) from `sequence_weights`
    settings: Settings,
) -> Tensor:
    """The negative of DeepSeekMath's eq. 3, weighed by `sequence_weights`. For another objective, begin here.

    All log-probabilities are of the distribution that was sampled, at --temperature. The KL is not weighed by
    the ratio: from the second update on a batch it is an estimate from slightly older samples.
    """
    ### BEGIN SOLUTION grpo_loss
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - settings.clip_range, 1 + settings.clip_range)
    gain = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])  # (B, T)
    kl = kl_estimate(logprobs, reference_logprobs, settings.kl_estimator)
    per_token = (settings.kl_coef * kl - gain) * completion_mask
    return (per_token.sum(dim=1) * weights).sum()
    ### END SOLUTION


def update_policy(policy, reference, optimizer, rollouts: list[Rollout], pad_id, settings, run) -> dict:
    """One step on all rollouts. Gradients of micro-batches, and of processes, add up to that of the batch.

    Returns the loss, means per token over all processes (kl, entropy, and sampler_gap: how far old_logprobs
    are from what the sampler computed for the same tokens), and the gradient norm before clipping.
    """
    ### BEGIN SOLUTION update_policy
    total_tokens = run.total(sum(len(r.completion.token_ids) for r in rollouts))
    total_rollouts = run.total(len(rollouts))
    sums = dict.fromkeys(("loss", "kl", "entropy", "sampler_gap"), 0.0)
    bonus = settings.entropy_coef
    options = {"temperature": settings.temperature}
    for batch, ids, attention_mask, mask in run.micro_batches(rollouts, pad_id, settings.max_batch_tokens):
        logprobs, entropy = token_logprobs(
            policy, ids, attention_mask, mask, **options, with_entropy=True, entropy_gradient=bonus > 0
        )  # (B, T) each, and so is all that comes of them, 0 outside the mask
        with torch.no_grad():
            reference_logprobs = token_logprobs(reference, ids, attention_mask, mask, **options)
        for rollout, row, where in zip(batch, logprobs.detach(), mask, strict=True):
            if rollout.old_logprobs is None:
                rollout.old_logprobs = row[where]  # first update: on-policy, the ratio is exactly 1
        old_logprobs = scatter([r.old_logprobs for r in batch], mask)
        sampled_logprobs = scatter([torch.tensor(r.completion.logprobs) for r in batch], mask)
        advantages = torch.tensor([r.advantage for r in batch], device=ids.device)
        lengths = torch.tensor([len(r.completion.token_ids) for r in batch], device=ids.device)
        weights = sequence_weights(lengths, total_tokens, total_rollouts, settings)
        loss = grpo_loss(logprobs, old_logprobs, reference_logprobs, advantages, mask, weights, settings)
        if bonus > 0:  # keeps samples diverse; weighed as the loss is (verl)
            loss = loss - bonus * (entropy.sum(dim=1) * weights).sum()
        run.backward(loss)
        sums["loss"] += loss.item()
        kl = kl_estimate(logprobs.detach(), reference_logprobs, settings.kl_estimator)
        sums["kl"] += kl[mask].sum().item()
        sums["entropy"] += entropy[mask].sum().item()
        sums["sampler_gap"] += (old_logprobs - sampled_logprobs)[mask].abs().sum().item()
    sums = run.total(sums)
    means = {name: value if name == "loss" else value / total_tokens for name, value in sums.items()}
    return means | {"grad_norm": run.clip_and_step(optimizer, sums["loss"])}  # stops if either is not finite
    ### END SOLUTION


# ---- the algorithm ----
def main() -> None:
    settings, run = start(Settings, "rl")
    tokenizer, judge = load_tokenizer(settings.model), load_judge(settings.judge, settings.refusals)
    policy, reference = run.model(settings.model), run.model(settings.model, frozen=True)
    prompts, pad_id = load_prompts(run, tokenizer, policy), tokenizer.pad_token_id
    run.say(f"{len(prompts)} prompts of {settings.data}; pi_SFT {settings.model}, judge {settings.judge}")
    # What does not fit into memory fails now: the judge (it loads at its first answer), the largest batch.
    for score in (judge.harm_score, judge.task_score, judge.refusal_labels):
        score([prompts[0].record["prompt"]], ["No."])
    longest = max(len(prompt.ids) for prompt in prompts)
    rows = len(run.share(range(settings.prompts_per_step))) * settings.group_size
    run.rehearse(policy, reference, rows=rows, longest=longest + settings.max_new_tokens)

    optimizer = torch.optim.AdamW(policy.parameters(), **run.adamw)
    total = max(1, round(settings.epochs * len(prompts) / settings.prompts_per_step))
    for step in run.steps(total, policy, optimizer, "RL"):  # resumes, sets the rate, saves
        chosen = items_of_step(prompts, step, settings.prompts_per_step, settings.seed)
        rollouts = collect_rollouts(policy, tokenizer, chosen, step, settings, run)
        run.lap("sample")
        score_rollouts(rollouts, judge, settings.one_reward)
        # Not here: to sample other prompts for groups whose rewards are all alike (DAPO's dynamic sampling).
        assign_advantages(rollouts, settings)
        run.lap("reward")
        for _ in range(settings.updates_per_batch):
            stats = update_policy(policy, reference, optimizer, rollouts, pad_id, settings, run)
        run.lap("train")
        run.log(step, stats, rollouts)
    run.finish(policy, tokenizer, draw_curves)


# ---- what people vary ----
def sequence_weights(lengths: Tensor, total_tokens: int, total_rollouts: int, settings: Settings) -> Tensor:
    """What each completion's sum over tokens is multiplied by: lengths (B,) -> (B,) fp32.

    token: 1 / (tokens of the batch) (verl, DAPO; paper). sequence: 1 / (completions * this one's length), so
    a token of a long one weighs less (GRPO, DeepSeekMath eq. 3). constant: 1 / (completions *
    max_new_tokens) (Dr. GRPO).
    """
    if settings.normalisation == "token":
        return torch.full_like(lengths, 1.0 / total_tokens, dtype=torch.float32)
    if settings.normalisation == "sequence":
        return 1.0 / (lengths * total_rollouts)
    return torch.full_like(lengths, 1.0 / (settings.max_new_tokens * total_rollouts), dtype=torch.float32)


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate of KL(policy || reference) per token, from samples of the policy (Schulman 2020), (B, T).

    k1 is unbiased but may be negative, k2 biased and never negative, k3 unbiased and never negative ("low
    variance", the paper's). As a term of the loss they differ more, by their gradient's mean over samples of
    pi. That of k1 is 0, since its gradient is that of log pi: it adds noise and pulls nowhere. That of k2 is
    the gradient of the KL itself. That of k3 is the gradient of KL(reference || policy), which is nearly the
    same as long as the two are near. k3 grows as e^gap, so `lib.policy.k3` clamps it.
    """
    ### BEGIN SOLUTION kl
    gap = reference_logprobs - logprobs
    if estimator == "k1":
        return -gap
    return gap**2 / 2 if estimator == "k2" else k3(gap)
    ### END SOLUTION


if __name__ == "__main__":
    run_main(main)
