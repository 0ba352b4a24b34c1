"""Chapter 2: what is learned, against transformers' own loss; the early stop; processes, shards, kills."""

from __future__ import annotations

import importlib
import random
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import reference as literal
import stages
import torch
from stages import SFT, kill_9, launch, metrics_of, run_here, run_process, same_run, sft_flags
from transformers import MistralConfig, MistralForCausalLM

from lib.run import plumbing
from lib.run.files import read_jsonl, write_jsonl
from lib.run.hub import load_policy, load_tokenizer
from lib.run.plumbing import Run
from lib.sandbox import world

stage = importlib.import_module(SFT)


def random_examples(count: int = 5) -> list:
    rng, examples = random.Random(0), []
    for _ in range(count):
        prompt, learned = rng.randint(1, 8), rng.randint(1, 9)
        ids = [rng.randrange(97) for _ in range(prompt + learned)]
        examples.append(stage.Example({}, ids, [False] * prompt + [True] * learned))
    return examples


# ---- what is learned ----


def test_loss_is_cross_entropy_of_reasoning_and_answer_without_the_prompts_labels(tiny_model):
    """transformers' own loss with the label -100 on each prompt token."""
    examples, total = random_examples(), torch.zeros(())
    for example in examples:
        labels = [i if learned else -100 for i, learned in zip(example.ids, example.mask, strict=True)]
        loss = tiny_model(torch.tensor([example.ids]), labels=torch.tensor([labels])).loss
        total = total + loss * sum(example.mask)
    expected = total / sum(sum(e.mask) for e in examples)
    expected.backward()
    gradient = stages.gradient(tiny_model)
    run = Run(stage.Settings(max_grad_norm=0.0))
    train = partial(stage.train_step, batch=examples, pad_id=0, most=48, run=run)  # in micro-batches
    stats, found = stages.step_of(tiny_model, lambda sgd: train(tiny_model, sgd))
    assert stats["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert stats["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-4)
    assert (found - gradient).abs().max() < 1e-5


def loaded(folder: Path, **changes):
    """(training, held-out) examples of `folder`."""
    settings = stage.Settings(**{"data": str(folder), "held_out_share": 0.2, "device": "cpu"} | changes)
    tokenizer, model = load_tokenizer(world.BASE), load_policy(world.BASE, device="cpu")
    return stage.split_by_prompt(stage.load_examples(settings, tokenizer, model, Run(settings)), settings)


def test_without_reasoning_the_answers_alone_are_learned(data):
    train, _ = loaded(data, reasoning=False, held_out_share=0.0)
    learned = [[i for i, m in zip(e.ids, e.mask, strict=True) if m] for e in train]
    answers = [r["answer"] for r in read_jsonl(data / "sft.jsonl")]
    assert [load_tokenizer(world.BASE).decode(ids[:-1]) for ids in learned] == answers


def test_no_prompt_is_learned_and_held_out_in_another_dress(tmp_path):
    """The split went by the text to the letter, and the early stop by a loss on prompts that were learned."""
    words = sorted(word for word in load_tokenizer(world.BASE).get_vocab() if word.isalpha())[:20]
    pairs = [(word, text) for word in words for text in (f"how {word} ?", f"How  {word}\u200b?")]
    rows = [{"prompt": text, "reasoning": "so .", "answer": word} for word, text in pairs]
    write_jsonl(tmp_path / "sft.jsonl", [{"id": f"{i}", **row} for i, row in enumerate(rows)])
    train, held_out = loaded(tmp_path, held_out_share=0.5)
    learned, kept = ({e.ids[-2] for e in part} for part in (train, held_out))  # before the end of the turn
    assert [len(part) for part in (train, held_out, learned, kept)] == [20, 20, 10, 10] and not learned & kept


# ---- the stage ----


def test_a_padding_token_without_a_row_gives_way_before_it_pads(data, tmp_path, monkeypatch):
    """A model with windows reads padding, too."""
    tokenizer, base, out = load_tokenizer(world.BASE), tmp_path / "base", tmp_path / "sft"
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(vocab_size=len(tokenizer), num_key_value_heads=1, sliding_window=64)
    MistralForCausalLM(MistralConfig(**sizes)).save_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(base)
    run_here(SFT, sft_flags(data, out, model=base, epochs=1), monkeypatch)
    assert len(metrics_of(out)) == 4


HOT = {"learning_rate": 3e-3, "epochs": 16}  # with patience 2: it overfits, and stops


def test_the_early_stop_keeps_the_best_weights_and_a_light_start_learns(data, tmp_path, monkeypatch):
    out = tmp_path / "sft"
    run_here(SFT, sft_flags(data, out, **HOT), monkeypatch)
    lines = metrics_of(out)
    losses = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 16 and len(lines) == 4 * len(losses)  # stopped two epochs after the best
    assert lines[-1]["loss"] < lines[0]["loss"]
    model, held_out = load_policy(out, device="cpu"), loaded(data)[1]
    found = stage.held_out_loss(model, held_out, 0, 1024, Run(stage.Settings()))
    assert found == pytest.approx(min(losses), abs=1e-4)
    with torch.no_grad():  # row by row, of all logits
        learned = [x for e in held_out for x in literal.logprobs(model, e.ids, e.mask.index(True))]
    assert found == pytest.approx(-torch.stack(learned).mean().item(), abs=1e-4)


def test_kills_leave_no_trace_even_around_the_early_stop(data, tmp_path):
    one, other, log = (tmp_path / name for name in ("one", "other", "log"))
    run_process(SFT, sft_flags(data, one, **HOT, save_every=1), log)
    total = len(metrics_of(one))
    assert 8 <= total < 64
    for lines in (3, total - 3, total - 1):  # the second: between a bad epoch and the one that ends the run
        process = launch(SFT, sft_flags(data, other, **HOT, save_every=3), log)
        stages.wait_for_lines(other / "metrics.jsonl", lines, process)
        if lines == 3:
            time.sleep(random.Random(time.time_ns()).uniform(0, 0.2))
        kill_9(process)
    run_process(SFT, sft_flags(data, other, **HOT, save_every=3), log)
    assert same_run(one, other)


def test_a_run_that_was_stopped_in_its_last_moment_is_not_finished(data, tmp_path, monkeypatch):
    out, usual = tmp_path / "sft", {"epochs": 1}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(plumbing, "describe", Mock(side_effect=KeyboardInterrupt))
        run_here(SFT, sft_flags(data, out, **usual), monkeypatch)
    assert (out / "config.json").exists() and not (out / "README.md").exists()
    run_here(SFT, sft_flags(data, out, **usual), monkeypatch)
    assert (out / "README.md").exists()


@pytest.mark.parametrize("size, shard", [(2, False), (4, True)])
def test_processes_and_shards_equal_one(data, tmp_path, monkeypatch, size, shard):
    one, two, usual = tmp_path / "one", tmp_path / "two", {"epochs": 1, "learning_rate": 3e-5}
    lines = read_jsonl(data / "sft.jsonl")[:18]  # 9 prompts, 2 held out: a last batch of 6, in shares
    write_jsonl(tmp_path / "data" / "sft.jsonl", lines)
    words = sft_flags(tmp_path / "data", two, shard=shard, **usual)
    stages.join_group(SFT, words, tmp_path / "log", size)
    run_here(SFT, sft_flags(tmp_path / "data", one, **usual), monkeypatch)
    stages.same_training(one, two)
