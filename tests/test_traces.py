"""Self-written traces: what the sandbox's base writes, whatever the batches, and after a kill."""

from __future__ import annotations

import pytest

from lib import UserError
from lib.chat import parse_completion
from lib.run.files import read_jsonl
from lib.sandbox import world
from lib.sources.traces import TraceWriter, whole_sentences, write_all

RECORDS = [{"id": f"r{i}", **record} for i, record in enumerate(world.build_pool("train", "harmful", 5, 0))]


@pytest.fixture(scope="module")
def writer() -> TraceWriter:
    return make_writer(16)


def make_writer(max_new_tokens: int) -> TraceWriter:
    settings = dict(device="cpu", temperature=1.0, max_batch_tokens=4096)
    return TraceWriter(str(world.BASE), max_new_tokens=max_new_tokens, **settings)


def test_each_prompt_gets_its_traces_and_they_fit_the_format(writer, tmp_path):
    traces = write_all(writer, RECORDS, 3, 0, tmp_path / "progress.jsonl")
    assert [len(pairs) for pairs in traces] == [3] * len(RECORDS)
    assert len({pair for pairs in traces for pair in pairs}) > 3
    for reasoning, answer in (pair for pairs in traces for pair in pairs):
        assert parse_completion(f"{reasoning}\n</think>\n\n{answer}").well_formed


def test_a_killed_run_goes_on_to_the_same_traces(writer, tmp_path):
    progress = tmp_path / "progress.jsonl"
    whole = write_all(writer, RECORDS, 2, 7, progress)
    lines = progress.read_bytes().splitlines(keepends=True)
    progress.write_bytes(b"".join(lines[:2]) + lines[2][:20])  # killed while it wrote the third
    assert write_all(writer, RECORDS, 2, 7, progress) == whole
    assert len(read_jsonl(progress)) == len(RECORDS)
    assert (
        write_all(writer, RECORDS[3:], 2, 7, tmp_path / "other.jsonl") == whole[3:]
    )  # whoever shares the batch
    assert write_all(writer, RECORDS, 2, 8, tmp_path / "seed.jsonl") != whole


def test_a_prompt_too_long_for_the_model_is_one_line(tmp_path):
    with pytest.raises(UserError, match="--trace-model.*context"):
        write_all(make_writer(100_000), RECORDS[:1], 1, 0, tmp_path / "progress.jsonl")
    odd = {"id": "odd one", "prompt": "cake " * 470, "kind": "harmful"}
    with pytest.raises(UserError, match="--trace-model: odd one: its prompt .* context of .* is 512"):
        write_all(make_writer(16), [*RECORDS, odd], 1, 0, tmp_path / "progress.jsonl")
    assert not (tmp_path / "progress.jsonl").exists(), "before the first one is asked"


@pytest.mark.parametrize(
    "text, ended, kept",
    [
        ("All said. And", True, "All said. And"),
        ("All said. And", False, "All said."),
        ("No end in sight", False, ""),
        ("<think>Hm.</think> Yes.", True, "Hm. Yes."),
    ],
)
def test_whole_sentences(text, ended, kept):
    assert whole_sentences(text, ended) == kept
