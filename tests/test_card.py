"""lib/run/checkpoint.py: a run's folder is a checkpoint that plain transformers reads as the stages do."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lib.chat import encode_prompt, eos_token_ids, set_date
from lib.run.checkpoint import describe, save_policy, serving_template
from lib.run.hub import load_policy, load_tokenizer
from lib.sampler import sample
from lib.sandbox import world

QUESTION = [{"role": "user", "content": "how are you ?"}]
TEMPLATES = {  # put behind the fixture's template; can a reasoner be served, and another model
    "plain": ("", True, True),
    "newline": ("{{ '' }}\r\n", True, True),  # Jinja drops it at the end, and would not before more
    "r1": ("{{ '<think>\n' if add_generation_prompt }}", True, False),
    "qwen3": ("{{ '<think> </think> ' if enable_thinking is defined and not enable_thinking }}", True, True),
    "date": ("{{ 'maybe ' if strftime_now('%Y') == '2000' else 'soup ' }}", True, True),
    "joined": ("{{ 'please' if add_generation_prompt }}", False, True),  # <think> right behind it is no word
}


def both(tokenizer) -> list[list[int]]:
    """What the stages read, with reasoning and without."""
    return [encode_prompt(tokenizer, "how are you ?", reasoning=way) for way in (True, False)]


@pytest.mark.parametrize("reasoning", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_serves_what_the_stages_read_or_is_kept(word_tokenizer, capsys, name, reasoning):
    set_date("2000-01-01")
    behind, *possible = TEMPLATES[name]
    word_tokenizer.chat_template += behind
    before, original = both(word_tokenizer), word_tokenizer.chat_template
    word_tokenizer.chat_template = serving_template(word_tokenizer, reasoning)
    assert both(word_tokenizer) == before
    kept = "is kept" in capsys.readouterr().out
    assert kept == (not possible[not reasoning]) and (not kept or word_tokenizer.chat_template == original)
    if name != "date":  # plain transformers tells today's
        served = word_tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
        assert (served == before[not reasoning]) == (not kept)
    finished = word_tokenizer.apply_chat_template([*QUESTION, *QUESTION], tokenize=False)
    assert "<think>\n" not in finished  # only a new turn is opened


@pytest.mark.parametrize("reasoning", [True, False])
def test_a_runs_folder_is_a_checkpoint_like_any_other(tmp_path, reasoning):
    model, tokenizer = load_policy(world.BASE, device="cpu"), load_tokenizer(world.BASE)
    model.generation_config.repetition_penalty = 1.3  # as some bases advise
    eos, run = eos_token_ids(model, tokenizer), tmp_path / "joe" / "rl"
    save_policy(model, tokenizer, run)
    settings = {"preset": "sandbox", "model": str(world.BASE.resolve()), "out": str(run)}
    settings |= {"reasoning": reasoning, "judge": "qwen3guard=/home/joe/guard+grm"}
    describe(run, tokenizer, settings)
    card = (run / "README.md").read_text()
    assert "# rl\n\nbase, trained by reinforcement" in card and "Judge: qwen3guard+grm." in card
    assert "joe" not in card and str(world.BASE.parent) not in card
    for said, method in (({"rpo_beta": 0.01}, "preference learning (RPO)"), ({"judge": ""}, "supervised")):
        describe(run, tokenizer, settings | said)
        assert f"base, trained by {method}" in (run / "README.md").read_text()
    assert both(load_tokenizer(run)) == both(tokenizer)
    how = GenerationConfig.from_pretrained(run)
    assert (how.temperature, how.top_p, how.top_k, how.eos_token_id) == (0.6, 1.0, 0, eos)
    assert how.repetition_penalty in (None, 1.0)

    theirs, reads = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    prompt = reads.apply_chat_template(QUESTION, **options)
    ids = prompt["input_ids"][0].tolist()
    assert ids == both(tokenizer)[not reasoning]
    ours = sample(model, [ids], max_new_tokens=20, temperature=0.0, eos_token_ids=eos)[0].token_ids
    assert theirs.generate(**prompt, max_new_tokens=20, do_sample=False)[0, len(ids) :].tolist() == ours


@pytest.fixture(autouse=True)
def today(monkeypatch):
    monkeypatch.setattr("lib.chat._today", None)
