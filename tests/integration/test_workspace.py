"""The workspace on real git: what is committed, what is restored, what stays reachable."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.git import GitError
from shared.task import load_task
from tests import fast_task
from worker.workspace import Workspace, code_state, nodes_added


def make(tmp_path: Path, prefix: str = "") -> tuple[Path, Workspace, str]:
    folder = tmp_path / "repo"
    inside = fast_task.make(folder, prefix=prefix)
    if prefix:
        (folder / "other").mkdir()
        (folder / "other" / "file.py").write_text("untouched = True\n")
        fast_task.git(folder, "add", "--all")
        fast_task.git(folder, "commit", "--quiet", "-m", "the rest of the monorepo")
    base = fast_task.git(folder, "rev-parse", "HEAD")
    root = folder / ".swarm" / "t" / "work"
    workspace = Workspace(root, load_task(inside), prefix, "m1")
    workspace.open(folder, "autoresearch/t-m1", base)
    return folder, workspace, base


def edited(text: str) -> dict[str, str]:
    return {"train.py": fast_task.TRAIN.replace("LR = 0.5", text)}


def test_the_users_checkout_is_never_touched(tmp_path: Path) -> None:
    folder, workspace, base = make(tmp_path)
    before = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    workspace.commit(edited("LR = 0.4"), "try", "id-1", base)
    assert {p: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    assert fast_task.git(folder, "status", "--porcelain") == ""
    assert fast_task.git(folder, "branch", "--show-current") == "main"


def test_a_commit_holds_only_mutable_files_and_the_experiments_id(tmp_path: Path) -> None:
    folder, workspace, base = make(tmp_path)
    done = workspace.commit(edited("LR = 0.4"), "lower LR", "id-1", base)
    assert fast_task.git(folder, "show", "--name-only", "--format=%s|%an", done.commit).split() == [
        *["experiment:", "lower", "LR|m1"],
        "train.py",
    ]
    assert (
        fast_task.git(folder, "show", "-s", "--format=%(trailers:key=Experiment-Id,valueonly)", done.commit) == "id-1"
    )


def test_strays_are_restored_and_reported(tmp_path: Path) -> None:
    _, workspace, base = make(tmp_path)
    score = (workspace.task_dir / "score.sh").read_bytes()
    (workspace.task_dir / "score.sh").write_text("echo 'val_bpb: 0.1'")
    (workspace.task_dir / "notes").mkdir()
    (workspace.task_dir / "notes" / "a b.txt").write_text("mine")
    done = workspace.commit(edited("LR = 0.4"), "try", "id-1", base)
    assert set(done.strays) == {"score.sh", "notes/a b.txt"}
    assert (workspace.task_dir / "score.sh").read_bytes() == score
    assert not (workspace.task_dir / "notes" / "a b.txt").exists()
    assert not workspace.immutable_changed()


def test_a_deleted_immutable_file_is_noticed(tmp_path: Path) -> None:
    _, workspace, _ = make(tmp_path)
    assert not workspace.immutable_changed()
    (workspace.task_dir / "score.sh").unlink()
    assert workspace.immutable_changed()


def test_in_a_monorepo_only_the_tasks_directory_is_staged(tmp_path: Path) -> None:
    folder, workspace, base = make(tmp_path, "research/tiny")
    (workspace.root / "other" / "file.py").write_text("untouched = False\n")
    done = workspace.commit(edited("LR = 0.4"), "try", "id-1", base)
    assert done.strays == ("other/file.py",)
    kept = workspace.keep("rows\n", "experiment: try\n\nExperiment-Id: id-1", 1_700_000_000)
    names = fast_task.git(folder, "diff", "--name-only", base, kept).split()
    assert names == ["research/tiny/results.tsv", "research/tiny/train.py"]


def test_a_keep_folds_results_in_and_the_same_keep_gives_the_same_commit(tmp_path: Path) -> None:
    folder, workspace, base = make(tmp_path)
    tested = workspace.commit(edited("LR = 0.4"), "try", "id-1", base).commit
    message = "experiment: try\n\nval_bpb: 1.0\n\nExperiment-Id: id-1"
    kept = workspace.keep("header\nrow\n", message, 1_700_000_000)
    assert fast_task.git(folder, "show", f"{kept}:results.tsv") == "header\nrow"
    assert fast_task.git(folder, "rev-parse", f"{kept}^") == base
    assert fast_task.git(folder, "rev-parse", "autoresearch/t-m1") == kept
    workspace.reset(tested, "header\nrow\n")
    assert workspace.keep("header\nrow\n", message, 1_700_000_000) == kept


def test_a_reset_keeps_the_rows_and_removes_what_the_run_left(tmp_path: Path) -> None:
    _, workspace, base = make(tmp_path)
    workspace.commit(edited("LR = 0.4"), "try", "id-1", base)
    (workspace.task_dir / "checkpoint.pt").write_text("large")
    (workspace.task_dir / "run.log").write_text("log")
    workspace.reset(base, "header\na\nb\n")
    assert (workspace.task_dir / "results.tsv").read_text() == "header\na\nb\n"
    assert (workspace.task_dir / "train.py").read_text() == fast_task.TRAIN
    assert not (workspace.task_dir / "checkpoint.pt").exists()


def test_every_tested_commit_stays_reachable_on_one_ref(tmp_path: Path) -> None:
    folder, workspace, base = make(tmp_path)
    tested = []
    for number in range(3):
        tested.append(workspace.commit(edited(f"LR = 0.{number + 1}"), f"try {number}", f"id-{number}", base).commit)
        workspace.reset(base, "header\n")
    assert set(tested) <= set(fast_task.git(folder, "rev-list", "refs/attic/m1").split())
    link = fast_task.git(folder, "rev-parse", "refs/attic/m1")
    parents = fast_task.git(folder, "show", "-s", "--format=%P", link).split()
    assert parents[1] == tested[-1]
    tree, of_tested = fast_task.git(folder, "rev-parse", f"{link}^{{tree}}", f"{tested[-1]}^{{tree}}").split()
    assert tree == of_tested
    first = fast_task.git(folder, "rev-list", "--first-parent", "refs/attic/m1").split()
    assert first[3] == base  # three links, then the base


def test_only_mutable_files_can_be_written(tmp_path: Path) -> None:
    _, workspace, base = make(tmp_path)
    with pytest.raises(ValueError, match=r"score\.sh is not a mutable file"):
        workspace.commit({"score.sh": "echo"}, "try", "id-1", base)


def test_removal_leaves_no_branch_no_worktree_no_ref(tmp_path: Path) -> None:
    folder, workspace, base = make(tmp_path)
    workspace.commit(edited("LR = 0.4"), "try", "id-1", base)
    workspace.remove(folder, "autoresearch/t-m1", None, last=True)
    assert fast_task.git(folder, "for-each-ref", "--format=%(refname)") == "refs/heads/main"
    assert fast_task.git(folder, "worktree", "list").count("\n") == 0


def test_removal_gives_the_attic_back_as_it_was(tmp_path: Path) -> None:
    folder, workspace, base = make(tmp_path)
    before = workspace.commit(edited("LR = 0.4"), "earlier", "id-0", base).commit
    attic = fast_task.git(folder, "rev-parse", workspace.attic)
    workspace.commit(edited("LR = 0.3"), "later", "id-1", base)
    workspace.remove(folder, "autoresearch/t-m1", attic, last=False)
    assert fast_task.git(folder, "rev-parse", workspace.attic) == attic
    assert before in fast_task.git(folder, "rev-list", workspace.attic)
    assert fast_task.git(folder, "status", "--porcelain") == ""  # .swarm/ is still ignored


def test_without_its_link_the_worktree_is_never_taken_for_the_checkout(tmp_path: Path) -> None:
    folder, workspace, base = make(tmp_path)
    (folder / "score.sh").write_text("work of hours\n")
    (workspace.root / ".git").unlink()
    assert not workspace.sound()
    for use in (lambda: workspace.reset(base, "rows\n"), lambda: workspace.commit(edited("LR = 0.4"), "x", "id", base)):
        with pytest.raises(GitError, match="not a git repository"):
            use()
    assert (folder / "score.sh").read_text() == "work of hours\n"
    assert fast_task.git(folder, "log", "--format=%s") == "the task"
    workspace.open(folder, "autoresearch/t-m1", base)
    assert workspace.sound()
    assert workspace.commit(edited("LR = 0.4"), "again", "id-2", base).nodes_added == 0


def spoil_link(folder: Path, root: Path) -> None:
    (root / ".git").write_text("gitdir: /nowhere\n")


def spoil_half_made(folder: Path, root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()
    (folder / ".git/worktrees/work/locked").write_text("initializing")


def spoil_admin(folder: Path, root: Path) -> None:
    shutil.rmtree(folder / ".git/worktrees")


def spoil_branch(folder: Path, root: Path) -> None:
    fast_task.git(root, "checkout", "--quiet", "--detach")


def spoil_index(folder: Path, root: Path) -> None:
    (folder / ".git/worktrees/work/index").write_bytes(b"broken")


def spoil_files(folder: Path, root: Path) -> None:
    (root / "score.sh").write_text("forged")
    (root / "sitecustomize.py").write_text("forged")


@pytest.mark.parametrize(
    "spoil", [spoil_link, spoil_half_made, spoil_admin, spoil_branch, spoil_index, spoil_files, shutil.rmtree]
)
def test_opening_mends_whatever_a_kill_left(tmp_path: Path, spoil: Callable[..., None]) -> None:
    folder, workspace, base = make(tmp_path)
    tested = workspace.commit(edited("LR = 0.4"), "try", "id-1", base).commit
    spoil(workspace.root) if spoil is shutil.rmtree else spoil(folder, workspace.root)
    again = Workspace(workspace.root, load_task(folder), "", "m1")
    again.open(folder, "autoresearch/t-m1", tested)
    assert fast_task.git(workspace.root, "rev-parse", "HEAD", "autoresearch/t-m1").split() == [tested, tested]
    assert fast_task.git(workspace.root, "symbolic-ref", "--short", "HEAD") == "autoresearch/t-m1"
    assert fast_task.git(workspace.root, "status", "--porcelain") == ""
    assert (workspace.root / "score.sh").read_text() == fast_task.SCORE
    assert not again.immutable_changed()


def test_a_moved_campaign_is_opened_where_it_is_now(tmp_path: Path) -> None:
    folder, workspace, base = make(tmp_path)
    tested = workspace.commit(edited("LR = 0.4"), "try", "id-1", base).commit
    folder.rename(tmp_path / "moved")
    root = tmp_path / "moved" / ".swarm" / "t" / "work"
    again = Workspace(root, load_task(tmp_path / "moved"), "", "m1")
    again.open(tmp_path / "moved", "autoresearch/t-m1", tested)
    assert fast_task.git(root, "rev-parse", "HEAD") == tested


def test_compiled_python_beside_immutable_files_goes(tmp_path: Path) -> None:
    _, workspace, _ = make(tmp_path)
    cache = workspace.task_dir / "__pycache__"
    cache.mkdir()
    (cache / "score.cpython-311.pyc").write_bytes(b"forged")
    workspace.drop_bytecode()
    assert not cache.exists()


def test_a_proposal_that_changes_nothing_is_our_mistake(tmp_path: Path) -> None:
    _, workspace, base = make(tmp_path)
    with pytest.raises(ValueError, match="changes nothing"):
        workspace.commit({"train.py": fast_task.TRAIN}, "nothing", "id-1", base)


def test_the_code_state_is_the_contents_and_nothing_else() -> None:
    assert code_state({"a": "1", "b": "2"}) == code_state({"b": "2", "a": "1"})
    assert code_state({"a": "1", "b": "2"}) != code_state({"a": "12", "b": ""})


@pytest.mark.parametrize(
    ("name", "before", "after", "nodes"),
    [
        ("train.py", "A = 1\n", "A = 2  # more words\n", 0),
        ("train.py", "A = 1\n", "A = 1\nB = 2\n", 3),
        ("train.py", "A = 1\nB = 2\n", "A = 1\n", -3),
        ("train.py", "A = 1\n", "A = (\n", 8 - 4),
        ("config.toml", "a = 1\n", "a = 1\nb = 2\n\n", 8),
    ],
)
def test_complexity_is_nodes_in_python_and_lines_elsewhere(name: str, before: str, after: str, nodes: int) -> None:
    assert nodes_added({name: before}, {name: after}) == nodes
