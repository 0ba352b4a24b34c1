"""What a run leaves: the state that a killed one resumes from, at the end a Hugging Face checkpoint.

Everything that a step of stage 2 or 3 depends on is either in the state (weights, optimizer, `run.state`) or
a function of (seed, step). So there is no generator and no data loader to restore, and a killed run goes on
exactly where its last resume point was. The file does not depend on the number of processes, nor on shards.
"""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint import state_dict as states
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lib import UserError
from lib.chat import THINK_OPEN, decode, encode_prompt, encode_text, eos_token_ids, render
from lib.run.files import atomic, resume_log, settle, write_text
from lib.run.processes import FULL, full_weights

PROGRESS = "progress.pt"  # in OUT, until the run is finished
QUIET = "{% if enable_thinking is not defined %}{% set enable_thinking = false %}{% endif %}"
OPENING = "{{ " + repr(THINK_OPEN) + " if add_generation_prompt else '' }}"
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

{base}, trained by {method} after the paper on TARS (Training Adaptive Reasoners for Safety,
[arXiv 2507.00971](https://arxiv.org/abs/2507.00971)), in an independent implementation. Judge: {judge}.

Its answer is what follows `</think>`; its reasoning may hold what the answer leaves out. Measure its defences
before you rely on them. The licences of base and data hold.
"""


def save_progress(run: Any, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One atomic file, by rank 0; all ranks have to call it. `step` is the number of finished steps."""
    weights = full_weights(model)
    # Before the first update there are none, and to ask for them would take a step of AdamW.
    moments = states.get_optimizer_state_dict(model, optimizer, options=FULL) if optimizer.state else {}
    if run.leader:
        try:
            with atomic(run.out / PROGRESS) as path:
                torch.save({"model": weights, "optimizer": moments, "step": step, "extra": run.state}, path)
        except RuntimeError as error:  # torch's own, when it cannot go on writing
            raise UserError(f"cannot write {run.out / PROGRESS}: {error}") from error


def load_progress(run: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore model, optimizer and `run.state`, drop what logs have beyond; the number of finished steps."""
    path, state = run.out / PROGRESS, dict[str, Any](step=0)
    if run.leader and path.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code of the file
        except Exception as error:  # of pickle's, of zip's, of torch's
            raise UserError(f"{path}: not a saved state; delete it to start anew") from error
    step, updated = run.gather((state["step"], bool(state.get("optimizer"))))[0]
    if step:
        whole = {"full_state_dict": True, "broadcast_from_rank0": run.size > 1, "strict": False}
        options = states.StateDictOptions(**whole)  # from rank 0; the others bring nothing
        states.set_model_state_dict(model, state.get("model", {}), options=options)
        if updated:
            states.set_optimizer_state_dict(model, optimizer, state.get("optimizer", {}), options=options)
        run.state |= state.get("extra", {})
        plain = {key: value for key, value in run.state.items() if isinstance(value, int | float)}
        run.state |= run.gather(plain)[0]  # tensors stay with the leader
    if run.leader:
        for log in ("metrics.jsonl", "rollouts.jsonl"):
            resume_log(run.out / log, lambda record: record["step"] < step)
    return step


def save_policy(
    model: PreTrainedModel, tokenizer: Tokenizer, folder: str | Path, weights: dict | None = None
) -> None:
    """Write it into `folder`, beside what else is there. `weights`: those gathered from a model in shards.

    First to a temporary folder, then moved file by file, config.json last: where that is, the others are.
    """
    temporary = Path(folder) / ".checkpoint.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(str(temporary))
        for source in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
            settle(source, Path(folder) / source.name)
    except SafetensorError as error:  # its own, of a full disk
        raise UserError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- what makes it a checkpoint for others -----------------------------------------------------------------


def describe(folder: Path, tokenizer: Tokenizer, settings: dict) -> None:
    """Write what others need into a checkpoint's folder: template, generation_config.json, README.md.

    `settings` are the run's. Of folders only the last name is told, of judges no checkpoint.
    """
    write_text(folder / "chat_template.jinja", serving_template(tokenizer, settings["reasoning"]))
    ends = {"eos_token_id": eos_token_ids(GenerationConfig.from_pretrained(folder), tokenizer)}
    ends |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    # What the base's authors advise (a repetition penalty, say) is not how the policy was trained.
    GenerationConfig(do_sample=True, temperature=0.6, top_p=1.0, top_k=0, **ends).save_pretrained(folder)
    model, judge = settings["model"], re.sub(r"=[^+]*", "", settings.get("judge", ""))
    method = "reinforcement learning" if judge else "supervised fine-tuning"
    method = "preference learning (RPO)" if "rpo_beta" in settings else method
    base, name = Path(model).name if Path(model).exists() else model, Path(settings["out"]).resolve().name
    write_text(folder / "README.md", CARD.format(name=name, base=base, method=method, judge=judge or "none"))


def serving_template(tokenizer: Tokenizer, reasoning: bool = True) -> str:
    """The chat template with which plain transformers reads what `encode_prompt` gives, token for token.

    The stages open a reasoner's turn with <think> by themselves, others do not. By this template, too,
    `encode_prompt` gives the ids that it gives by the original: what is added it cuts off again. Where none
    is known to do so (a tokenizer may read <think> otherwise behind other text), it is the original, and a
    line says so.
    """
    original, other, words = tokenizer.get_chat_template(), copy.deepcopy(tokenizer), tokenizer.get_vocab()
    question = decode(tokenizer, [words[max(words)]])  # a word of its own: some tokenizers can read no other
    ours = encode_prompt(tokenizer, question, reasoning=reasoning)
    # Jinja drops one newline at the end of a template: it must not come to stand before what is added.
    for template in (original, QUIET + original, re.sub(r"\r?\n\Z", "", original) + OPENING):
        other.chat_template = template
        text = render(other, [{"role": "user", "content": question}], add_generation_prompt=True)
        if encode_text(other, text) == ours:
            return template
    print("the base's chat template is kept: none is known to open <think> in the same tokens")
    return original
