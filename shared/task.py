"""TaskSpec: a campaign's `autoresearch-config.yaml`, checked (reference, "Adapting to Other Domains", "Template").

The reference's ten keys load as they are; the optional keys are ours. Anything else is an error that names the key:
a misspelt key that is silently ignored costs a night.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import BadInput
from .prepare.constants import PROFILES

CONFIG_NAME = "autoresearch-config.yaml"

Scalar = bool | int | float | str

_SCIENTIFIC = re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+")


def _number(value: Scalar) -> Scalar:
    """`1e-3` is a word to YAML 1.1; it was meant as a number."""
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Range(_Strict):
    """Where `search` may look for one constant: low to high, or a list of choices."""

    low: float | None = None
    high: float | None = None
    log: bool = False  #: even steps in the logarithm
    choices: tuple[Scalar, ...] | None = None

    @field_validator("choices")
    @classmethod
    def _numbers(cls, choices: tuple[Scalar, ...] | None) -> tuple[Scalar, ...] | None:
        return None if choices is None else tuple(_number(choice) for choice in choices)

    @model_validator(mode="after")
    def _one_kind(self) -> Range:
        bounds = (self.low is not None) + (self.high is not None)
        if bounds != (2 if self.choices is None else 0) or self.choices == ():
            raise ValueError("give low and high, or choices")
        if bounds and (self.low >= self.high or (self.log and self.low <= 0)):  # type: ignore[operator]
            raise ValueError("low must be below high, and above 0 with log")
        return self


class RatchetSettings(_Strict):
    """How keeps are decided; docs/ratchet.md explains the numbers."""

    policy: Literal["rerun-best", "strict"] = "rerun-best"
    baseline_runs: Annotated[int, Field(ge=1)] = 1  #: runs of the unmodified code before the first idea
    rerun_after: Annotated[int, Field(ge=1)] = 8  #: experiments without a keep, after which HEAD is run once more
    sigma_per_node: Annotated[float, Field(ge=0)] = 0.01  #: gain asked for each ast node added, in sigmas
    sigma_per_gb: Annotated[float, Field(ge=0)] = 0.2  #: gain asked for each GiB of memory added, in sigmas
    equal_within: Annotated[float, Field(ge=0)] = 0.25  #: scores this close, in sigmas, are equal


class Rung(_Strict):
    """A level of model size: constant overrides, a budget, and what hardware can take it."""

    name: str
    set: dict[str, Scalar]
    budget_minutes: Annotated[float, Field(gt=0)] | None = None
    needs: dict[str, float] = {}

    @field_validator("set")
    @classmethod
    def _numbers(cls, values: dict[str, Scalar]) -> dict[str, Scalar]:
        return {name: _number(value) for name, value in values.items()}


class SanityBounds(_Strict):
    """Beyond these a result is set aside as suspect until someone has looked (`swarm serve`)."""

    best_possible: float | None = None  #: a score better than this
    largest_step: Annotated[float, Field(gt=0)] | None = None  #: one experiment better than HEAD by more than this


class TaskSpec(_Strict):
    """One study's task."""

    name: Annotated[str, Field(min_length=1)]
    metric: Annotated[str, Field(min_length=1)]
    metric_direction: Literal["minimize", "maximize"]
    mutable_files: Annotated[tuple[str, ...], Field(min_length=1)]
    immutable_files: tuple[str, ...] = ()
    run_command: Annotated[str, Field(min_length=1)]
    eval_command: str | None = None
    budget_minutes: Annotated[float, Field(gt=0)]
    branch_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "autoresearch"
    rules: tuple[str, ...] = ()

    search_space: dict[str, Range] = {}
    ratchet: RatchetSettings = RatchetSettings()
    rungs: tuple[Rung, ...] = ()
    sanity: SanityBounds | None = None  #: by default the profile's
    memory_limit_gb: Annotated[float, Field(gt=0)] | None = None
    sampler: Literal["tpe", "cmaes"] = "tpe"  #: how `search` draws values
    profile: str | None = None  #: set where the score is measured by our prepare package
    data: str = "sotu"  #: data set of that profile
    train_shards: Annotated[int, Field(ge=1)] | None = None  #: training shards to pack; the profile's number by default

    @field_validator("mutable_files", "immutable_files")
    @classmethod
    def _plain_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """`./train.py` is train.py: names are compared as text later on."""
        return tuple(str(PurePosixPath(name)) if name else name for name in names)

    @model_validator(mode="after")
    def _known_profile(self) -> TaskSpec:
        if self.profile is not None and self.profile not in PROFILES:
            raise ValueError(f"profile is {self.profile!r}: one of {', '.join(PROFILES)}")
        return self

    @property
    def budget_s(self) -> float:
        return self.budget_minutes * 60

    @property
    def sign(self) -> int:
        """+1 where lower is better, -1 where higher is."""
        return 1 if self.metric_direction == "minimize" else -1


def load_task(folder: Path) -> TaskSpec:
    """Reads the folder's config. Raises BadInput, one line that names the file, the key and the remedy."""
    path = folder / CONFIG_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: missing; make one with `swarm init DIR` or `swarm init DIR --from PATH`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read: {_one_line(error)}") from None
    task = parse_task(text, str(path))
    for key in ("mutable_files", "immutable_files"):
        for name in getattr(task, key):
            _check_file(folder, key, name, str(path))
    mutable = [(folder / name).resolve() for name in task.mutable_files]
    for name in task.immutable_files:
        if both := [file for file in mutable if file.is_relative_to((folder / name).resolve())]:
            raise BadInput(f"{path}: immutable_files: {name!r} holds {both[0].name!r}, which is in mutable_files")
    return task


def _check_file(folder: Path, key: str, name: str, where: str) -> None:
    file = folder / name
    if not name or not file.exists():
        raise BadInput(f"{where}: {key}: {name!r} does not exist in {folder}")
    if not file.resolve().is_relative_to(folder.resolve()):
        raise BadInput(f"{where}: {key}: {name!r} lies outside {folder}")
    if key == "mutable_files" and (file.is_symlink() or not file.is_file()):
        raise BadInput(f"{where}: {key}: {name!r} is no plain file")


def parse_task(text: str, where: str) -> TaskSpec:
    """Raises BadInput; `where` names the source in the message."""
    try:
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not YAML: {_one_line(error)}") from None
    if not isinstance(raw, dict):
        raise BadInput(f"{where}: expected a mapping of keys to values, found {type(raw).__name__}")
    try:
        return TaskSpec.model_validate(raw)
    except ValidationError as error:
        raise BadInput(f"{where}: {_one_line(_first_problem(error))}") from None


def _one_line(words: object) -> str:
    return " ".join(str(words).split()) or type(words).__name__


def _first_problem(error: ValidationError) -> str:
    """A misspelt key first: that another one is missing follows from it."""
    problems = error.errors()
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
        return f"{'.'.join(location)}: unknown key{hint}"
    if location[-1:] in (["bool"], ["int"], ["float"], ["str"]):  # the branches of a union are no keys of the file
        location.pop()
    key = ".".join(location)
    if problem["type"] == "missing":
        return f"{key}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, found {problem['input']!r}" if key else message


def _known_keys(location: list[str]) -> list[str]:
    inner: dict[str, type[BaseModel]] = {
        "search_space": Range,
        "ratchet": RatchetSettings,
        "rungs": Rung,
        "sanity": SanityBounds,
    }
    return sorted((inner[location[0]] if location else TaskSpec).model_fields)
