"""GRM, the paper's reward model of helpfulness: r_n = sigmoid(GRM(x, y)) (Yang et al. 2024, arXiv 2406.10216; Apache-2.0).

A Llama with one number for a head, read at the last token of prompt and answer. Two of a family are judges here:

    grm-8b   Ray2333/GRM-llama3-8B-distill           in the script of TARS's authors, and so in the paper preset
    grm      Ray2333/GRM-Llama3.2-3B-rewardmodel-ft  smaller

The input is the chat template's text, with its one <|begin_of_text|>, as in that script (add_special_tokens=False). The usage
example on the models' cards tokenises without that, and so puts a second one before it. Two things are ours. Llama 3.2's
template writes today's date into the system prompt, and a reward must not change overnight: the date is held at the
template's own default. And an empty answer, which has done nothing, scores 0.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lib import UserError
from lib.judges import Score
from lib.judges.exchange import Exchange
from lib.judges.language_model import LanguageModel
from lib.run.hub import DTYPES, load_weights

MODEL = "Ray2333/GRM-Llama3.2-3B-rewardmodel-ft"
DATE = "26 Jul 2024"


class RewardModel(LanguageModel):
    """A language model with a head of one number, `score`. UserError if its head has another size, or is missing."""

    def __init__(self, name: str, device: str) -> None:
        super().__init__(name, chat=True, device=device)
        if self.config.num_labels != 1:
            raise UserError(
                f"--judge: {name}: a head of {self.config.num_labels} labels; a reward model has one"
            )

    def load(self, device: torch.device, dtype: str) -> PreTrainedModel:
        load = AutoModelForSequenceClassification.from_pretrained
        return load_weights(load, self.name, "reward model", DTYPES[dtype]).to(device).eval()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., H) -> rewards (...), of any size, fp32 (bfloat16 would keep but two or three digits)."""
        with torch.inference_mode():
            return hidden.float() @ self.model.get_parameter("score.weight")[0].float()

    def rewards(self, sequences: list[list[int]]) -> list[float | None]:
        """The reward at the last token of each; None for one that its context cannot hold."""
        fitting = [i for i, sequence in enumerate(sequences) if len(sequence) <= self.context]
        result: list[float | None] = [None] * len(sequences)
        for batch, hidden in self.hidden_states([sequences[i] for i in fitting]):
            last = torch.tensor(
                [len(sequences[fitting[row]]) - 1 for row in batch], device=hidden.device
            )  # (B,)
            rewards = self.head(hidden[torch.arange(len(batch), device=hidden.device), last])  # (B,)
            if not rewards.isfinite().all():
                raise UserError(
                    f"--judge: {self.name}: its rewards are not finite: broken weights or precision"
                )
            for row, reward in zip(batch, rewards.tolist(), strict=True):
                result[fitting[row]] = reward
        return result


def task_judge(name: str = "", device: str = "") -> Score:
    """task_score, sigmoid(reward), of the reward model `name`, a folder or a hub name (none: MODEL).

    None for what its context cannot hold. Raises UserError if it is not there, or is no reward model.
    """
    judge = RewardModel(name or MODEL, device)
    exchange = Exchange(judge, date_string=DATE)

    def task_score(prompts: list[str], answers: list[str]) -> list[float | None]:
        said = [i for i, answer in enumerate(answers) if answer.strip()]
        scores: list[float | None] = [0.0] * len(answers)
        for i, reward in zip(
            said, judge.rewards([exchange.ids(prompts[i], answers[i]) for i in said]), strict=True
        ):
            scores[i] = None if reward is None else float(torch.tensor(reward, dtype=torch.float64).sigmoid())
        return scores

    return task_score
