"""RPO, the paper's comparison with RL: the same prompts, samples and rewards, but learned from as preferences.

DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) needs no sampling from the policy: of two answers y_w and y_l to x,
of which the first is preferred, it raises the one against the other, as seen from the frozen reference:

    h(x, y) = log pi(y | x) - log pi_ref(y | x)
    L_DPO = -log sigmoid(beta (h(x, y_w) - h(x, y_l)))

Only the difference counts, so both may become less likely. RPO (Pang et al. 2024, arXiv 2404.19733, eq. 1) adds alpha times
the negative log-likelihood of y_w, divided by its length. Paper: beta 0.01, alpha 3, 8 responses and 4 pairs a prompt.

**Offline.** Responses are pi_SFT's, the reference's own, and the same in every epoch. They are sampled anew each time
instead of stored: their seeds depend on the prompt's place in the data alone, so nothing has to be kept, and a step costs what
one of GRPO costs.

**Temperature.** A sequence's log-probability is the sum over its tokens at temperature 1, whatever the temperature of
sampling: the loss is about the model, and the sampling only picks what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lib.batches import micro_batches, rollout_batch
from lib.policy import k3, token_logprobs
from lib.run.processes import Processes, gather_objects
from lib.run.shards import backward, device_of, even_rounds, sum_and_clip
from lib.run.training import precision

TIE = 1e-6  # rewards nearer than this say nothing


def response_seeds(places: Sequence[int], group_size: int, seed: int) -> Tensor:
    """Seeds of the responses to the prompts at these places in the data, (prompts, G) int64: the same in every epoch."""
    generators = (torch.Generator().manual_seed(seed * 1_000_003 + place) for place in places)
    return torch.stack([torch.randint(2**62, (group_size,), generator=generator) for generator in generators])


def preference_pairs(rewards: Sequence[float | None], group_size: int) -> tuple[list[tuple[int, int]], int]:
    """(index of the chosen, of the rejected) of each pair, and how many pairs were ties and left out.

    `rewards` are of one group of `group_size` after the other. In each the best is paired with the worst, the second best
    with the second worst, and so on: G/2 pairs (of an odd group the middle one is in none). None, a reward that is unknown
    because the judge had no verdict, is in no pair.

    >>> preference_pairs([0.2, 1.0, 0.0, 0.9], group_size=4)
    ([(1, 2), (3, 0)], 0)
    >>> preference_pairs([1.0, 1.0, 0.0, 1.0], group_size=4)
    ([(0, 2)], 1)
    """
    pairs, ties = [], 0
    for start in range(0, len(rewards), group_size):
        known = {i: reward for i in range(start, start + group_size) if (reward := rewards[i]) is not None}
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
    """RPO eq. 1: the loss of each pair, and its margin beta (h_w - h_l), (P,) each. At the start the margin is 0."""
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return -torch.nn.functional.logsigmoid(margin) - alpha * chosen / chosen_lengths, margin


def update_on_preferences(
    policy, reference, optimizer, rollouts: Sequence[Any], pad_id: int, settings: Any, processes: Processes
) -> dict[str, Any]:
    """The gradient of the mean loss over the pairs of all processes; the caller takes the step.

    `rollouts` (03_rl_train.Rollout) are this process's, group by group, with their rewards; the two of a pair are in one
    micro-batch. Without any pair there is no gradient, "pairs" is 0, and the caller must take no step: that of AdamW would
    still be one of weight decay and old momentum.

    Returns loss, pairs, tied_pairs, pair_accuracy (share of margins > 0: before the first step there are none), margin, the
    gradient norm before clipping, and means over the pairs' tokens of entropy and kl: k3 of KL(reference || policy), since
    these tokens are samples of the reference (at the sampling temperature, so it is roughly that).
    """
    pairs, ties = preference_pairs([r.reward for r in rollouts], settings.group_size)
    totals = gather_objects([len(pairs), ties], processes)
    total, total_ties = (sum(column) for column in zip(*totals, strict=True))
    counts = {"pairs": total, "tied_pairs": total_ties}
    optimizer.zero_grad()
    if not total:
        nothing = dict.fromkeys(("kl", "entropy", "pair_accuracy", "margin"))
        return {"loss": 0.0, **nothing, **counts, "grad_norm": 0.0}
    sums = dict.fromkeys(("loss", "kl", "entropy", "pair_accuracy", "margin", "tokens"), 0.0)
    sizes = [
        2 * max(len(rollouts[i].prompt_ids) + len(rollouts[i].completion.token_ids) for i in pair)
        for pair in pairs
    ]
    for indices in even_rounds(micro_batches(sizes, settings.max_batch_tokens), policy, processes):
        batch = [pairs[i] for i in indices] or [(0, 0)]  # nothing left: any one, at weight 0
        rows = [rollouts[chosen] for chosen, _ in batch] + [rollouts[rejected] for _, rejected in batch]
        lengths = [len(r.completion.token_ids) for r in rows]
        ids, attention_mask, mask = rollout_batch(rows, pad_id, device_of(policy))  # (2P, T) each
        with precision(device_of(policy), settings.dtype):
            logprobs, entropy = token_logprobs(
                policy, ids, attention_mask, mask, with_entropy=True
            )  # (2P, T) each
        with torch.no_grad(), precision(device_of(policy), settings.dtype):
            reference_logprobs = token_logprobs(reference, ids, attention_mask, mask)
        chosen, rejected = logprobs.sum(1).chunk(2)
        chosen_lengths = torch.tensor(lengths[: len(batch)], device=ids.device)
        reference_chosen, reference_rejected = reference_logprobs.sum(1).chunk(2)
        losses, margin = rpo_loss(
            chosen,
            rejected,
            reference_chosen,
            reference_rejected,
            chosen_lengths,
            settings.rpo_beta,
            settings.rpo_alpha,
        )
        loss = losses.sum() / total * bool(indices)
        backward(loss, policy, processes)
        if not indices:
            continue
        gap = (logprobs.detach() - reference_logprobs)[mask]
        sums["loss"] += loss.item()
        sums["kl"] += k3(gap).sum().item()
        sums["entropy"] += entropy[mask].sum().item()
        sums["pair_accuracy"] += (margin > 0).sum().item()
        sums["margin"] += margin.detach().sum().item()
        sums["tokens"] += sum(lengths)
    grad_norm = sum_and_clip(policy, settings.max_grad_norm, processes)
    everyone = gather_objects(sums, processes)
    sums = {key: sum(part[key] for part in everyone) for key in sums}
    per = {
        "loss": 1,
        "kl": sums["tokens"],
        "entropy": sums["tokens"],
        "pair_accuracy": total,
        "margin": total,
    }
    metrics = {key: sums[key] / count for key, count in per.items()}
    return {**metrics, **counts, "grad_norm": grad_norm}
