"""GRM, the paper's reward model: r_n = sigmoid(GRM(x, y)) (Yang et al. 2024, arXiv 2406.10216; Apache-2.0).

A Llama with one number for a head, read at the last token of prompt and answer. Two of a family are judges:

    grm-8b   Ray2333/GRM-llama3-8B-distill           that of TARS's authors, and so of the paper preset
    grm      Ray2333/GRM-Llama3.2-3B-rewardmodel-ft  smaller

The input is the chat template's text with its one <|begin_of_text|>, as in the authors' script. (The example
on the models' cards puts a second one before it.) Two things are ours. Llama 3.2's template writes today's
date, and a reward must not change overnight: it is held at the template's own. An empty answer scores 0.
"""

from __future__ import annotations

import math
from functools import cached_property

from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lib import UserError
from lib.judges.language_model import LanguageModel, exchange_encoder
from lib.rewards import Score
from lib.run.hub import DTYPES, dtype_to_infer, load_weights

DATE = "26 Jul 2024"


class RewardModel(LanguageModel):
    """A language model whose head is one row, `score`."""

    @cached_property
    def model(self) -> PreTrainedModel:
        load, dtype = AutoModelForSequenceClassification.from_pretrained, DTYPES[dtype_to_infer(self.device)]
        return load_weights(load, self.name, "reward model", dtype).to(self.device).eval()

    def head(self, states: Tensor) -> Tensor:
        """Hidden states (B, H) -> rewards (B, 1) in fp32: bfloat16 would keep but two or three digits."""
        return states.float() @ self.model.get_parameter("score.weight").float().T


def task_judge(model: str, device: str) -> Score:
    """task_score, sigmoid(reward); None for what its context cannot hold. UserError for another model."""
    judge = RewardModel(model, device)
    if (labels := judge.config.num_labels) != 1:
        raise UserError(f"--judge: {model}: a head of {labels} labels; a reward model has one")
    encode = exchange_encoder(judge, date_string=DATE)

    def task_score(prompts: list[str], answers: list[str]) -> list[float | None]:
        scores: list[float | None] = [0.0] * len(answers)
        answered = [i for i, answer in enumerate(answers) if answer.strip()]
        rewards = judge.read([encode(prompts[i], answers[i]) for i in answered], judge.head)
        for i, reward in zip(answered, rewards, strict=True):
            scores[i] = None if reward is None else (1 + math.tanh(reward[0] / 2)) / 2  # sigmoid
        return scores

    return task_score
