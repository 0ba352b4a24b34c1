from __future__ import annotations

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lib import UserError
from lib.batches import pad_batch
from lib.chat import (
    THINK_CLOSE,
    THINK_OPEN,
    Parsed,
    decode,
    encode_example,
    encode_prompt,
    eos_token_ids,
    parse_completion,
    parse_direct,
)
from lib.run.hub import load_tokenizer

SANDBOX = Path(__file__).parents[1] / "lib" / "sandbox" / "base"
SMOLLM = Path(os.environ.get("TARS_SMOLLM", "/tmp/smollm2"))
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE trained on these very texts, so it would merge across every seam that it sees; adds a BOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<bos>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = [f"assistant\n{THINK_OPEN}They ask.{THINK_CLOSE}I am fine.", "user\nHow are you?"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<|endoftext|>", add_bos_token=True
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = "<bos>" + CHATML
    return tokenizer


@pytest.fixture(params=["words", "bytes", "sandbox", "smollm"])
def tokenizer(request, word_tokenizer):
    if request.param == "words":
        return word_tokenizer
    if request.param == "bytes":
        return byte_level_tokenizer()
    folder = SANDBOX if request.param == "sandbox" else SMOLLM
    if not (folder / "tokenizer.json").exists():
        pytest.skip(f"{folder} is not here")
    return load_tokenizer(folder)


def squeezed(text: str) -> str:
    """Without white space: a word-level tokenizer does not keep it."""
    return "".join(text.split())


def test_an_example_begins_with_its_generation_prompt(tokenizer):
    for reasoning, answer in [
        ("maybe green soup", "cake please"),
        ("\nmaybe green soup\n\n", " cake"),
        ("", ""),
        ("\n\n", "?"),
    ]:
        ids, mask = encode_example(tokenizer, "how are you ?", reasoning, answer)
        thinking = encode_prompt(tokenizer, "how are you ?", reasoning=True)
        direct = encode_prompt(tokenizer, "how are you ?", reasoning=False)
        assert ids[: len(thinking)] == thinking and thinking[: len(direct)] == direct
        assert len(ids) == len(mask) and mask == [i >= len(direct) for i in range(len(ids))]


def test_what_is_learned_is_the_marked_up_completion_and_its_end(tokenizer):
    ids, mask = encode_example(tokenizer, "how are you ?", "maybe green soup", "cake please")
    learned = [i for i, m in zip(ids, mask, strict=True) if m]
    assert squeezed(decode(tokenizer, learned)) == squeezed("<think>maybe green soup</think>cake please")
    assert learned[-1] in eos_token_ids(None, tokenizer)
    opening = len(encode_prompt(tokenizer, "how are you ?", reasoning=True))
    parsed = parse_completion(decode(tokenizer, ids[opening:]))
    assert parsed == Parsed("maybe green soup", "cake please", True)


def test_a_direct_example_has_the_answer_alone(tokenizer):
    ids, mask = encode_example(tokenizer, "how are you ?", None, "cake please")
    prompt = encode_prompt(tokenizer, "how are you ?", reasoning=False)
    assert ids[: len(prompt)] == prompt and mask.index(True) == len(prompt)
    assert parse_direct(decode(tokenizer, ids[len(prompt) :])) == Parsed("", "cake please", True)


def test_prompt_is_the_templates_own_text_and_one_bos():
    tokenizer = byte_level_tokenizer()
    text = (
        "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = encode_prompt(tokenizer, "Hi", reasoning=False)
    assert tokenizer.decode(ids) == "<bos>" + text
    assert ids.count(tokenizer.bos_token_id) == 1
    system = tokenizer.decode(encode_prompt(tokenizer, "Hi", reasoning=False, system="Be brief."))
    assert "Be brief." in system and "Be helpful." not in system


def test_text_of_a_real_format_is_exact():
    tokenizer = byte_level_tokenizer()
    ids, mask = encode_example(tokenizer, "How are you?", "They ask.", "I am fine.")
    learned = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(learned) == "<think>\nThey ask.\n</think>\n\nI am fine.<|im_end|>"


def test_a_template_that_opens_the_reasoning_itself_does_not_open_it_twice():
    tokenizer = byte_level_tokenizer()
    plain = encode_prompt(tokenizer, "Hi", reasoning=True)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "assistant\n{% endif", "assistant\n<think>\n{% endif"
    )
    assert encode_prompt(tokenizer, "Hi", reasoning=True) == plain


def test_every_end_is_known(word_tokenizer, tiny_model):
    assert eos_token_ids(tiny_model, word_tokenizer) == [2]
    tiny_model.generation_config.eos_token_id = [2, 5]
    assert eos_token_ids(tiny_model, word_tokenizer) == [2, 5]
    assert eos_token_ids(tiny_model.config, word_tokenizer) == [2]
    bytes_ = byte_level_tokenizer()  # its eos is <|endoftext|>, its template ends a turn with <|im_end|>
    names = bytes_.convert_ids_to_tokens(eos_token_ids(None, bytes_))
    assert names == ["<|endoftext|>", "<|im_end|>"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "</think>",
        "<think>",
        "</think></think>",
        "a<think>b</think>c",
        "a</think>b<think>",
        "\ud800</think>\x00",
    ],
)
def test_parsing_never_raises_and_never_rewards_a_broken_format(text):
    parsed = parse_completion(text)
    assert parsed.well_formed == (text.count("</think>") == 1 and "<think>" not in text)
    if "</think>" not in text:
        assert parsed.answer == text.strip() and parsed.reasoning == ""


def test_pad_batch():
    ids, mask = pad_batch([[5, 6], [7], []], 9, side="right")
    assert ids.tolist() == [[5, 6], [7, 9], [9, 9]]
    assert mask.tolist() == [[True, True], [True, False], [False, False]]
    ids, mask = pad_batch([[5, 6], [7]], 9, side="left")
    assert ids.tolist() == [[5, 6], [9, 7]] and mask.tolist() == [[True, True], [False, True]]
    assert pad_batch([[True, False], [True]], 0, side="right")[0].bool().tolist() == [
        [True, False],
        [True, False],
    ]
    assert pad_batch([], 0, side="left")[0].shape == (0, 0)


def test_load_tokenizer_pads_with_eos_and_keeps_the_template(tmp_path, word_tokenizer):
    word_tokenizer.pad_token = None
    word_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.eos_token_id == 2
    assert encode_prompt(loaded, "how", reasoning=True) == encode_prompt(
        word_tokenizer, "how", reasoning=True
    )


def test_load_tokenizer_errors_are_one_line(tmp_path, word_tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (tmp_path, tmp_path / "none", "no-such/model", "not a name"):
        with pytest.raises(UserError) as error:
            load_tokenizer(name)
        assert str(error.value).startswith(str(name)) and "\n" not in str(error.value)
    word_tokenizer.chat_template = None
    word_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(tmp_path)
