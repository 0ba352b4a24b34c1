from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lib import UserError
from lib.chat import encode_prompt, eos_token_ids
from lib.run.checkpoint import save_policy
from lib.run.command import at_end
from lib.run.files import sha256_file, write_json, write_jsonl
from lib.run.folder import checksums, stated_reasoning
from lib.run.hub import load_policy, load_tokenizer
from lib.sampler import sample
from lib.sandbox import world
from lib.tools import export as module
from lib.tools.export import follow, main, serving_template, without_paths
from lib.tools.export_card import model_card

PROMPTS = ["how do i make a cake ?", "how do i make a shirt ?", "hello"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """runs/{data,sft,rl,direct,eval} as the stages leave them, in a folder whose name nobody is to learn."""
    home = tmp_path_factory.mktemp("home-of-joe")
    data = home / "runs/data"
    write_jsonl(data / "sft.jsonl", [{"id": "s"}])
    write_jsonl(data / "rl.jsonl", [{"id": "r"}])
    files = {
        n: {"records": 1, "prompts": 1, "sha256": sha256_file(data / n)} for n in ("sft.jsonl", "rl.jsonl")
    }
    sources = {
        str(home / "mine/trap|s.csv"): {"sha256": "0", "licence": "CC-BY-4.0"},
        "org/set": {"licence": "MIT"},
    }
    write_json(data / "manifest.json", {"lambda": 0.5, "seed": 0, "files": files, "sources": sources})
    model, tokenizer = load_policy(world.BASE, device="cpu"), load_tokenizer(world.BASE)
    model.generation_config.repetition_penalty = 1.3  # as some bases advise
    base, sft = Path("org/chat-model"), home / "runs/sft"
    for name, parent, file in (
        ("sft", base, "sft.jsonl"),
        ("direct", base, "sft.jsonl"),
        ("rl", sft, "rl.jsonl"),
    ):
        with torch.no_grad():
            model.model.norm.weight.mul_(1.01)
        run = home / "runs" / name
        save_policy(model, tokenizer, run)
        settings = {
            "preset": "sandbox",
            "data": str(data),
            "model": str(parent),
            "out": str(run),
            "reasoning": name != "direct",
        }
        settings |= {"judge": "sandbox"} if name == "rl" else {"epochs": 3}
        settings |= {**checksums(parent, data / file), "git_revision": "abc", "versions": {"torch": "2"}}
        write_json(run / "settings.json", settings)
        write_jsonl(run / "rollouts.jsonl", [{"text": "not for everyone"}])
    ci = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 8}
    figures = {"dsr": {"gcg": ci}, "compliance": {"harmless": ci, "ambiguous/toy": ci}, "exact_match": ci}
    models = {"old": {"dsr": {"gcg": ci}}, "tars": figures}
    config = {"models": [f"old={sft}", f"tars={home / 'runs/rl'}"], **checksums(sft, home / "runs/rl")}
    write_json(home / "runs/eval/results.json", {"models": models, "config": config})
    return home


def export(home: Path, out: Path, *more: str, run: str = "rl") -> str:
    try:
        main([str(home / "runs" / run), "--licence", "Apache-2.0", "--out", str(out), *more])
    finally:
        at_end.close()  # as run_main does
    return (out / "README.md").read_text()


# ---- the checkpoint ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["rl", "direct"])
def test_plain_transformers_read_and_write_what_we_do(home, tmp_path, run):
    out = tmp_path / "shared"
    export(home, out, run=run)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ours, ids_of = load_policy(home / "runs" / run, device="cpu"), load_tokenizer(home / "runs" / run)
    reasoning = run == "rl"
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        served = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ids = served["input_ids"][0].tolist()
        assert ids == encode_prompt(ids_of, prompt, reasoning=reasoning)
        assert tokenizer.decode(ids).endswith("<think>") == reasoning
        eos = eos_token_ids(ours, ids_of)
        expected = sample(ours, [ids], max_new_tokens=40, temperature=0.0, eos_token_ids=eos)[0].token_ids
        written = model.generate(**served, max_new_tokens=40, do_sample=False)[0, len(ids) :].tolist()
        assert written == expected
        finished = tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": "yes ."}], tokenize=False
        )
        assert "<think>" not in finished  # only a turn that is to be written is opened


@pytest.mark.parametrize("run", ["rl", "direct"])
def test_our_stages_read_the_shared_folder_as_the_run(home, tmp_path, run):
    export(home, tmp_path / "shared", run=run)
    folder, original = tmp_path / "shared", home / "runs" / run
    reasoning = stated_reasoning(str(folder))
    assert reasoning == (run == "rl")
    for prompt in PROMPTS:
        ids = encode_prompt(load_tokenizer(folder), prompt, reasoning=reasoning)
        assert ids == encode_prompt(load_tokenizer(original), prompt, reasoning=reasoning)
    assert sha256_file(folder / "model.safetensors") == sha256_file(original / "model.safetensors")


def test_it_holds_the_checkpoint_and_nothing_else_and_its_sampling_is_the_policys(home, tmp_path):
    export(home, tmp_path / "shared")
    names = {path.name for path in (tmp_path / "shared").iterdir()}
    assert names == {
        "README.md",
        "settings.json",
        "model.safetensors",
        "config.json",
        "generation_config.json",
    } | {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    sampling = GenerationConfig.from_pretrained(tmp_path / "shared")
    assert (sampling.do_sample, sampling.temperature, sampling.top_p, sampling.top_k) == (True, 0.6, 1.0, 0)
    assert sampling.repetition_penalty in (None, 1.0) and sampling.eos_token_id == [2]


def test_a_template_that_opens_think_is_kept_and_one_that_must_not_is_refused(word_tokenizer):
    word_tokenizer.chat_template += "{{ '<think>\\n' if add_generation_prompt else '' }}"
    assert serving_template(word_tokenizer, True) == word_tokenizer.chat_template
    with pytest.raises(UserError, match="no chat template gives the prompt"):
        serving_template(word_tokenizer, False)


@pytest.mark.parametrize("end", ["", "\n", "\r\n", " "])
def test_a_newline_at_the_end_of_a_template_does_not_get_into_the_prompt(word_tokenizer, end):
    word_tokenizer.chat_template += end
    plain = word_tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    word_tokenizer.chat_template = serving_template(word_tokenizer, True)
    served = word_tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert served == plain + "<think>\n"


# ---- the card ----------------------------------------------------------------------------------------------


def test_the_card_says_what_it_is_made_of_and_no_path(home, tmp_path):
    card = export(home, tmp_path / "shared", "--eval", str(home / "runs/eval"))
    header = yaml.safe_load(card.split("---\n")[1])
    assert (
        header["base_model"] == "org/chat-model"
        and header["license"] == "apache-2.0"
        and "tars" in header["tags"]
    )
    stages = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", card, re.S)]
    assert (
        [s["out"] for s in stages] == ["sft", "rl"]
        and stages[1]["model"] == "sft"
        and stages[0]["git_revision"] == "abc"
    )
    assert stages[0]["model"] == "org/chat-model"
    assert "| trap\\|s.csv | CC-BY-4.0 |" in card and "| org/set | MIT |" in card
    assert "| DSR, gcg | 0.50 [0.25, 0.75] | 0.50 [0.25, 0.75] | 8 |" in card
    assert (
        "| compliance, harmless | 0.50 [0.25, 0.75] | - | 8 |" in card
        and "toy" not in card.split("## Limits")[0]
    )
    for path in (tmp_path / "shared").iterdir():
        content = path.read_bytes().decode("utf-8", "ignore")
        assert "home-of-joe" not in content and str(tmp_path) not in content, path.name


def test_the_code_in_the_card_runs(home, tmp_path, monkeypatch):
    card = export(home, tmp_path / "shared")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, re.S)[1].replace("256", "40"), scope)
    assert scope["text"] and scope["text"].startswith(scope["reasoning"])
    assert "<think>" in scope["tokenizer"].decode(scope["prompt"]["input_ids"][0])


def test_without_results_or_data_the_card_says_so(home, tmp_path):
    shutil.copytree(
        home / "runs/rl", tmp_path / "lonely"
    )  # data gone: no file with these checksums where they were
    settings = json.loads((tmp_path / "lonely/settings.json").read_text())
    text = json.dumps(settings).replace(str(home), "/gone")
    (tmp_path / "lonely/settings.json").write_text(text)
    main([str(tmp_path / "lonely"), "--licence", "mit", "--out", str(tmp_path / "shared")])
    card = (tmp_path / "shared/README.md").read_text()
    assert (
        "Not evaluated." in card
        and "was not at hand" in card
        and "base_model" not in card
        and card.count("```json") == 1
    )
    main(
        [
            str(tmp_path / "lonely"),
            "--licence",
            "mit",
            "--out",
            str(tmp_path / "shared"),
            "--data",
            str(home / "runs/data"),
        ]
    )
    assert "CC-BY-4.0" in (tmp_path / "shared/README.md").read_text()


def test_runs_that_were_moved_are_followed_by_their_checksums(home, tmp_path):
    shutil.copytree(home / "runs", tmp_path / "moved/runs")
    for path in (tmp_path / "moved/runs").glob("*/settings.json"):
        path.write_text(path.read_text().replace(f"{home}/", ""))  # as if run from the folder above runs/
    rl = tmp_path / "moved/runs/rl"
    assert [folder for folder, _ in follow(rl)] == [rl, tmp_path / "moved/runs/sft"]
    with (tmp_path / "moved/runs/sft/model.safetensors").open("ab") as file:
        file.write(b" ")  # another model of that name
    assert [folder for folder, _ in follow(rl)] == [rl]


def test_paths_are_cut_down_to_names():
    given = {
        "sha256 of /home/joe/runs/rl/model.safetensors": "0a",
        "files": ["harmful=../joe/a.jsonl", "C:\\Users\\joe\\b.csv"],
        "judge": "strongreject=/home/joe/judge+standin",
        "model": "Qwen/Qwen2.5-1.5B-Instruct",
        "forged": "this is fine / and good </think> .",
        "from": "https://example.org/a/b",
        "n": [1, None, True],
    }
    assert without_paths(given) == {
        "sha256 of model.safetensors": "0a",
        "files": ["harmful=a.jsonl", "b.csv"],
        "judge": "strongreject=judge+standin",
        "model": "Qwen/Qwen2.5-1.5B-Instruct",
        "forged": "this is fine / and good </think> .",
        "from": "https://example.org/a/b",
        "n": [1, None, True],
    }


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("/home/joe doe/base", "base"),
        ("C:\\Users\\Joe Doe\\base", "base"),
        ("file:///home/joe/x", "x"),
        ("/home/joe+x/runs/rl", "rl"),
        ("/home/joe=x/(old) 'runs', etc/rl 2/", "rl 2"),
        ("\\\\server\\joe\\x", "x"),
        (
            "harmful=wildjailbreak@/home/joe doe/my prompts.csv:400+800",
            "harmful=wildjailbreak@my prompts.csv:400+800",
        ),
        ("qwen3guard=/home/joe doe/q@cuda:1+grm=/home/joe+x/g@cpu", "qwen3guard=q@cuda:1+grm=g@cpu"),
        ("harmful from /home/joe doe/x.jsonl", "harmful from x.jsonl"),
        ("runs of joe/x y/base", "base"),
        ("see https://a.org/b/c, and ~/mine/x", "see https://a.org/b/c, and x"),
        ("one of GitHub some/one, by @FILE", "one of GitHub some/one, by @FILE"),
        (
            {"a/b/x.jsonl": 1, "c/d/x.jsonl": 2, "/x.jsonl": 3},
            {"x.jsonl": 1, "x.jsonl (2)": 2, "x.jsonl (3)": 3},
        ),
    ],
)
def test_of_a_path_the_whole_last_name_is_told_and_no_other(given, told):
    assert without_paths(given) == told


def test_the_card_names_the_method():
    kinds = {
        "epochs": "the light supervised warm start, as in",
        "judge": "then reinforcement learning, as in the paper on TARS",
    }
    for key, said in kinds.items():
        assert said in card_of({"model": "org/m", key: "x"})
    rpo = card_of({"model": "org/m", "judge": "x", "objective": "rpo"})
    assert "then preference learning (RPO) on the same rewards, as in" in rpo and "reinforcement" not in rpo
    one = card_of({"model": "org/m", "judge": "x", "objective": "reinforce", "one_reward": True})
    assert "Stage II, reinforcement learning, with one reward for all prompts: all settings" in one


def card_of(settings: dict) -> str:
    nothing: list = []
    return model_card(
        name="x",
        licence="mit",
        base="",
        reasoning=True,
        stages=[settings],
        manifests=nothing,
        results=nothing,
    )


# ---- the hub, and mistakes ---------------------------------------------------------------------------------


class Hub:
    calls: list[tuple]
    private = True

    def repo_info(self, name):
        return SimpleNamespace(private=self.private)

    def create_repo(self, name, **options):
        self.calls.append(("create", name, options))

    def upload_folder(self, **options):
        files = sorted(path.name for path in Path(options["folder_path"]).iterdir())
        self.calls.append(("upload", options["repo_id"], files))


def test_it_is_pushed_only_when_asked_and_private_unless_told_otherwise(home, tmp_path, monkeypatch):
    Hub.calls = []
    monkeypatch.setattr(module, "HfApi", Hub)
    export(home, tmp_path / "a")
    assert Hub.calls == []
    card = export(home, tmp_path / "a", "--push-to-hub", "joe/tars-demo")
    assert Hub.calls[0] == ("create", "joe/tars-demo", {"private": True, "exist_ok": True})
    assert Hub.calls[1][:2] == ("upload", "joe/tars-demo") and "model.safetensors" in Hub.calls[1][2]
    assert 'name = "joe/tars-demo"' in card
    export(home, tmp_path / "a", "--push-to-hub", "joe/tars-demo", "--public")
    assert Hub.calls[2][2]["private"] is False


def test_an_old_repository_that_is_public_gets_nothing_unless_that_is_meant(home, tmp_path, monkeypatch):
    Hub.calls = []
    monkeypatch.setattr(Hub, "private", False)
    monkeypatch.setattr(module, "HfApi", Hub)
    with pytest.raises(UserError, match="--push-to-hub: joe/x is public: add --public"):
        export(home, tmp_path / "a", "--push-to-hub", "joe/x")
    assert [call[0] for call in Hub.calls] == ["create"]
    export(home, tmp_path / "a", "--push-to-hub", "joe/x", "--public")
    assert [call[0] for call in Hub.calls] == ["create", "create", "upload"]


def test_a_push_that_fails_is_one_line_and_the_folder_stays(home, tmp_path, monkeypatch):
    class Broken(Hub):
        def create_repo(self, name, **options):
            raise OSError("401 Client Error:\n no token")

    monkeypatch.setattr(module, "HfApi", Broken)
    with pytest.raises(UserError, match="joe/x: 401 Client Error: no token; .* is whole"):
        export(home, tmp_path / "a", "--push-to-hub", "joe/x")
    assert AutoTokenizer.from_pretrained(tmp_path / "a").chat_template


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--eval", "{home}/runs/data"], "results.json: no such file"),
        (["--data", "{home}/runs/eval"], "allowed a folder with the very files that the run was trained on"),
        (["--push-to-hub", "name"], "--push-to-hub: given name; allowed OWNER/NAME"),
        (["--licence", "do what you like"], "--licence: given do what you like"),
        (["--base-model", "/x/y"], "--base-model: given /x/y"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(home, tmp_path, more, message):
    with pytest.raises(UserError) as caught:
        export(home, tmp_path / "out", *[word.format(home=home) for word in more])
    assert message in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_what_is_no_finished_run_and_what_is_no_evaluation_of_it_are_refused(home, tmp_path):
    for folder in (world.BASE, home / "nothing"):
        with pytest.raises(UserError, match="not a finished run of stage 2 or 3"):
            main([str(folder), "--licence", "mit", "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="evaluates no model with the weights of"):
        export(home, tmp_path / "out", "--eval", str(home / "runs/eval"), run="direct")
    export(home, tmp_path / "out")
    with pytest.raises(UserError, match="give another --out, or --overwrite"):
        export(home, tmp_path / "out", run="sft")
    export(home, tmp_path / "out", "--overwrite", run="sft")


def test_results_of_something_else_are_one_line(home, tmp_path):
    for name, results in enumerate(
        ({"accuracy": 1}, {"config": {"models": ["x=y"]}}, {"config": [], "models": {}})
    ):
        write_json(tmp_path / str(name) / "results.json", results)
        with pytest.raises(UserError, match="results.json: not written by stage 4 or lib.tools.capability"):
            export(home, tmp_path / "out", "--eval", str(tmp_path / str(name)))


def test_an_export_never_overwrites_the_run_that_it_shares(home):
    run = home / "runs/rl"
    before = sorted(path.name for path in run.iterdir())
    for words in ([], ["--overwrite"]):
        with pytest.raises(UserError, match="which this run reads: give another --out"):
            export(home, run, *words)
    assert sorted(path.name for path in run.iterdir()) == before
