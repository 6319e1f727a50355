"""Every flag of every ``--help`` does something: it reaches its field, its field is read, and a test gives it.

What is seen here is the source and the parser; what the options then do is the other tests' business.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import typer

from numina_finetune.cli import app, run_command
from numina_finetune.cli.groups import CONTEXT
from numina_finetune.cli.options import SOURCE_OPTIONS, resolve_config
from numina_finetune.config import RunConfig, SourceConfig
from numina_finetune.data.prepare import IndexOptions
from numina_finetune.evaluation.options import EvaluateOptions, GenerateOptions
from numina_finetune.option_fields import field_name, flag
from numina_finetune.spot.options import SpotOptions
from tests.conftest import ROOT

PACKAGE = ROOT / "numina_finetune"
OPTION_CLASSES = {"evaluate": EvaluateOptions, "generate": GenerateOptions, "spot run": SpotOptions}
SHORTHANDS = {"config", "bf16", "gradient_checkpointing"}
"""Of train: options that are no fields; ``tests/test_cli.py`` gives each."""


def commands() -> dict[str, Any]:
    """Every command by its words, as the parser has it."""

    def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, (*words, name))
        if not hasattr(command, "commands"):
            yield " ".join(words), command

    return dict(walk(typer.main.get_command(app), ()))


COMMANDS = commands()


def spellings(command: str) -> list[str]:
    """All long options of a command."""
    parameters = [one for one in COMMANDS[command].params if one.param_type_name == "option"]
    return [name for one in parameters for name in (*one.opts, *one.secondary_opts) if name.startswith("--")]


# --- each option reaches its field ------------------------------------------------------------------------------------


def sample(f: Any) -> tuple[list[str], Any]:
    """Words that give a field a value that it has not by default, and the value."""
    kind, spelling = str(f.type).removesuffix(" | None"), flag(f.name)
    default = None if f.default is MISSING else f.default
    if kind == "bool":
        return [f"--no-{spelling[2:]}" if default else spelling], not default
    if kind.startswith("tuple"):
        return [spelling, "a", spelling, "b"], ("a", "b")
    value = (
        {"int": int(default or 0) + 3, "float": float(default or 0) + 0.5}[kind] if kind in ("int", "float") else "x"
    )
    return [spelling, str(value)], value


def parsed(command: str, *words: str) -> dict[str, Any]:
    given: dict[str, Any] = COMMANDS[command].make_context(command, list(words), **CONTEXT).params
    return given


def of_run(command: str, *words: str) -> RunConfig:
    known = {*(f.name for f in fields(RunConfig)), *SOURCE_OPTIONS, *SHORTHANDS}
    given = {name: value for name, value in parsed(command, *words).items() if name in known}
    return resolve_config(given.pop("config"), given, [])


@pytest.mark.parametrize("command", ["train", "plan", "doctor", "data prepare", "data preview"])
def test_every_option_of_a_run_reaches_its_field(command: str) -> None:
    names = {one.name for one in COMMANDS[command].params}
    chosen = [f for f in fields(RunConfig) if f.name in names]
    assert len(chosen) > 20 and (command != "train" or len(chosen) == len(fields(RunConfig)) - 1)
    for f in chosen:
        words, value = sample(f)
        config = of_run(command, *words)
        assert getattr(config, f.name) == value != getattr(RunConfig(), f.name), words
        for other in [one for one in spellings(command) if field_name(RunConfig, one[2:]) == f.name]:
            if not isinstance(value, bool):
                assert getattr(of_run(command, other, *words[1:]), f.name) == value


def test_every_option_of_a_dataset_reaches_its_field() -> None:
    for name, (column, kind, _) in SOURCE_OPTIONS.items():
        value = {str: "x", int: 3, float: 0.5}[kind]
        (source,) = of_run("train", "--dataset-name", "d", *([flag(name), str(value)])).datasets[-1:]
        assert getattr(source, column) == value != getattr(SourceConfig("d"), column)


@pytest.mark.parametrize("command", OPTION_CLASSES)
def test_every_option_of_the_other_large_commands_reaches_its_field(command: str) -> None:
    options: Any = OPTION_CLASSES[command]
    names = {one.name for one in COMMANDS[command].params if one.param_type_name == "option"}
    assert names == {f.name for f in fields(options)}
    for f in fields(options):
        words, value = sample(f)
        given = {name: each for name, each in parsed(command, *words).items() if name in names and each is not None}
        assert getattr(options.from_mapping(given), f.name) == value != f.default, words


# --- each field is read -----------------------------------------------------------------------------------------------


def reads(path: Path) -> Iterator[tuple[str, str]]:
    """``(owner, attribute)`` of each attribute that a module reads: ``config``, ``seed`` of ``self._config.seed``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            yield name.lstrip("_"), node.attr


def derived(cls: type, path: Path) -> dict[str, set[str]]:
    """What the properties and methods of a class of options read of itself, by their names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__]
    return {
        node.name: {
            each.attr
            for each in ast.walk(node)
            if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == "self"
        }
        for node in body
        if isinstance(node, ast.FunctionDef)
    }


def unread(cls: type, home: Path, owners: set[str], apart: tuple[str, ...]) -> list[str]:
    """Fields of a class of options that nothing reads but what parses, checks and records them.

    Args:
        home: the module of the class; its properties count where they are read elsewhere.
        owners: what variables that hold such options are called.
        apart: folders and files of the package that do not count.
    """
    left_out = [PACKAGE / one for one in apart]
    modules = [
        path for path in PACKAGE.rglob("*.py") if not any(path == one or path.is_relative_to(one) for one in left_out)
    ]
    read = {attribute for path in modules for owner, attribute in reads(path) if owner in owners}
    through, grown = derived(cls, home), True
    while grown:
        more = {name for method, names in through.items() if method in read for name in names}
        grown = not more <= read
        read |= more
    return [f.name for f in fields(cls) if f.name not in read]


PARSING = ("config.py", "checks.py", "cli/options.py")
READ = [
    (RunConfig, "config.py", {"config", "run_config", "trained"}, (*PARSING, "doctor", "plan")),
    (IndexOptions, "data/prepare.py", {"options"}, PARSING),
    (SourceConfig, "config.py", {"source", "first"}, PARSING),
    (EvaluateOptions, "evaluation/options.py", {"options"}, ("generate_command.py", "spot")),
    (GenerateOptions, "evaluation/options.py", {"options"}, ("evaluate_command.py", "spot")),
    (SpotOptions, "spot/options.py", {"options"}, ("evaluation",)),
]
COPIED = {RunConfig: {f.name for f in fields(IndexOptions)}}
"""Fields that go by name into another class of this table."""


@pytest.mark.parametrize(("cls", "home", "owners", "apart"), READ, ids=lambda value: getattr(value, "__name__", None))
def test_every_field_is_read(cls: type, home: str, owners: set[str], apart: tuple[str, ...]) -> None:
    assert set(unread(cls, PACKAGE / home, owners, apart)) <= COPIED.get(cls, set())


def test_a_field_that_nothing_reads_is_found(tmp_path: Path) -> None:
    @dataclass
    class Options:
        seed: int = 0
        ignored: int = field(default=0)
        scale: int = 0
        unused_scale: int = 0

    home = tmp_path / "options.py"
    home.write_text(
        "class Options:\n    def lora_scale(self):\n        return self.scale\n"
        "    def never(self):\n        return self.unused_scale\n",
        encoding="utf-8",
    )
    assert unread(Options, home, {"config"}, ()) == ["ignored", "unused_scale"]


# --- the small commands -----------------------------------------------------------------------------------------------


def test_every_command_uses_what_it_takes() -> None:
    """Each parameter of each function, from the command line on down, is read in the function's body."""
    ignored = []
    for path in sorted((PACKAGE / "cli").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or node.name == "_options":
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments += [one for one in (node.args.vararg, node.args.kwarg) if one]
            used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
            ignored += [f"{path.name}: {node.name}({one.arg})" for one in arguments if one.arg not in used | {"self"}]
    assert ignored == []


SMALL = sorted(set(COMMANDS) - {"train", "plan", "doctor", *OPTION_CLASSES, *(one for one in COMMANDS if " " in one)})
SMALL += [one for one in COMMANDS if one.startswith(("checkpoints ", "spot ")) and one not in OPTION_CLASSES]


def test_every_flag_of_the_small_commands_is_given_by_a_test() -> None:
    files = [path for path in sorted((ROOT / "tests").rglob("*.py")) if path.name != Path(__file__).name]
    told = "\n".join(path.read_text(encoding="utf-8") for path in files)
    every = {f"{command} {one}" for command in SMALL for one in spellings(command)}
    assert len(every) > 15
    missing = {one for one in every if not re.search(rf"{one.split()[-1]}(?![\w-])", told)}
    assert missing == set(GIVEN_HERE)


GIVEN_HERE = {
    "sweep --diverge-factor": ("numina_finetune.sweep.command.run_sweep", "3.5", "factor=3.5"),
    "sweep --diverge-steps": ("numina_finetune.sweep.command.run_sweep", "7", "steps=7"),
    "stage --model-revision": ("numina_finetune.models.stage.run_stage", "v1", "('m', 'v1', 'places')"),
    "spot logs --follow": ("numina_finetune.spot.commands.logs", "", "'follow': True"),
}
"""By flag: what it goes to, a value, and how that shows there."""


@pytest.mark.parametrize("flag_of", GIVEN_HERE)
def test_these_reach_what_does_the_work(flag_of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, value, shown = GIVEN_HERE[flag_of]
    *words, spelling = flag_of.split()
    seen: list[str] = []

    def work(*arguments: Any, **named: Any) -> int:
        seen.append(f"{arguments} {named}")
        return 0

    monkeypatch.setattr(target, work)
    needed = {
        "sweep": ["--lrs", "1e-3"],
        "spot": ["run-folder"],
        "stage": ["--model-name", "m", "--output-dir", "places"],
    }[words[0]]
    assert run_command([*words, *needed, spelling, *([value] if value else [])]) == 0
    assert shown in seen[0]
