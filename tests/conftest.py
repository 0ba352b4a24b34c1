"""Small stand-ins that several tests share: a random Qwen2 and a word-level chat tokenizer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import stages
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from lib.judges import graders
from lib.judges.language_model import LanguageModel
from lib.run.command import at_end

WORDS = "<unk> <pad> <end> <user> <assistant> <system> <think> </think>".split()
WORDS += "how are you ? maybe green soup cake please".split()
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% if m.role == 'assistant' %} <end>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(autouse=True)
def ended():
    """What a command gives back when it ends, a test that calls its parts gives back, too: locks."""
    yield
    at_end.close()


@pytest.fixture
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Whitespace splits words, "\\n" vanishes, decode joins by spaces; <think> is an ordinary word."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="<end>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def tiny_model() -> Qwen2ForCausalLM:
    """Two layers, 97 tokens, tied embeddings, fp32; weights large enough for uneven predictions."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=2,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture
def reference(tiny_model):
    """`tiny_model` a little way off, frozen."""
    other = copy.deepcopy(tiny_model).requires_grad_(False)
    torch.manual_seed(1)
    for parameter in other.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))
    return other


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """What stage 1 would write, tiny."""
    return stages.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def said(monkeypatch):
    """Puts words into the mouth of judges that write: what they were asked, and what they answer."""
    asked, texts = [], []

    def write(self, prompts, max_new_tokens):
        asked.extend(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in prompts)
        return [texts[i % len(texts)] for i in range(len(prompts))]

    monkeypatch.setattr(LanguageModel, "write", write)
    graders.graded.cache_clear()
    yield asked, texts
    graders.graded.cache_clear()
