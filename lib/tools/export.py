"""Make a run ready to share: a folder that any tool for Hugging Face checkpoints loads, with a model card.

    python -m lib.tools.export runs/demo/rl --licence apache-2.0 --eval runs/demo/eval --out runs/demo/shared
    python -m lib.tools.export runs/paper/rl --licence apache-2.0 --out runs/paper/shared --push-to-hub OWNER/NAME

The stages open a reasoner's turn with <think> by themselves. Others do not, so here the chat template does it, and
generation_config.json has every token that ends a turn: `apply_chat_template` and `generate` alone then read and write
the tokens that were trained. Rollouts and logs stay behind, and of paths only the last name goes along.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lib import UserError
from lib.chat import THINK_OPEN, encode_prompt, eos_token_ids
from lib.run.command import Flags
from lib.run.files import atomic, sha256_file, write_json, write_text
from lib.run.folder import SUM, checksums, claim_folder
from lib.run.hub import load_pretrained, load_tokenizer


def is_finished(out):
    return (out / "config.json").exists() and not (out / "state").exists()


from lib.tools.export_card import model_card
from lib.tools.export_paths import without_paths

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TEMPERATURE = 0.6  # at which the models are evaluated (paper)

# ---- what the run was made of ------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object")
    return found


def stated_sums(settings: dict, folder: str) -> dict[str, str]:
    """{file name: checksum} that settings.json has of the files in `folder`, which it names as its run was given it."""
    begin = f"{SUM}{Path(folder)}{os.sep}"
    return {key[len(begin) :]: value for key, value in settings.items() if key.startswith(begin)}


def locate(folder: str, sums: dict[str, str], places: Sequence[Path]) -> Path | None:
    """The folder with these very files: as it is named, or seen from one of `places`, since runs get moved."""
    for candidate in [Path(folder), *(place / folder for place in places)]:
        files = {name: candidate / name for name in sums}
        if sums and all(f.is_file() and sha256_file(f)[:32] == sums[name] for name, f in files.items()):
            return candidate
    return None


def follow(run: Path) -> Iterator[tuple[Path, dict]]:
    """(folder, settings) of the run, of the run that it started from, and so on as long as they are found."""
    folder: Path | None = run
    while folder is not None and (folder / "settings.json").is_file():
        settings = read_json(folder / "settings.json")
        if "model" not in settings:
            return
        yield folder, settings
        folder = locate(settings["model"], stated_sums(settings, settings["model"]), folder.resolve().parents)


def data_of(stages: Sequence[tuple[Path, dict]], given: str) -> list[dict]:
    """The manifests of the data that the stages were trained on, each once; `given` is where else to look."""
    found, used = {}, False
    for folder, settings in stages:
        sums = stated_sums(settings, settings["data"])
        place = locate(given, sums, []) if given else None
        used = used or place is not None
        place = place or locate(settings["data"], sums, folder.resolve().parents)
        if place and (place / "manifest.json").is_file():
            found[place.resolve()] = read_json(place / "manifest.json")
    if given and not used:
        raise UserError(
            f"--data: given {given}; allowed a folder with the very files that the run was trained on"
        )
    return list(found.values())


def results_of(run: Path, folder: str) -> dict[str, Any]:
    """{"name": what the run is called there, "models": {name: figures}} of an evaluation's results.json."""
    results, weights = read_json(Path(folder) / "results.json"), set(checksums(run).values())
    config, models = results.get("config"), results.get("models")
    if not (isinstance(config, dict) and isinstance(config.get("models"), list) and isinstance(models, dict)):
        raise UserError(
            f"--eval: {Path(folder) / 'results.json'}: not written by stage 4 or lib.tools.capability"
        )
    for text in map(str, config["models"]):
        name, _, path = text.partition("=")
        if isinstance(models.get(name), dict) and weights == set(stated_sums(config, path).values()):
            return {"name": name, "folder": Path(folder).resolve().name, "models": models}
    raise UserError(f"--eval: given {folder}, which evaluates no model with the weights of {run}")


# ---- the checkpoint ----------------------------------------------------------------------------------------


def serving_template(tokenizer: PreTrainedTokenizerBase, reasoning: bool) -> str:
    """The chat template with which plain transformers reads what `encode_prompt` gives, token for token.

    Raises UserError where none is known: a template that opens <think> for a model that does not reason, and a
    tokenizer that reads <think> in another way when the text before it is read along.
    """
    template, messages = tokenizer.chat_template, [{"role": "user", "content": "How are you?"}]
    if not isinstance(template, str):
        raise UserError("the tokenizer has several chat templates: leave it the one that it was trained with")

    def served(template: str) -> list[int]:
        options: dict[str, Any] = {"add_generation_prompt": True, "return_dict": True}
        return list(tokenizer.apply_chat_template(messages, chat_template=template, **options)["input_ids"])  # type: ignore

    expected = encode_prompt(tokenizer, messages[0]["content"], reasoning=reasoning)
    opening = "{{ " + repr(THINK_OPEN) + " if add_generation_prompt else '' }}"
    # Jinja drops one newline at the end of a template: it must not come to stand before what is added.
    silent = (
        "{% set enable_thinking = false %}" + template
    )  # Qwen3's: an empty reasoning stands in the prompt
    for candidate in (template, silent, re.sub(r"\r?\n\Z", "", template) + opening):
        if served(candidate) == expected:
            return candidate
    raise UserError(
        "no chat template gives the prompt that the model was trained with: see lib/tools/export.py:serving_template"
    )


def write_checkpoint(run: Path, out: Path, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """The run's weights, and around them what makes other programs read and stop as ours do. config.json comes last."""
    config = read_json(run / "config.json")
    eos = eos_token_ids(
        load_pretrained(GenerationConfig.from_pretrained, run, "generation config"), tokenizer
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(str(out))
    # What the base's authors advise (a repetition penalty, say) is not what the policy was trained and evaluated at.
    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_p": 1.0, "top_k": 0}
    tokens = {
        "eos_token_id": eos,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    GenerationConfig(**sampling, **tokens).save_pretrained(out)
    weights = sorted([*run.glob("*.safetensors"), *run.glob("*.safetensors.index.json")])
    for source in tqdm(weights, "copying weights", unit="file", delay=2):
        with atomic(out / source.name) as temporary:
            shutil.copyfile(source, temporary)
    config.pop("_name_or_path", None)  # where the weights were loaded from
    write_json(out / "config.json", config)


def push(out: Path, name: str, public: bool) -> None:
    """Upload the folder to the hub, into a new repository or a new commit of an old one. A public one must be meant."""
    try:
        api = HfApi()
        api.create_repo(name, private=not public, exist_ok=True)  # an old one stays as public as it is
        if not (public or api.repo_info(name).private):
            raise UserError(f"--push-to-hub: {name} is public: add --public")
        api.upload_folder(
            repo_id=name,
            folder_path=out,
            commit_message="Exported by lib.tools.export",
            ignore_patterns=[".*"],
        )
    except UserError:
        raise
    except Exception as error:  # of the hub's or the network's
        raise UserError(
            f"--push-to-hub {name}: {' '.join(str(error).split())[:160]}; {out} is whole"
        ) from error


def main(argv: Sequence[str] | None = None) -> None:
    flags = Flags("lib.tools.export", __doc__)
    flags.add_argument("run", help="a finished run of stage 2 or 3")
    flags.add_argument("--out", required=True, help="folder to write")
    flags.add_argument(
        "--licence", required=True, help="of the weights, by its id on the hub: apache-2.0, mit, other, ..."
    )
    flags.add_argument(
        "--base-model", default="", help="the base's name on the hub (default: as the run was given it)"
    )
    flags.add_argument(
        "--eval",
        nargs="+",
        default=[],
        help="results for the card: folders of stage 4 or lib.tools.capability",
    )
    flags.add_argument("--data", default="", help="folder of stage 1 (default: where the run had it)")
    flags.add_argument("--overwrite", action="store_true", help="empty OUT first if it holds another export")
    flags.add_argument(
        "--push-to-hub", default="", metavar="OWNER/NAME", help="upload it, private unless --public"
    )
    flags.add_argument(
        "--public", action="store_true", help="all may see it: a new repository, or an old one that is public"
    )
    given = flags.parse_args(argv)
    run, out = Path(given.run), Path(given.out)
    for flag, value in (("--push-to-hub", given.push_to_hub), ("--base-model", given.base_model)):
        if value and not HUB_NAME.fullmatch(value):
            raise UserError(f"{flag}: given {value}; allowed OWNER/NAME")
    if not re.fullmatch(r"[\w.-]+", given.licence):
        raise UserError(
            f"--licence: given {given.licence}; allowed a hub id such as apache-2.0, mit, cc-by-nc-4.0, other"
        )
    stages = list(follow(run))
    if not stages or not is_finished(run):
        raise UserError(f"{run}: not a finished run of stage 2 or 3")
    _, first = stages[-1]
    on_hub = HUB_NAME.fullmatch(first["model"]) and not stated_sums(first, first["model"])
    base = given.base_model or (first["model"] if on_hub else "")
    manifests, results = data_of(stages, given.data), [results_of(run, folder) for folder in given.eval]
    tokenizer, reasoning = load_tokenizer(run), bool(stages[0][1].get("reasoning", True))
    template = serving_template(tokenizer, reasoning)
    told = without_paths([settings for _, settings in reversed(stages)])
    weights = without_paths(checksums(run))
    read = [run, *(folder for folder, _ in stages), *given.eval, given.data]
    claim_folder(
        given.out, {"reasoning": reasoning, "stages": told, **weights}, overwrite=given.overwrite, inputs=read
    )
    write_checkpoint(run, out, tokenizer, template)
    card = model_card(
        name=given.push_to_hub or out.resolve().name,
        licence=given.licence.lower(),
        base=base,
        reasoning=reasoning,
        stages=told,
        manifests=without_paths(manifests),
        results=results,
    )
    write_text(out / "README.md", card)
    print(
        f"wrote {out}: {len(stages)} stages, {len(manifests)} data sets, {len(results)} evaluations in README.md; read it"
    )
    if not base:
        print("the base is no name on the hub: give --base-model OWNER/NAME if it has one")
    if given.push_to_hub:
        push(out, given.push_to_hub, given.public)
        print(f"pushed to {given.push_to_hub}")


if __name__ == "__main__":
    from lib.run.command import run_main

    run_main(main)
