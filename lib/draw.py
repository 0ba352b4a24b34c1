"""From logits to tokens: a random stream for each completion, and the inverse of the distribution function.

Random number t of a completion is a hash of (seed, t), not the next state of a shared generator. So a batch
may be cut, reordered or spread over processes, and every completion still meets the same numbers.

The distribution function is summed in float64. In float32 the sum over a vocabulary is off by more than rare tokens
weigh, and on a GPU, which sums in blocks, it is not even monotone: a token of probability 1e-12 may be drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(seeds: Tensor, steps: Tensor) -> Tensor:
    """Numbers in [0, 1), float64: output number `step` of splitmix64 started at `seed` (both (rows,) int64).

    int64 products wrap around just as unsigned ones do; a logical right shift is the arithmetic one with the
    copies of the sign masked off. The upper 53 bits are kept, all that float64 has: with the 23 that float32 would
    allow, u is 0 once in 8 million draws, and token 0 is drawn whatever its probability. u * total < total for
    every total > 0, so that the inverse CDF cannot run off its end.
    """
    z = seeds + (steps + 1) * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, signed; the next two likewise
    z = (z ^ ((z >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    z = (z ^ ((z >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    z = z ^ ((z >> 31) & (2**33 - 1))
    return _float64((z >> 11) & (2**53 - 1)) * 2.0**-53


def _float64(x: Tensor) -> Tensor:
    """On the same device, but for mps, which has no float64: there on the CPU."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def draw(logits: Tensor, u: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """logits (rows, vocab), u (rows,) float64 in [0, 1) -> token (rows,) int64, its log-probability (rows,) fp32.

    Inverse CDF: the first token whose cumulative probability exceeds u; one of probability 0 never is. With
    top_p the same over tokens in order of probability, u scaled to the mass of the smallest such set.
    """
    logits = logits.float()
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)
        return token[:, 0], logits.log_softmax(-1).gather(1, token)[:, 0]
    logprobs = (logits / temperature).log_softmax(-1)  # (rows, vocab)
    last = logits.shape[1] - 1  # the clamps act on NaN (the caller's to report) and where top_p rounds to 1
    probabilities = _float64(logprobs).exp()
    u = _float64(u).to(probabilities.device)  # wherever the caller drew it
    if top_p == 1:
        cdf = probabilities.cumsum_(-1)  # (rows, vocab)
        token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).clamp_(max=last)  # (rows, 1)
    else:
        ordered, order = torch.sort(probabilities, dim=-1, descending=True, stable=True)
        cdf = ordered.cumsum_(-1)
        final = torch.searchsorted(cdf, torch.full_like(cdf[:, :1], top_p)).clamp_(max=last)  # last one kept
        rank = torch.searchsorted(cdf, u[:, None] * cdf.gather(1, final), right=True).clamp_(max=last)
        token = order.gather(1, rank)
    token = token.to(logits.device)
    return token[:, 0], logprobs.gather(1, token)[:, 0]
