from __future__ import annotations

import builtins
import io
import runpy
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lib import UserError
from lib.chat import encode_chat, encode_prompt
from lib.run.files import write_json
from lib.run.hub import load_tokenizer
from lib.sampler import sample
from lib.sandbox import world
from lib.tools import terminal as module
from lib.tools.stream import parts, stream, texts
from lib.tools.terminal import DIM, PLAIN, Chat, converse, main, reply, thinks_first

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {{ '<end> ' if m.role == 'assistant' else '' }}{% endfor %}"
    "{{ '<assistant> ' if add_generation_prompt else '' }}"
)


@pytest.fixture
def chat(tiny_model, word_tokenizer):
    word_tokenizer.chat_template = TEMPLATE
    return Chat(tiny_model, word_tokenizer, reasoning=True, temperature=0.0, max_new_tokens=16, seed=0)


def scripted(monkeypatch, tokenizer, *answers: str):
    """The model writes these texts, one a turn; "^C" in a text is the user's Ctrl-C. Returns the prompts it was given."""
    prompts, left = [], iter(answers)

    def fake(model, prompt, **options):
        prompts.append(tokenizer.decode(prompt))
        for word in next(left).split():
            if word == "^C":
                raise KeyboardInterrupt
            yield tokenizer.convert_tokens_to_ids(word)

    monkeypatch.setattr(module, "stream", fake)
    return prompts


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


# ---- tokens and text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@torch.inference_mode()
def test_streamed_tokens_are_those_of_the_sampler(tiny_model, temperature):
    prompt = [8, 9, 10, 11]
    for seed in (1, 2**62 + 5):
        options = {"max_new_tokens": 24, "temperature": temperature, "eos_token_ids": [2, 3, 5, 6]}
        expected = sample(tiny_model, [prompt], seeds=[seed], **options)[0].token_ids
        assert list(stream(tiny_model, prompt, seed=seed, **options)) == expected


def test_a_broken_model_is_one_line_and_no_text(tiny_model):
    with torch.no_grad():
        tiny_model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        list(stream(tiny_model, [8, 9], max_new_tokens=2, temperature=0.0, seed=0, eos_token_ids=[2]))


@pytest.mark.parametrize("reasoning", [True, False])
@pytest.mark.parametrize("opens", [True, False])
def test_one_question_is_encoded_as_in_training_whether_or_not_the_template_opens_think(
    word_tokenizer, reasoning, opens
):
    if opens:
        word_tokenizer.chat_template += "{{ '<think>\\n' if add_generation_prompt else '' }}"
    messages = [{"role": "user", "content": "how are you ?"}]
    expected = encode_prompt(word_tokenizer, "how are you ?", reasoning=reasoning)
    assert encode_chat(word_tokenizer, messages, reasoning=reasoning) == expected
    assert expected.count(word_tokenizer.convert_tokens_to_ids("<think>")) == reasoning


def test_a_template_without_a_system_role_is_one_line(word_tokenizer):
    word_tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError, match="System role not supported"):
        encode_chat(word_tokenizer, [{"role": "user", "content": "how"}], reasoning=False)


def test_pieces_of_text_are_whole_characters_and_add_up():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = " héllo 🍰🍰\n\n end"
    ids = tokenizer.encode(text)  # a token a byte
    assert list(texts(tokenizer, ids)) == list(text)
    assert "".join(texts(tokenizer, ids[:10])) == tokenizer.decode(
        ids[:10]
    )  # cut within a character: as decode has it


def test_spaces_between_words_are_kept(word_tokenizer):
    ids = word_tokenizer.encode("green soup please cake")
    assert list(texts(word_tokenizer, ids)) == ["green", " soup", " please", " cake"]


# ---- reasoning and answer ----------------------------------------------------------------------------------


def joined(found) -> tuple[str, str]:
    found = list(found)
    return "".join(t for thought, t in found if thought), "".join(t for thought, t in found if not thought)


def test_reasoning_is_told_from_answer_wherever_the_text_is_cut_into_pieces():
    text = "if a < b :\n go </thin on .\n</think>\n\nYes , </think> a < b."
    expected = ("<think>\nif a < b :\n go </thin on .\n</think>\n\n", "Yes , </think> a < b.")
    for i in range(len(text)):
        for k in (i, min(i + 3, len(text))):
            assert joined(parts([text[:i], text[i:k], text[k:]], reasoning=True)) == expected
    assert joined(parts(text, reasoning=True)) == expected  # character by character


def test_reasoning_that_never_ends_and_an_answer_without_reasoning():
    assert joined(parts(["so ", "far </th"], reasoning=True)) == ("<think>\nso far </th", "")
    assert joined(parts(["\n so ", "far"], reasoning=False)) == ("", "so far")


# ---- a conversation ----------------------------------------------------------------------------------------


def test_reasoning_is_dim_on_a_terminal_only(chat, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    answers = ["are you </think> green soup <end>"] * 3
    scripted(monkeypatch, chat.tokenizer, *answers)
    screen, file, plain = Screen(), io.StringIO(), Screen()
    reply(chat, "how ?", screen)
    reply(chat, "how ?", file)
    monkeypatch.setenv("NO_COLOR", "1")
    reply(chat, "how ?", plain)
    assert file.getvalue() == plain.getvalue() == "<think>\nare you\n</think>\n\ngreen soup\n"
    dim, answer = screen.getvalue().rsplit(PLAIN, 1)
    assert dim.startswith(DIM) and answer == "green soup\n"
    assert screen.getvalue().replace(DIM, "").replace(PLAIN, "") == file.getvalue()


def test_what_a_model_writes_cannot_steer_the_terminal(chat, monkeypatch):
    monkeypatch.setattr(
        Chat, "ask", lambda self, text: iter([(False, "a\x1b]0;title\x07b\x9b2J\t\u202ec\u2066\n")])
    )
    monkeypatch.setattr(module.contextlib, "closing", module.contextlib.nullcontext)
    screen = Screen()
    reply(chat, "how ?", screen)
    assert screen.getvalue() == "a]0;titleb2J\tc\n\n"


def test_later_turns_see_earlier_answers_without_their_reasoning(chat, monkeypatch):
    prompts = scripted(
        monkeypatch,
        chat.tokenizer,
        "maybe </think> green soup <end>",
        "</think> cake <end>",
        "</think> <end>",
    )
    chat.system = "please"
    for text in ("how ?", "are you ?", "you ?"):
        reply(chat, text, io.StringIO())
    first = "<system> please <user> how ?"
    assert prompts[0] == f"{first} <assistant> <think>"
    assert prompts[1] == f"{first} <assistant> green soup <end> <user> are you ? <assistant> <think>"
    assert "<assistant> cake <end>" in prompts[2] and "maybe" not in prompts[2]
    assert len(chat.messages) == 4  # the empty answer is not remembered


def test_ctrl_c_stops_the_answer_and_then_ends(chat, monkeypatch, capsys):
    answers = ["maybe ^C", "</think> green soup ^C", "</think> cake <end>"]
    prompts = scripted(monkeypatch, chat.tokenizer, *answers)
    typed = iter(["how ?", "are ?", "you ?", "/reset", "/nonsense", "", KeyboardInterrupt])

    def read(prompt):
        line = next(typed)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", read)
    converse(chat)
    shown, warned = capsys.readouterr()
    assert warned.count("[stopped]") == 2 and "/nonsense: no such command; allowed /reset, /quit" in warned
    assert (
        prompts[1] == "<user> are ? <assistant> <think>"
    )  # unfinished reasoning is forgotten, with its question
    assert prompts[2] == "<user> are ? <assistant> green soup <end> <user> you ? <assistant> <think>"
    assert "cake" in shown and chat.messages == [] and next(typed, None) is None


def test_an_answer_that_was_cut_says_why_and_a_full_context_is_one_line(chat, monkeypatch, capsys):
    monkeypatch.setattr(module, "eos_token_ids", lambda model, tokenizer: [])
    chat.max_new_tokens, chat.reasoning = 3, False
    reply(chat, "how ?", io.StringIO())
    assert "[cut after 3 tokens: --max-new-tokens]" in capsys.readouterr().err
    chat.max_new_tokens = 500
    reply(chat, "how ?", io.StringIO())
    assert "the context is full]" in capsys.readouterr().err
    with pytest.raises(UserError, match="context holds 128: /reset, or say less"):
        reply(chat, "cake " * 130, io.StringIO())


def test_whether_a_model_reasons(word_tokenizer, tmp_path):
    assert not thinks_first("org/name", word_tokenizer)
    word_tokenizer.chat_template += "{{ '<think>\\n' if add_generation_prompt else '' }}"
    assert thinks_first("org/name", word_tokenizer)
    write_json(tmp_path / "settings.json", {"reasoning": False})
    assert not thinks_first(str(tmp_path), word_tokenizer)


# ---- the command -------------------------------------------------------------------------------------------


def test_the_command_answers_one_prompt_and_names_words_that_it_does_not_know(monkeypatch, capsys):
    argv = [
        "lib.chat",
        str(world.BASE),
        "how do i make a",
        "glimmerfoo cake ?",
        "--max-new-tokens",
        "12",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delitem(sys.modules, "lib.chat")
    runpy.run_module("lib.chat", run_name="__main__")
    shown, warned = capsys.readouterr()
    assert (
        "the model does not know: glimmerfoo" in warned and len(shown.split()) >= 2 and "<think>" not in shown
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("how do i make a glimmerfoo cake ?\n"))
    main([*argv[1:2], *argv[4:]])
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("argv", "stdin", "message"),
    [
        ([str(world.BASE)], " \n", "no prompt: give one behind the run, or on stdin"),
        (
            [str(world.BASE), "hi", "--temperature", "-1"],
            "",
            "--temperature: given -1; allowed a number from 0 to 10",
        ),
        (
            [str(world.BASE), "hi", "--max-new-tokens", "1.5"],
            "",
            "--max-new-tokens: given 1.5; allowed a whole number",
        ),
        ([], "", "run"),
    ],
)
def test_mistakes_are_one_line(argv, stdin, message, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    with pytest.raises(UserError) as caught:
        main(argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_utf_8_is_one_line(chat, monkeypatch, capsys):
    broken = lambda: io.TextIOWrapper(io.BytesIO(b"caf\xe9 ?\n"), encoding="utf-8")  # noqa: E731
    monkeypatch.setattr(sys, "stdin", broken())
    with pytest.raises(UserError, match="stdin: not UTF-8"):
        main([str(world.BASE)])
    typed = iter([broken().readline, lambda: "/quit"])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(typed)())
    converse(chat)
    assert "error: that was not UTF-8" in capsys.readouterr().err


def test_the_sandbox_tokenizer_streams_as_it_decodes():
    tokenizer = load_tokenizer(world.BASE)
    ids = tokenizer.encode(
        "let me see . cake is food . so this is fine . </think> use bano beno .", add_special_tokens=False
    )
    assert "".join(texts(tokenizer, ids)) == tokenizer.decode(ids)
