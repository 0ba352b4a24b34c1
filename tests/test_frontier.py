"""`make frontier`: every command is one that its stage accepts, jobs wait for what they need, and the figures are right."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from lib import UserError
from lib.compare import frontier, frontier_report
from lib.compare.jobs import Children, Job, run_jobs
from lib.run.files import write_json, write_jsonl
from lib.run.settings import parse_settings

CLASSES = {
    "01": ("Settings", "mixture"),
    "02": ("Settings", "sft"),
    "03": ("Settings", "rl"),
    "04": ("Settings", "eval"),
}


def rl_run(folder: Path, tokens: int, steps: int = 2, **more: int) -> None:
    folder.mkdir(parents=True)
    line = {
        "sample_tokens_per_s": tokens / 0.7,
        "seconds_sample": 0.7,
        "train_tokens_per_s": tokens / 1.3,
        "seconds_train": 1.3,
        **more,
    }
    write_jsonl(folder / "metrics.jsonl", [{"step": i, **line} for i in range(steps)])


@pytest.mark.parametrize("quick", [False, True])
def test_every_job_is_a_command_that_its_stage_accepts_and_comes_after_what_it_reads(tmp_path, quick):
    seed = frontier.FrontierSeed(tmp_path, 41, quick)
    for share in (0.1, 0.5):
        rl_run(seed.dir / f"tars-{share:g}", 300)
        rl_run(seed.dir / f"rl-direct-{share:g}", 100)
    jobs = seed.jobs((0.1, 0.5), frontier.METHODS) + seed.long_jobs((0.1, 0.5))
    earlier, commands = {}, {}
    for job in jobs:
        script, *words = job.command
        stage = importlib.import_module(script.removesuffix(".py"))
        settings = commands[job.name] = parse_settings(
            getattr(stage, CLASSES[script[:2]][0]), CLASSES[script[:2]][1], words
        )
        assert settings.seed == 41 and settings.out == str(tmp_path / job.name)
        known = set(job.after).union(*(earlier[name] for name in job.after))  # what is there when it begins
        reads = [settings.model] if hasattr(settings, "model") else []
        reads += (
            [subject.path for subject in stage.read_subjects(settings)] if script.startswith("04") else []
        )
        reads += [settings.data] if hasattr(settings, "data") else []
        assert {os.path.relpath(p, tmp_path) for p in reads if p != "lib/sandbox/base"} <= known
        assert job.name not in earlier  # nobody writes where another wrote
        earlier[job.name] = known
    at = lambda name: commands[f"seed-41/{name}"]  # noqa: E731
    assert [at(name).lambda_harmful for name in ("data", "data-0.1")] == [0.5, 0.1]
    assert {at(f"{m}-0.1").data for m in ("tars", "rl-direct", "sft", "rpo")} == {str(seed.dir / "data-0.1")}
    assert {at(f"{m}-0.1").model for m in ("tars", "sft", "rpo")} == {str(seed.dir / "sft")}
    assert (
        at("rl-direct-0.5").max_new_tokens,
        at("rl-direct-0.5").reasoning,
        at("rl-direct-0.5").epochs,
    ) == (12, False, 1.0)
    assert at("rl-direct-long-0.5").epochs == 3.0  # 300 tokens a step against 100
    assert (at("rpo-0.5").objective, at("sft-0.5").traces, at("data").rl_traces) == ("rpo", "sft_rl.jsonl", 8)
    assert {at(name).data for name in ("eval-tars-0.1", "eval-sft-0.5")} == {
        str(seed.dir / "data")
    }  # the same prompts for all


def test_lambdas_share_pi_sft_only_if_their_traces_are_the_same_bytes(tmp_path):
    seed = frontier.FrontierSeed(tmp_path, 41, False)
    check = next(job.check for job in seed.jobs((0.9,), ("tars",)) if job.name == "seed-41/data-0.9")
    for name, text in (("data", "a\n"), ("data-0.9", "a\n")):
        (seed.dir / name).mkdir(parents=True)
        (seed.dir / name / "sft.jsonl").write_text(text)
    check()
    (seed.dir / "data-0.9" / "sft.jsonl").write_text("b\n")
    with pytest.raises(UserError, match=r"data-0\.9/sft\.jsonl differs"):
        check()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "ppo"], "given ppo; allowed tars, rl-direct, sft, rpo"),
        (["--lambdas", "0.5", "1.5"], "given 1.5; allowed a number from 0 to 1"),
        (["--lambdas", "nan"], "given nan; allowed a number from 0 to 1"),
        (["--seeds", "0"], "--seeds: given 0"),
        (["--equal-tokens", "--methods", "tars", "sft"], "--equal-tokens: compares tars and rl-direct"),
    ],
)
def test_a_flag_out_of_range_is_told_in_one_line(words, said):
    with pytest.raises(UserError, match=said):
        frontier.parse(words)


# ---- jobs --------------------------------------------------------------------------------------------------


class Fake:
    """Instead of processes: notes when each job begins and ends, and how many run at once."""

    def __init__(self, fails: tuple[str, ...] = ()) -> None:
        self.fails, self.lock, self.order, self.now, self.most, self.stopped = (
            fails,
            threading.Lock(),
            [],
            0,
            0,
            False,
        )

    def __call__(self, job: Job) -> None:
        with self.lock:
            self.order.append(job.name)
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.03)
        with self.lock:
            self.now -= 1
            self.order.append(f"end of {job.name}")
        if job.name in self.fails:
            raise UserError(f"{job.name} broke")

    def stop(self) -> None:
        self.stopped = True


TREE = [
    Job("a", ()),
    Job("b", (), ("a",)),
    Job("c", (), ("b",)),
    Job("d", ()),
    Job("e", (), ("a", "d")),
    Job("f", ()),
]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_jobs_wait_for_what_they_need_and_no_more_run_than_allowed(workers):
    fake = Fake()
    with tqdm(total=len(TREE), disable=True) as bar:
        run_jobs(TREE, fake, fake.stop, workers, bar)
    assert fake.most == workers and not fake.stopped
    for job in TREE:
        for needed in job.after:
            assert fake.order.index(f"end of {needed}") < fake.order.index(job.name)


def test_what_does_not_need_a_failed_job_is_still_done_and_then_the_failure_is_told():
    fake = Fake(fails=("b",))
    with (
        tqdm(total=len(TREE), disable=True) as bar,
        pytest.raises(UserError, match="1 failed, 1 could not begin.* b broke"),
    ):
        run_jobs(TREE, fake, fake.stop, 2, bar)
    assert {name for name in fake.order if not name.startswith("end")} == {"a", "b", "d", "e", "f"}


def test_a_bug_stops_everything():
    def run(job: Job) -> None:
        raise ZeroDivisionError

    fake = Fake()
    with tqdm(total=1, disable=True) as bar, pytest.raises(ZeroDivisionError):
        run_jobs(TREE, run, fake.stop, 1, bar)
    assert fake.stopped


def test_a_failing_command_is_shown_with_its_last_lines_and_not_those_of_an_earlier_try(tmp_path):
    children = Children(tmp_path)
    children(Job("s/x", ("-c", "print('an earlier try')")))
    code = "import os, sys; print('threads', os.environ['OMP_NUM_THREADS']); sys.exit('error: --wings: no such flag')"
    with pytest.raises(UserError) as caught:
        children(Job("s/x", ("-c", code)))
    said = str(caught.value)
    assert (
        "exit code 1" in said and "x.log" in said and "--wings: no such flag" in said and "threads 1" in said
    )
    assert "an earlier try" not in said and "an earlier try" in (tmp_path / "s/x.log").read_text()


PARENT = """
import signal, sys
from pathlib import Path
from tqdm import tqdm
from lib.compare.jobs import Children, Job, run_jobs
signal.signal(signal.SIGTERM, signal.default_int_handler)
signal.signal(signal.SIGINT, signal.default_int_handler)
root, child = Path(sys.argv[1]), "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
children = Children(root)
run_jobs([Job(n, ("-c", child)) for n in "abc"], children, children.stop, 2, tqdm(total=3))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stopping_ends_all_children_and_begins_no_other(tmp_path, how):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stderr=subprocess.DEVNULL)
    logs, until = [tmp_path / "a.log", tmp_path / "b.log"], time.monotonic() + 60
    while not all(log.exists() and log.read_text().endswith("\n") for log in logs):
        assert time.monotonic() < until and parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(how)
    assert parent.wait(30) != 0
    for log in logs:
        with pytest.raises(ProcessLookupError):
            os.kill(int(log.read_text()), 0)
    assert not (tmp_path / "c.log").exists()


# ---- figures -----------------------------------------------------------------------------------------------


def test_frontier_area_is_the_union_of_what_the_points_dominate():
    area = frontier_report.dominated_area
    assert area([]) == 0.0
    assert area([(0.8, 0.5)]) == pytest.approx(0.4)
    assert area([(0.8, 0.5), (0.8, 0.5), (0.3, 0.2)]) == pytest.approx(
        0.4
    )  # twice the same, and a dominated one: no more
    points = [(0.9, 0.1), (0.6, 0.55), (0.25, 0.95), (0.5, 0.5)]
    grid = [(i + 0.5) / 400 for i in range(400)]
    counted = sum(any(x >= u and y >= v for x, y in points) for u in grid for v in grid) / 400**2
    assert area(points) == pytest.approx(counted, abs=0.005)


def row(dsr: float, task: float, tokens: float = 1000.0) -> dict[str, float]:
    return {c: 0.5 for c in frontier_report.COLUMNS} | {
        "DSR": dsr,
        "task score": task,
        "training tokens": tokens,
    }


def rows() -> frontier_report.Rows:
    """Three seeds, two lambdas: tars is better by 0.1, 0.2, 0.3 in DSR at both; task scores are equal."""
    found: frontier_report.Rows = {("base", None): [row(0.0, 0.9, math.nan) for _ in range(3)]}
    found["tars", 0.5] = [row(0.5 + 0.1 * i, 0.8) for i in range(3)]
    found["tars", 0.9] = [row(0.7 + 0.1 * i, 0.4) for i in range(3)]
    found["rl-direct", 0.5] = [row(0.4, 0.8) for _ in range(3)]
    found["rl-direct", 0.9] = [row(0.6, 0.4) for _ in range(3)]
    found["rl-direct-long", 0.5] = [row(0.4, 0.8) for _ in range(3)]
    found["rl-direct-long", 0.9] = [row(0.6, 0.4) for _ in range(3)]
    return found


def test_differences_are_paired_by_seed_and_lambda():
    found = frontier_report.differences(rows(), frontier_report.areas(rows()))
    assert list(found) == ["base", "rl-direct", "rl-direct-long"]
    dsr = found["rl-direct"]["DSR"]
    half = 4.303 * 0.1 / math.sqrt(3)  # Student's t of three seeds: mean 0.2, standard deviation 0.1
    assert dsr["each"] == [0.1, 0.2, 0.3]
    assert (dsr["mean"], dsr["low"], dsr["high"]) == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-4)
    assert found["rl-direct"]["task score"]["each"] == [0.0, 0.0, 0.0]
    assert found["base"]["DSR"]["each"] == [0.6, 0.7, 0.8]  # the same base at either lambda
    assert found["rl-direct"]["frontier area"]["each"] == pytest.approx(
        [0.08, 0.16, 0.24]
    )  # 0.8 x the gain in DSR
    without = {point: runs for point, runs in rows().items() if point[0] != "tars"}
    assert frontier_report.differences(without, frontier_report.areas(without)) == {}


def test_one_seed_has_no_interval_and_a_figure_that_is_not_there_is_none():
    alone = frontier_report.over_seeds([0.25])
    assert (alone["mean"], alone["low"], alone["high"], alone["n"]) == (0.25, None, None, 1)
    assert frontier_report.over_seeds([0.1, math.nan]) is None
    assert frontier_report.shown(alone) == "0.25" and frontier_report.shown(None) == "-"
    assert (
        frontier_report.shown({"mean": 123456.0, "low": 120000.0, "high": 130000.0})
        == "123,456 [120,000, 130,000]"
    )
    assert frontier_report.shown({"mean": -0.001, "low": -0.1, "high": 0.1}, "+") == "+0.00 [-0.10, +0.10]"


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_result_is_a_table_valid_json_and_two_figures(tmp_path, seeds):
    text = frontier_report.write_rows(tmp_path, {point: runs[:seeds] for point, runs in rows().items()})
    found = json.loads(
        (tmp_path / "frontier.json").read_text(),
        parse_constant=lambda name: pytest.fail(f"{name} is not JSON"),
    )
    assert [(p["method"], p["lambda"]) for p in found["points"][:3]] == [
        ("base", None),
        ("tars", 0.5),
        ("tars", 0.9),
    ]
    assert found["points"][0]["training tokens"] is None
    assert "| tars | 0.5 | " + ("0.50 |" if seeds == 1 else "0.60 [0.35, 0.85] |") in text
    assert text == (tmp_path / "frontier.md").read_text()
    pytest.importorskip("matplotlib")
    for name in ("frontier", "frontier_tokens"):
        assert f"({name}.png)" in text and (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_has_a_line_a_method_through_its_lambdas_in_order(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    runs = rows()
    points = [
        {"method": m, "lambda": share}
        | {c: frontier_report.over_seeds([r[c] for r in runs[m, share]]) for c in runs[m, share][0]}
        for m, share in runs
    ]
    frontier_report.draw(figure, points, ["base", "tars", "rl-direct"])
    curves = [container.lines[0] for container in figure.axes[0].containers]
    assert [list(line.get_xdata()) for line in curves] == [[0.0], [0.6, 0.8], [0.4, 0.6]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.5", "0.9", "0.5", "0.9"]


def test_training_tokens_are_those_sampled_and_those_trained_on(tmp_path):
    rl_run(tmp_path / "rl", 300, steps=4)
    assert frontier_report.training_tokens(tmp_path / "rl") == 4 * (300 + 300)
    rl_run(tmp_path / "rpo", 300, steps=4, pairs=16, tied_pairs=48)
    assert frontier_report.training_tokens(tmp_path / "rpo") == 4 * (
        300 + 75
    )  # three pairs of four say nothing


def test_training_tokens_of_sft_are_the_traces_that_it_saw(tmp_path, word_tokenizer):
    word_tokenizer.save_pretrained(tmp_path / "sft")
    traces = [{"prompt": "how are you", "reasoning": "maybe " * n, "answer": "green soup"} for n in (1, 3)]
    write_jsonl(tmp_path / "sft_rl.jsonl", traces)
    settings = {"data": str(tmp_path), "traces": "sft_rl.jsonl", "batch_size": 2, "reasoning": True}
    write_json(tmp_path / "sft" / "settings.json", settings)
    write_jsonl(tmp_path / "sft" / "metrics.jsonl", [{"step": i, "loss": 1.0} for i in range(5)])
    # reasoning of 2 words on average, answer of 2, both markers and the end; two traces an update, five updates
    assert frontier_report.training_tokens(tmp_path / "sft") == 5 * 2 * (2 + 2 + 2 + 1)


def test_rows_are_read_from_the_evaluations(tmp_path):
    ci = lambda mean: {"mean": mean, "low": 0.0, "high": 1.0, "n": 9}  # noqa: E731
    dsr = {
        "dsr": {"direct": ci(0.9), "jailbreak": ci(0.6), "plain_or_gcg": ci(0.3)},
        "plane": {"task_score": ci(0.7)},
    }
    model = dsr | {"compliance": {"harmful": ci(0.2)}, "reasoning_tokens": {}}
    write_json(tmp_path / "s" / "eval-references" / "results.json", {"models": {"base": model, "sft": model}})
    write_json(tmp_path / "s" / "eval-tars-0.5" / "results.json", {"models": {"tars-0.5": model}})
    rl_run(tmp_path / "s" / "tars-0.5", 10)
    found = frontier_report.read_rows([tmp_path / "s"], [0.5], ["tars"])
    assert list(found) == [("base", None), ("pi_SFT", None), ("tars", 0.5)]
    tars = found["tars", 0.5][0]
    assert tars["DSR"] == pytest.approx(0.6) and tars["task score"] == 0.7 and tars["training tokens"] == 40
    assert tars["refusal harmful"] == pytest.approx(0.8) and math.isnan(tars["reasoning tokens harmful"])
