"""Who copies a command out of the documentation gets what it says: its options exist, its values are allowed."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.docs import parsers
from tests.docs.pages import Block, Command, blocks, commands, languages, pages, prose_of, text_of, typed

LANGUAGES = {"bash", "console", "text", "python", "yaml", "json"}
FOREIGN = {
    "--config_file": "accelerate launch",
    "--cpu": "accelerate launch",
    "--num_processes": "accelerate launch",
    "--tpu": "accelerate launch",
    "--tpu_cluster": "accelerate launch",
    "--nproc_per_node": "torchrun",
    "--nnodes": "torchrun",
    "--strict": "mkdocs",
    "--no-deps": "pip",
    "--wheel-dir": "pip",
    "--security-opt": "docker",
    "--logdir": "tensorboard",
    "--worker": "gcloud",
    "--directory": "http.server",
    "--tasks": "lm_eval",
    "--num_fewshot": "lm_eval",
}
"""Options that belong to programs of others, wherever the documentation names them by themselves."""


def test_every_block_says_what_it_is() -> None:
    assert languages() <= LANGUAGES, "a block without a language, or with one that no test reads"


@pytest.mark.parametrize("block", blocks("bash", "console"), ids=lambda block: block.name)
def test_bash_understands_every_shell_block(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=typed(block), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.name)
def test_the_program_itself_understands_every_command(command: Command) -> None:
    assert parsers.faults_of(command.words) == []


def test_the_commands_are_really_read() -> None:
    ours = [command for command in commands() if "numina" in command.words[0]]
    assert len(ours) >= 30
    broken = ["--lerning-rate", "1"], ["--optim", "sgdd"], ["data", "preview", "--format", "gsm9k"], ["evaluat"]
    for words in broken:
        assert parsers.faults_of(["numina-finetune", *words]), words
    assert parsers.faults_of(["numina-finetun"]) and parsers.faults_of(["python", "scripts/lr_swep.py"])
    assert parsers.faults_of(["torchrun", "--nproc_per_nod", "2", "-m", "numina_finetune"])


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_that_is_named_exists(page: Path) -> None:
    """Also where no whole command stands: in sentences, tables, and output."""
    foreign = {word for command in commands() if "numina" not in command.words[0] for word in command.words}
    known = parsers.options() | FOREIGN.keys() | {word.partition("=")[0] for word in foreign}
    named = set(re.findall(r"(?<![\w-])--[a-z](?:[\w-]*\w)?", text_of(page)))
    unknown = {option for option in named if option not in known and option.replace("_", "-") not in known}
    assert unknown <= _options_of_scripts(), unknown


def _options_of_scripts() -> set[str]:
    scripts = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("scripts/*.py")]
    return {option for path in scripts for option in re.findall(r'"(--[\w-]+)"', path.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_of_the_checkout_that_is_named_is_there(page: Path) -> None:
    named = set(
        re.findall(r"(?<![\w/{.-])((?:\.ci|benchmarks|configs|docker|scripts|tests)/[\w./-]*\w)", text_of(page))
    )
    rooms = set(re.findall(r"`((?:numina_finetune/)?(?:\w+/)+\w+\.py)`", text_of(page))) - named
    assert {name for name in named if not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists()} == set()
    assert {
        name for name in rooms if not any((base / name).is_file() for base in (ROOT, ROOT / "numina_finetune"))
    } == (set())


@pytest.mark.parametrize("block", blocks("yaml", "json"), ids=lambda block: block.name)
def test_yaml_and_json_can_be_read(block: Block) -> None:
    if block.language == "json":
        for line in block.text.splitlines():
            json.loads(line)
        return
    content = yaml.safe_load(block.text)
    if isinstance(content, dict) and "datasets" in content:
        parsers.RunConfig.from_mapping(content)


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.name)
def test_what_python_blocks_import_is_there_and_their_assertions_hold(block: Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("numina_finetune"):
            module = importlib.import_module(node.module or "")
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []
    if any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
        exec(compile(tree, block.name, "exec"), {})


def test_the_messages_that_troubleshooting_quotes_are_those_of_the_code() -> None:
    """`…` stands for what a message fills in; what lies between is compared."""
    said = list(_strings_of_the_code())
    page = ROOT / "docs" / "troubleshooting.md"
    quoted = [line for block in blocks("text") if block.page == page for line in block.text.splitlines()]
    ours = prose_of(page).partition("## Quota")[0]  # what stands there is Google's
    quoted += [span for span in re.findall(r"`([^`\n]*…[^`\n]*)`", ours) if not re.match(r"--|numina|exec|.*/", span)]
    assert len(quoted) >= 30
    parts = [part for line in quoted for part in line.split("…") if len(part.strip(" ,()'")) > 3]
    assert [part for part in parts if not any(part.strip() in text for text in said)] == []


def _strings_of_the_code() -> Iterator[str]:
    """The parts of all texts in the package between what is filled in."""
    for path in (ROOT / "numina_finetune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from re.split(r"%[.\d]*[sdfr]", node.value)
