"""RPO, the paper's comparison with RL: the same prompts, samples and rewards, learned from as preferences.

DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) needs no sampling from the policy: of two answers y_w and
y_l to x, of which the first is preferred, it raises the one against the other, as seen from the frozen
reference:

    h(x, y) = log pi(y | x) - log pi_ref(y | x)
    L_DPO = -log sigmoid(beta (h(x, y_w) - h(x, y_l)))

Only the difference counts, so both may become less likely. RPO (Pang et al. 2024, arXiv 2404.19733, eq. 1)
adds alpha times the negative log-likelihood of y_w, divided by its length. Paper: beta 0.01, alpha 3, 8
responses and 4 pairs a prompt.

    python -m lib.compare.rpo --preset sandbox --data runs/demo/data --model runs/demo/sft --out runs/demo/rpo

**Offline.** Responses are the reference's own, the same in every epoch. They are sampled anew instead of
stored, with seeds that depend on the prompt's place in the data alone: a step costs what one of GRPO costs.

**Temperature.** A sequence's log-probability is the sum over its tokens at temperature 1, however it was
sampled: the loss is about the model, and the sampling only picks what is compared.

What it writes, and how it resumes, is as in 03_rl_train.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib.batches import items_of_step, masked_batch
from lib.chat import Parsed, decode, encode_text, eos_token_ids, parse_completion, parse_direct
from lib.judges import load_judge, refusal_label
from lib.policy import k3, token_logprobs
from lib.report import draw_curves
from lib.rewards import total_reward
from lib.run import run_main, start
from lib.run.data import load_prompts
from lib.run.hub import load_tokenizer
from lib.run.settings import TOKENS, Training, setting
from lib.sampler import Completion, sample

TIE = 1e-6  # rewards nearer than this say nothing


@dataclass
class Settings(Training):
    model: str = setting("runs/demo/sft", "pi_SFT, also the frozen reference: a folder or a hub name")
    judge: str = setting("sandbox", "as in 03_rl_train.py")
    prompts_per_step: int = setting(4, "prompts a step, over all processes. Paper: 4", low=1, high=10_000)
    group_size: int = setting(8, "responses a prompt: half as many pairs. Paper: 8", low=2, high=1000)
    temperature: float = setting(0.6, "of sampling. Paper: 0.6", low=0.01, high=10.0)
    max_new_tokens: int = setting(4096, "tokens of a response. Paper: 4096", low=1)
    max_prompt_tokens: int = setting(512, "prompts of more are left out", low=1, flag=False)
    max_sample_tokens: int = setting(0, "rows x columns of the sampling cache; 0: what fits", high=TOKENS)
    learning_rate: float = setting(3e-4, "peak rate of AdamW. Paper: 3e-4", low=0.0, high=1.0)
    epochs: float = setting(3.0, "passes over the prompts. Paper: 3", low=0.01, high=1000.0)
    rollouts_every: int = setting(5, "steps between groups in rollouts.jsonl", low=1, flag=False)
    rpo_beta: float = setting(0.01, "beta of DPO. Paper: 0.01", low=0.0, high=1000.0)
    rpo_alpha: float = setting(3.0, "weight of the chosen one's NLL. Paper: 3", low=0.0, high=1000.0)

    def inputs(self) -> list[str]:
        return [self.model, f"{self.data}/rl.jsonl"]


@dataclass
class Response:
    """What rollouts.jsonl shows of it, and what the loss needs."""

    record: dict  # of its prompt
    ids: list[int]  # (T,) of prompt and completion
    mask: list[bool]  # (T,) True on the completion
    completion: Completion
    text: str
    parsed: Parsed
    reasoning_tokens: int
    refusal: str
    harm: float | None = None
    task: float | None = None
    reward: float | None = None
    advantage: float = 0.0  # has none


def collect_responses(reference, tokenizer, prompts, judge, settings, run) -> list[Response]:
    """G responses to each prompt of this process's share, with rewards; those of one prompt together."""
    prompts, seeds, size = run.share(prompts), [], settings.group_size
    for prompt in prompts:  # by its place in the data: the same in every epoch
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + prompt.place)
        seeds += torch.randint(2**62, (size,), generator=generator).tolist()
    with run.sampling(reference):
        completions = sample(
            reference,
            [prompt.ids for prompt in prompts],
            group_size=size,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            eos_token_ids=eos_token_ids(reference, tokenizer),
            max_batch_tokens=settings.max_sample_tokens or None,
            seeds=seeds,
            progress=run.leader,
        )
    run.lap("sample")
    responses = []
    for i, completion in enumerate(completions):
        prompt, text = prompts[i // size], decode(tokenizer, completion.token_ids)
        parsed = parse_completion(text) if settings.reasoning else parse_direct(text)
        tokens, refusal = len(encode_text(tokenizer, parsed.reasoning)), refusal_label(parsed.answer)
        ids = prompt.ids + completion.token_ids
        mask = [False] * len(prompt.ids) + [True] * len(completion.token_ids)
        responses.append(Response(prompt.record, ids, mask, completion, text, parsed, tokens, refusal))
    asked, answers = [r.record["prompt"] for r in responses], [r.parsed.answer for r in responses]
    scores = zip(responses, judge.harm_score(asked, answers), judge.task_score(asked, answers), strict=True)
    for response, harm, task in scores:
        response.harm, response.task = harm, task
        response.reward = total_reward(response.record["kind"], harm, task, response.parsed.well_formed)
    run.lap("reward")
    return responses


def preference_pairs(rewards: Sequence[float | None], group_size: int) -> tuple[list[tuple[int, int]], int]:
    """(index of the chosen, of the rejected) of each pair, and how many pairs were ties and left out.

    `rewards` are of one group of `group_size` after the other. In each the best is paired with the worst, the
    second best with the second worst, and so on: G/2 pairs (of an odd group the middle one is in none). None,
    a reward that is unknown because the judge had no verdict, is in no pair.

    >>> preference_pairs([0.2, 1.0, 0.0, 0.9], group_size=4)
    ([(1, 2), (3, 0)], 0)
    >>> preference_pairs([1.0, 1.0, 0.0, 1.0], group_size=4)
    ([(0, 2)], 1)
    """
    pairs, ties = [], 0
    for start_ in range(0, len(rewards), group_size):
        known = {i: reward for i in range(start_, start_ + group_size) if (reward := rewards[i]) is not None}
        best_first = sorted(known, key=lambda i: -known[i])  # stable: the same everywhere
        for chosen, rejected in zip(best_first[: len(known) // 2], best_first[::-1], strict=False):
            if known[chosen] - known[rejected] < TIE:
                ties += 1
            else:
                pairs.append((chosen, rejected))
    return pairs, ties


def rpo_loss(
    chosen: Tensor,  # (P,) log pi(y_w | x), with gradient
    rejected: Tensor,  # (P,) log pi(y_l | x), with gradient
    reference_chosen: Tensor,  # (P,) log pi_ref(y_w | x)
    reference_rejected: Tensor,  # (P,) log pi_ref(y_l | x)
    chosen_lengths: Tensor,  # (P,) tokens of y_w
    beta: float,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """RPO eq. 1: the loss of each pair, and its margin beta (h_w - h_l), (P,) each; at first 0."""
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return -torch.nn.functional.logsigmoid(margin) - alpha * chosen / chosen_lengths, margin


def update_on_preferences(policy, reference, optimizer, responses, pad_id, settings, run) -> dict[str, Any]:
    """One step on the mean loss over the pairs of all processes. The two of a pair are in one micro-batch.

    Without any pair no step is taken: that of AdamW would still be one of weight decay and old momentum.
    pair_accuracy is the share of margins > 0; entropy and kl are means over the pairs' tokens. These are
    samples of the reference, so kl is k3 of KL(reference || policy), at the sampling temperature roughly.
    """
    pairs, ties = preference_pairs([r.reward for r in responses], settings.group_size)
    counts = run.total({"pairs": len(pairs), "tied_pairs": ties})
    if not counts["pairs"]:
        unknown = dict.fromkeys(("kl", "entropy", "pair_accuracy", "margin"))
        return {"loss": 0.0, **unknown, **counts, "grad_norm": 0.0}
    sums = dict.fromkeys(("loss", "kl", "entropy", "pair_accuracy", "margin", "tokens"), 0.0)
    prompts = [responses[i].ids[: responses[i].mask.index(True)] for i, _ in pairs]
    sizes = [2 * max(len(responses[i].ids) for i in pair) for pair in pairs]
    for indices in run.rounds(sizes, settings.max_batch_tokens, prompts):
        batch = [pairs[i] for i in indices] or [(0, 0)]
        rows = [responses[i] for pair in batch for i in pair]  # chosen, rejected, chosen, ...
        tensors = masked_batch([r.ids for r in rows], [r.mask for r in rows], pad_id, run.device)
        ids, attention_mask, mask = tensors  # (2P, T) each
        mask = mask & bool(indices)  # under shards a process may pass with nothing to learn
        logprobs, entropy = token_logprobs(policy, ids, attention_mask, mask, with_entropy=True)  # (2P, T)
        with torch.no_grad():
            reference_logprobs = token_logprobs(reference, ids, attention_mask, mask)
        pi_w, pi_l = logprobs.sum(1).view(-1, 2).unbind(1)  # (P,) each
        ref_w, ref_l = reference_logprobs.sum(1).view(-1, 2).unbind(1)
        lengths = torch.tensor([len(r.completion.token_ids) for r in rows[::2]], device=ids.device)
        losses, margin = rpo_loss(pi_w, pi_l, ref_w, ref_l, lengths, settings.rpo_beta, settings.rpo_alpha)
        loss = losses.sum() / counts["pairs"] * bool(indices)
        run.backward(loss)
        found = {"loss": loss, "kl": k3((logprobs - reference_logprobs)[mask]).sum(), "tokens": mask.sum()}
        found |= {"entropy": entropy[mask].sum(), "pair_accuracy": (margin > 0).sum(), "margin": margin.sum()}
        sums = {name: sums[name] + found[name].item() for name in sums}
    sums = run.total(sums)
    per = {"loss": 1, "kl": sums["tokens"], "entropy": sums["tokens"]}
    means = {key: sums[key] / per.get(key, counts["pairs"]) for key in sums if key != "tokens"}
    return {**means, **counts, "grad_norm": run.clip_and_step(optimizer, sums["loss"])}


def main() -> None:
    settings, run = start(Settings, "rl", "rpo")
    tokenizer, judge = load_tokenizer(settings.model), load_judge(settings.judge)
    policy, reference = run.model(settings.model), run.model(settings.model, frozen=True)
    prompts = load_prompts(run, tokenizer, policy)
    run.say(f"read {len(prompts)} prompts from {settings.data}; policy and reference {settings.model}")
    for score in (judge.harm_score, judge.task_score):  # it loads now, before memory is shared out
        score([prompts[0].record["prompt"]], ["No."])
    longest, pad_id = max(len(prompt.ids) for prompt in prompts), tokenizer.pad_token_id
    rows = len(run.share(range(settings.prompts_per_step))) * settings.group_size
    run.rehearse(policy, reference, rows, longest + settings.max_new_tokens, together=2)  # a pair

    optimizer = torch.optim.AdamW(policy.parameters(), **run.adamw)
    total = max(1, round(settings.epochs * len(prompts) / settings.prompts_per_step))
    for step in run.steps(total, policy, optimizer, "RPO"):
        chosen = items_of_step(prompts, step, settings.prompts_per_step, settings.seed)
        responses = collect_responses(reference, tokenizer, chosen, judge, settings, run)
        stats = update_on_preferences(policy, reference, optimizer, responses, pad_id, settings, run)
        run.lap("train")
        run.log(step, stats, responses)
    run.finish(policy, tokenizer, draw_curves)


if __name__ == "__main__":
    run_main(main)
