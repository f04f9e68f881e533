"""Docs name every command, option, setting, environment variable, profile and status there is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import pytest
import typer

from coordinator.cli import app
from shared.prepare.constants import PROFILES
from shared.task import Range, RatchetSettings, Rung, SanityBounds, TaskSpec
from shared.wire import Kind, LeaseState, MachineState, Role, Status
from tests.conftest import ROOT

CLI = (ROOT / "docs" / "cli.md").read_text()
SETTINGS = (ROOT / "docs" / "settings.md").read_text()
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()
SOURCES = [p for folder in ("shared", "worker", "coordinator") for p in (ROOT / folder).rglob("*.py")]


def commands() -> Iterator[tuple[str, Any]]:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from ((f"{name} {inner}", sub) for inner, sub in command.commands.items())
        else:
            yield name, command


@pytest.mark.parametrize(("name", "command"), list(commands()))
def test_each_command_and_its_options_are_in_the_table(name: str, command: Any) -> None:
    [row] = [line for line in CLI.splitlines() if re.match(rf"\| `swarm {name}[ `]", line)]
    everywhere = {"--dir", "--json", "--help"}
    for parameter in command.params:
        longest = max(parameter.opts, key=len)
        if longest.startswith("--") and longest not in everywhere:
            assert longest in row, longest
    assert command.help


@pytest.mark.parametrize("model", [TaskSpec, RatchetSettings, Range, Rung, SanityBounds])
def test_each_key_of_the_task_is_explained(model: type[TaskSpec]) -> None:
    for key in model.model_fields:
        assert re.search(rf"`[^`]*\b{key}\b[^`]*`", SETTINGS), key


def test_each_environment_variable_is_explained() -> None:
    used = {v for p in SOURCES for v in re.findall(r"\b(?:SWARM|AUTORESEARCH)_[A-Z_]+\b", p.read_text())}
    assert "SWARM_SEED" in used
    for variable in used:
        assert f"`{variable}`" in SETTINGS, variable


def test_each_status_is_explained_where_it_is_declared_and_in_the_glossary() -> None:
    declared = (ROOT / "shared" / "wire.py").read_text()
    for status in Status:
        assert re.search(rf'= "{status}"  #: .{{10,}}', declared), status
        assert f"| `{status}` |" in GLOSSARY, status


@pytest.mark.parametrize("words", [Role, Kind, MachineState, LeaseState])
def test_each_word_of_the_wire_is_explained_and_in_the_glossary(words: type[StrEnum]) -> None:
    declared = (ROOT / "shared" / "wire.py").read_text()
    for word in words:
        assert re.search(rf'= "{word}"  #: .{{10,}}', declared), word
        assert f"`{word}`" in GLOSSARY, word


def test_each_profile_is_in_the_table_with_its_numbers() -> None:
    for name, profile in PROFILES.items():
        assert f"`{name}`" in SETTINGS
        for number in (profile.max_seq_len, profile.eval_tokens, profile.vocab_size):
            assert f"{number:,}" in SETTINGS, (name, number)
        assert f"{profile.time_budget_s:g} s" in SETTINGS


def test_links_between_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_every_benchmark_is_in_the_figures() -> None:
    figures = (ROOT / "docs" / "benchmarks.md").read_text()
    for script in (ROOT / "benchmarks").glob("*.py"):
        assert f"benchmarks/{script.name}" in figures, script.name
