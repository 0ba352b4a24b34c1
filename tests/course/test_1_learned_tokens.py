"""Exercise `learned_tokens`: lib/chat.py, encode_example."""

from grading import ensure
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lib.chat import decode, encode_example, encode_prompt, encode_text
from lib.run.hub import load_tokenizer
from lib.sandbox import world

TOKENIZER = load_tokenizer(world.BASE)
PROMPT, REASONING, ANSWER = "how do i make a ladder ?", "ladder is tool .", "take golu and gulu ."


def example(reasoning=REASONING, answer=ANSWER):
    return encode_example(TOKENIZER, PROMPT, reasoning, answer)  # ids, mask


def learned(reasoning=REASONING, answer=ANSWER):
    """The ids that are learned, as a text without spaces."""
    ids, mask = example(reasoning, answer)
    return "".join(decode(TOKENIZER, [i for i, m in zip(ids, mask, strict=True) if m]).split())


def test_it_begins_as_what_the_model_will_read():
    ids, _ = example()
    prompt = encode_prompt(TOKENIZER, PROMPT, reasoning=True)
    ensure(ids[: len(prompt)] == prompt, "an example does not begin with the ids of the generation prompt")


def test_the_prompt_is_not_learned():
    ids, mask = example()
    prompt = encode_prompt(TOKENIZER, PROMPT, reasoning=False)
    hint = "the prompt is learned, too: questions are not the model's to write"
    ensure(not any(mask[: len(prompt)]), hint)
    ensure("golu" in learned(), "the answer is not learned")
    ensure("tool" in learned(), "the reasoning is not learned")


### BEGIN HIDDEN
def test_both_markers_are_learned():
    ensure("</think>" in learned(), "</think> is not learned: the model would never stop thinking")
    text = learned()
    ensure(text.startswith("<think>"), "<think> is not learned: without this library nobody would open it")
    ensure(text.count("<think>") == 1, "<think> is written more than once")


def test_the_end_is_learned():
    for reasoning in (REASONING, None):
        ids, mask = example(reasoning)
        end = ids[-1] == TOKENIZER.eos_token_id
        ensure(end, "the end-of-turn token is missing: the model would never learn to stop")
        ensure(mask[-1], "the end-of-turn token is not learned")


def test_without_reasoning():
    ids, mask = example(None)
    ensure("think" not in learned(None), "without reasoning there is no marker to learn")
    prompt = encode_prompt(TOKENIZER, PROMPT, reasoning=False)
    ensure(ids[: len(prompt)] == prompt, "without reasoning the prompt has no <think>, either")


def test_reasoning_and_answer_are_one_text():
    text = f"{REASONING}\n</think>\n\n{ANSWER}"
    bpe = Tokenizer(models.BPE())  # its tokens may hold the end of one part and the beginning of the next
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([text] * 9, trainers.BpeTrainer(initial_alphabet=letters, show_progress=False))
    template = TOKENIZER.chat_template
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=TOKENIZER.eos_token, chat_template=template
    )
    for space in ("", " "):
        ids, _ = encode_example(tokenizer, PROMPT, f"{space}{REASONING}{space}", f"{space}{ANSWER}{space}")
        whole = encode_text(tokenizer, text)
        hint = "spaces at the edges change the ids" if space else "it is tokenised between other seams"
        ensure(ids[-len(whole) - 1 : -1] == whole, f"of reasoning, </think> and answer: {hint}")


### END HIDDEN
