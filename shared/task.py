"""TaskSpec: a campaign's `autoresearch-config.yaml`, checked (reference, "Adapting to Other Domains", "Template").

The reference's ten keys load as they are; the optional keys are ours. Anything else is an error that names the key:
a misspelt key that is silently ignored costs a night.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import BadInput
from .prepare.constants import PROFILES

CONFIG_NAME = "autoresearch-config.yaml"

Scalar = bool | int | float | str


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(_Strict):
    """Where `search` may look for one constant: low to high, or a list of choices."""

    low: float | None = None
    high: float | None = None
    log: bool = False  #: even steps in the logarithm
    choices: tuple[Scalar, ...] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Range:
        bounded = self.low is not None and self.high is not None
        if bounded == (self.choices is not None) or self.choices == ():
            raise ValueError("give low and high, or choices")
        if bounded and (self.low >= self.high or (self.log and self.low <= 0)):  # type: ignore[operator]
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
    memory_limit_gb: Annotated[float, Field(gt=0)] | None = None
    sampler: Literal["tpe", "cmaes"] = "tpe"  #: how `search` draws values
    profile: str | None = None  #: set where the score is measured by our prepare package
    data: str = "sotu"  #: data set of that profile
    train_shards: Annotated[int, Field(ge=1)] | None = None  #: training shards to pack; the profile's number by default

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
        text = path.read_text()
    except FileNotFoundError:
        raise BadInput(f"{path}: missing; make one with `swarm init DIR` or `swarm init DIR --from PATH`") from None
    task = parse_task(text, str(path))
    for key in ("mutable_files", "immutable_files"):
        for name in getattr(task, key):
            file = folder / name
            if not file.exists():
                raise BadInput(f"{path}: {key}: {name!r} does not exist in {folder}")
            if not file.resolve().is_relative_to(folder.resolve()):
                raise BadInput(f"{path}: {key}: {name!r} lies outside {folder}")
    if both := set(task.mutable_files) & set(task.immutable_files):
        raise BadInput(f"{path}: immutable_files: {min(both)!r} is also in mutable_files")
    return task


def parse_task(text: str, where: str) -> TaskSpec:
    """Raises BadInput; `where` names the source in the message."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise BadInput(f"{where}: expected a mapping of keys to values, found {type(raw).__name__}")
    try:
        return TaskSpec.model_validate(raw)
    except ValidationError as error:
        raise BadInput(f"{where}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        return f"{key}: unknown key" + (f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}")
    if problem["type"] == "missing":
        return f"{key}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, found {problem['input']!r}" if key else message


def _known_keys(location: list[str]) -> list[str]:
    inner: dict[str, type[BaseModel]] = {"search_space": Range, "ratchet": RatchetSettings, "rungs": Rung}
    return sorted((inner[location[0]] if location else TaskSpec).model_fields)
