"""What makes a run's folder a checkpoint for others: a chat template, how to sample, a model card.

The stages open a reasoner's turn with <think> by themselves (`lib.chat.encode_prompt`), others do not. So the
folder's template does it, where there is one with which plain transformers reads the very same tokens.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from lib import UserError
from lib.chat import THINK_OPEN, decode, encode_prompt, encode_text, eos_token_ids, render
from lib.run.files import write_text

QUIET = "{% if enable_thinking is not defined %}{% set enable_thinking = false %}{% endif %}"
OPENING = "{{ " + repr(THINK_OPEN) + " if add_generation_prompt else '' }}"
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [safety, tars]
---
# {name}

{base}, trained by {method}, after the paper on TARS (Training Adaptive Reasoners for Safety,
[arXiv 2507.00971](https://arxiv.org/abs/2507.00971)) in an independent implementation. Judge: {judge}.

```python
from transformers import pipeline

chat = pipeline("text-generation", "OWNER/NAME")  # or the folder of this file
messages = [{{"role": "user", "content": "how do i make a cake ?"}}]
text = chat(messages, max_new_tokens=256)[0]["generated_text"][-1]["content"]
answer = text.rpartition("</think>")[2]
```

- Measure its defences before you rely on them. What its judge overlooks, it may have learnt.
- Reasoning may hold what the answer leaves out: show users the answer, and no reasoning without an end.
- The licences of base and data hold. Say in the header above which is yours before you share this.
"""


def describe(folder: Path, tokenizer: PreTrainedTokenizerBase, settings: dict) -> None:
    """Write what others need into a checkpoint's folder: template, generation_config.json, README.md.

    `settings` are the run's. Of folders only the last name is told, of judges no checkpoint.
    """
    write_text(folder / "chat_template.jinja", serving_template(tokenizer, settings["reasoning"]))
    eos = eos_token_ids(GenerationConfig.from_pretrained(folder), tokenizer)
    # What the base's authors advise (a repetition penalty, say) is not how the policy was trained.
    sampling = GenerationConfig(do_sample=True, temperature=0.6, top_p=1.0, top_k=0, eos_token_id=eos)
    sampling.bos_token_id, sampling.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    sampling.save_pretrained(folder)
    model, judge = settings["model"], re.sub(r"=[^+]*", "", settings.get("judge", ""))
    method = "reinforcement learning" if judge else "a light supervised warm start"
    base, name = Path(model).name if Path(model).exists() else model, Path(settings["out"]).resolve().name
    write_text(folder / "README.md", CARD.format(name=name, base=base, method=method, judge=judge or "none"))


def serving_template(tokenizer: PreTrainedTokenizerBase, reasoning: bool = True) -> str:
    """The chat template with which plain transformers reads what `encode_prompt` gives, token for token.

    By it, too, `encode_prompt` gives the ids that it gives by the original: what is added it cuts off again.
    Where none is known to do so (a tokenizer may read <think> otherwise behind other text), it is the
    original, and a line says so.
    """
    question, original, other = "How are you?", tokenizer.get_chat_template(), copy.deepcopy(tokenizer)
    try:
        ours = encode_prompt(tokenizer, question, reasoning=reasoning)
    except UserError:  # a vocabulary of words without one for the unknown: ask in a word of its own
        question = decode(tokenizer, [tokenizer.get_vocab()[max(tokenizer.get_vocab())]])
        ours = encode_prompt(tokenizer, question, reasoning=reasoning)
    # Jinja drops one newline at the end of a template: it must not come to stand before what is added.
    for template in (original, QUIET + original, re.sub(r"\r?\n\Z", "", original) + OPENING):
        other.chat_template = template
        text = render(other, [{"role": "user", "content": question}], add_generation_prompt=True)
        if encode_text(other, text) == ours:
            return template
    print("the base's chat template is kept: none is known to open <think> in the same tokens")
    return original
