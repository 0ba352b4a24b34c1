"""The house: what lies in lib, who may import whom, and that README and docs speak of what there is."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted(path.name for path in ROOT.glob("0?_*.py"))
FLAT = ["__init__", "batches", "cache", "chat", "metrics", "policy", "rewards", "sampler"]
ROOMS = ["attacks", "compare", "judges", "report", "run", "sandbox", "sources", "tools"]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("tests/bench/*.md"))]

# ---- imports -----------------------------------------------------------------------------------------------


@cache
def modules() -> dict[str, Path]:
    """By name: the chapters, and all of lib."""
    found = {name.removesuffix(".py"): ROOT / name for name in CHAPTERS}
    for path in ROOT.glob("lib/**/*.py"):
        found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


@cache
def imports(module: str) -> set[str]:
    """Modules of lib that it imports, wherever in its text."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules())
            found |= inner or {node.module}  # of `from lib.attacks import gcg`, the inner one
    return {name for name in found if name in modules()} - {module}


def place(module: str) -> str:
    """chapter, flat, or the name of its room."""
    parts = module.split(".")
    if parts[0] != "lib":
        return "chapter"
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "flat"


def may_import(importer: str, imported: str) -> bool:
    here, there = place(importer), place(imported)
    if here == there:
        return here != "chapter"
    if there == "flat" or (there == "run" and here != "flat"):
        return True
    if here not in ("chapter", "compare", "tools") or there in ("chapter", "compare", "sandbox", "tools"):
        return False
    return imported == f"lib.{there}"  # another room, by its door


def test_lib_is_eight_files_and_eight_rooms():
    assert sorted(path.stem for path in ROOT.glob("lib/*.py")) == FLAT
    assert sorted(path.parent.name for path in ROOT.glob("lib/*/__init__.py")) == ROOMS


def test_arrows_go_where_they_may():
    assert not [f"{a} -> {b}" for a in modules() for b in sorted(imports(a)) if not may_import(a, b)]


def test_no_import_leads_back():
    TopologicalSorter({module: imports(module) for module in modules()}).prepare()  # else it names the cycle


def test_reading_a_command_line_imports_no_torch():
    code = "import importlib, sys; from lib.run.settings import parse_settings;"
    code += "parse_settings(importlib.import_module('01_build_mixture').Settings, 'mixture', argv=[]);"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- what README and docs say ------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_names_of_functions_lead_somewhere(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]
    for path, name in re.findall(r"`((?:lib|tests|docs)/[\w./]+|\d\d_\w+\.py)(?::(\w+))?`", text):
        assert (ROOT / path).exists(), path
        nodes = ast.walk(ast.parse((ROOT / path).read_text())) if name else []
        assert not name or name in {getattr(node, "name", None) for node in nodes}, f"{path}:{name}"


def commands() -> list[tuple[str, str]]:
    """(page, command) of each that runs something of ours: in pages, and in what a module says of itself."""
    texts = [(page.name, page.read_text()) for page in PAGES]
    for name, path in modules().items():
        said = ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""
        texts.append((name, said.replace("`", "")))
    found = []
    for name, text in texts:
        text = text.replace("\\\n", " ")
        for line in re.findall(r"^ {4,}(\S.*)$", text, re.M) + re.findall(r"`([^`\n]+)`", text):
            parts = (re.split(r"\s+#\s", part)[0] for part in re.split(r" && |; ", line))
            found += [(name, part) for part in parts if re.match(r"(\S*/?python|torchrun|make) [\w.-]", part)]
    return [(name, command) for name, command in found if "..." not in command.split()]


class Understood(Exception):
    """The command line has been read."""


def stopping(read_all):
    def reading(*given):
        read_all(*given)
        raise Understood

    return reading


def read(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program read its command line, and stop there."""
    if words[0] == "torchrun":
        words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) - 1 :]
    name, rest = (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])
    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(ArgumentParser, method, stopping(getattr(ArgumentParser, method)))
    monkeypatch.setattr(sys, "argv", [words[1], *rest])
    with pytest.raises(Understood):
        importlib.import_module(name).main()


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_are_understood_by_the_program_itself(page, command, monkeypatch):
    words = shlex.split(command)
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif "pytest" in words:
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    elif words[1] != "-":  # a script on stdin
        read(words, monkeypatch)
