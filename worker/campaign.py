"""A campaign directory: made from the template, or adopted from an existing repository as it is."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shared import constants, git, pyedit
from shared.errors import AlreadyThere, BadInput
from shared.prepare.constants import PROFILES
from shared.prepare.data import EMBEDDED
from shared.task import CONFIG_NAME, TaskSpec, load_task, parse_task

TEMPLATE = Path(__file__).parent.parent / "shared" / "train_template"
PREPARE = Path(__file__).parent.parent / "shared" / "prepare"

_METRIC = "val_bpb"


@dataclass(frozen=True)
class Campaign:
    """A repository, the task's directory in it, and the task."""

    root: Path  #: the repository's top
    prefix: str  #: the task's directory below it, '' at the top
    task: TaskSpec

    @classmethod
    def open(cls, folder: Path) -> Campaign:
        """Raises BadInput when the folder holds no valid task or is in no repository. Changes nothing."""
        task = load_task(folder)
        top = git.Repo(folder).top()
        if top is None:
            raise BadInput(f"{folder}: not in a git repository; `swarm init DIR --from {folder}` makes one of it")
        prefix = folder.resolve().relative_to(top.resolve()).as_posix()
        return cls(top, "" if prefix == "." else prefix, task)

    @property
    def folder(self) -> Path:
        return self.root / self.prefix


def _refuse_existing(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AlreadyThere(f"{folder}: exists and is not empty; name a new directory")


def check(folder: Path, profile: str, backend: str) -> None:
    """Whether a campaign can be made so. Raises AlreadyThere, or BadInput for an unknown profile or backend."""
    _refuse_existing(folder)
    if profile not in PROFILES:
        raise BadInput(f"--profile {profile}: one of {', '.join(PROFILES)}")
    if backend not in _backends():
        raise BadInput(f"--backend {backend}: there is no template for it; one of {', '.join(_backends())}")


def create(folder: Path, profile: str, backend: str, data: str) -> Campaign:
    """A campaign from the template. Raises as `check` does."""
    check(folder, profile, backend)
    source = TEMPLATE / backend / "train.py"
    settings = yaml.safe_load((TEMPLATE / "profiles.yaml").read_text())[profile]
    train = pyedit.set_constants(source.read_text(), settings["set"])
    config = _config(folder.resolve().name, profile, data, train, settings["search_space"])
    text = _to_yaml(config)
    task = parse_task(text, CONFIG_NAME)

    repo = git.init(folder)
    shutil.copytree(PREPARE, folder / "prepare", ignore=_ignore(data))
    (folder / "train.py").write_text(train)
    (folder / CONFIG_NAME).write_text(text)
    (folder / "program.md").write_text(_program(task))
    (folder / ".gitignore").write_text("__pycache__/\nrun.log\n")
    repo.run("add", "--all")
    repo.run("commit", "--quiet", "-m", f"campaign {task.name}: profile {profile}, backend {backend}, data {data}")
    return Campaign.open(folder)


def _ignore(data: str) -> Any:
    patterns = ["__pycache__"] if data == EMBEDDED else ["__pycache__", "*.parquet"]
    return shutil.ignore_patterns(*patterns)


def _backends() -> list[str]:
    return sorted(path.parent.name for path in TEMPLATE.glob("*/train.py"))


def _config(name: str, profile: str, data: str, train: str, space: dict[str, Any]) -> dict[str, Any]:
    searched = {key: value for key, value in space.items() if key in pyedit.constants(train)}
    config: dict[str, Any] = {
        "name": name,
        "metric": _METRIC,
        "metric_direction": "minimize",
        "mutable_files": ["train.py"],
        "immutable_files": ["prepare", "program.md"],
        "run_command": "python train.py > run.log 2>&1",
        "eval_command": f"grep '^{_METRIC}:' run.log",
        "budget_minutes": PROFILES[profile].time_budget_s / 60,
        "branch_prefix": "autoresearch",
        "rules": [],
        "profile": profile,
        "data": data,
        "search_space": searched,
    }
    if profile == "tiny":
        config["ratchet"] = {"baseline_runs": 2}
    return config


def _program(task: TaskSpec) -> str:
    return (
        (TEMPLATE / "program.md")
        .read_text()
        .format(
            name=task.name,
            branch_prefix=task.branch_prefix,
            immutable=", ".join(task.immutable_files) or "none",
            mutable=", ".join(task.mutable_files),
            budget=f"{task.budget_s:g} seconds",
            metric=task.metric,
            direction="lower is better" if task.sign > 0 else "higher is better",
        )
    )


def adopt(folder: Path, source: Path) -> Campaign:
    """A campaign from an existing repository (or plain directory), which is copied and never written to.

    Where it has no autoresearch-config.yaml, the common shape (train.py beside prepare.py) is recognised. Raises
    AlreadyThere or BadInput; then nothing is left behind.
    """
    _refuse_existing(folder)
    if not source.is_dir():
        raise BadInput(f"--from {source}: no such directory")
    if folder.resolve().is_relative_to(source.resolve()):
        raise BadInput(f"{folder}: lies inside --from {source}; name a directory elsewhere")
    recognised = None if (source / CONFIG_NAME).exists() else _recognise(source)
    top = git.Repo(source).top()
    if top is not None and recognised is None:
        _refuse_uncommitted(git.Repo(top), source, load_task(source))
    prefix = source.resolve().relative_to(top.resolve()) if top else Path()
    made_before = folder.exists()
    try:
        if top is not None:
            repo = git.clone(top, folder)
            repo.run("remote", "remove", "origin")
        else:
            repo = git.init(folder)
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", ".git"))
            repo.run("add", "--all")
            repo.run("commit", "--quiet", "-m", f"campaign: {source.resolve().name} as it was")
        inside = folder / prefix
        if recognised is not None:
            (inside / CONFIG_NAME).write_text(recognised)
        load_task(inside)
        config = (prefix / CONFIG_NAME).as_posix()
        if config in repo.changed_paths():
            repo.commit([config], "campaign: the task, as recognised")
        return Campaign.open(inside)
    except BaseException:
        if not made_before:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _refuse_uncommitted(repo: git.Repo, source: Path, task: TaskSpec) -> None:
    names = [(source / name).resolve() for name in (CONFIG_NAME, *task.mutable_files, *task.immutable_files)]
    for path in repo.changed_paths():
        changed = (repo.path / path).resolve()
        if any(changed == name or changed.is_relative_to(name) for name in names):
            raise BadInput(f"--from {source}: {path} is not committed; what is copied is the last commit, so commit it")


def _recognise(folder: Path) -> str:
    """The common shape: train.py prints val_bpb, prepare.py is fixed and holds TIME_BUDGET."""
    if not (folder / "train.py").exists() or not (folder / "prepare.py").exists():
        raise BadInput(
            f"--from {folder}: no {CONFIG_NAME}, and not the common shape (train.py and prepare.py); write the config"
        )
    budget: Any = 300
    fixed = [name for name in ("prepare.py", "constants.py", "program.md") if (folder / name).exists()]
    for name in fixed:
        found = _constants_of(folder / name)
        budget = found["TIME_BUDGET"].value if "TIME_BUDGET" in found else budget
    if isinstance(budget, (str, bool)) or budget <= 0:
        raise BadInput(f"--from {folder}: TIME_BUDGET is {budget!r}, expected seconds; write an {CONFIG_NAME}")
    with_uv = (folder / "uv.lock").exists() and shutil.which("uv")
    return _to_yaml(
        {
            "name": folder.resolve().name,
            "metric": _METRIC,
            "metric_direction": "minimize",
            "mutable_files": ["train.py"],
            "immutable_files": fixed,
            "run_command": f"{'uv run' if with_uv else 'python'} train.py > run.log 2>&1",
            "eval_command": f"grep '^{_METRIC}:' run.log",
            "budget_minutes": float(budget) / 60,
            "branch_prefix": "autoresearch",
            "rules": ["Only modify files listed in mutable_files", "Do not install new dependencies"],
        }
    )


def _constants_of(path: Path) -> dict[str, pyedit.Constant]:
    try:
        return constants.find(path.name, path.read_text()) if path.suffix == ".py" else {}
    except pyedit.EditError as error:
        raise BadInput(f"--from {path}: {error}") from None


def _to_yaml(config: dict[str, Any]) -> str:
    space = config.pop("search_space", None)
    text = str(yaml.safe_dump(config, sort_keys=False, width=sys.maxsize, allow_unicode=True))
    if space:  # one line a constant
        lines = (
            yaml.safe_dump(v, default_flow_style=True, sort_keys=False, width=sys.maxsize).strip()
            for v in space.values()
        )
        text += "search_space:\n" + "".join(f"  {k}: {line}\n" for k, line in zip(space, lines, strict=True))
    return text
