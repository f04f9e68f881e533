"""Repo: real git in a temporary folder, whatever hooks and configuration stand there."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from shared.errors import BadInput, SwarmError
from shared.git import GitError, Repo, check_version, clone, forget_caller, init
from tests.fast_task import git

DATE = "2024-01-02T03:04:05+00:00"


@pytest.fixture(autouse=True)
def user_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's git configuration: empty, and to be filled by a test. The current folder is no repository."""
    path = tmp_path / "gitconfig"
    path.touch()
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return path


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    """One commit on main with a.txt in it."""
    made = init(tmp_path / "repo", "mac-mini")
    put(made, "a.txt", "one\n")
    made.commit(["a.txt"], "first")
    return made


def put(repo: Repo, name: str, text: str) -> None:
    path = repo.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def tree(repo: Repo, revision: str = "HEAD") -> list[str]:
    return repo.run("ls-tree", "-r", "-z", "--name-only", revision).rstrip("\0").split("\0")


def touching(script: Path, marker: Path, status: int) -> None:
    """An executable that leaves a marker."""
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(f"#!/bin/sh\ntouch '{marker}'\nexit {status}\n")
    script.chmod(0o755)


# -- committing


def test_a_new_repository_starts_on_main(tmp_path: Path, user_config: Path) -> None:
    user_config.write_text("[init]\n\tdefaultBranch = trunk\n")
    assert init(tmp_path / "deep" / "new").run("symbolic-ref", "HEAD") == "refs/heads/main"


def test_making_a_repository_again_keeps_its_commits(repo: Repo) -> None:
    before = repo.head()
    assert init(repo.path).head() == before


def test_a_commit_holds_only_the_given_paths(repo: Repo) -> None:
    put(repo, "a.txt", "two\n")
    put(repo, "b.txt", "b\n")
    put(repo, "staged.txt", "c\n")
    git(repo.path, "add", "staged.txt")
    put(repo, "new.txt", "d\n")
    commit = repo.commit(["new.txt"], "only new")
    assert commit == repo.head()
    assert git(repo.path, "show", "--format=%s", "--name-only", "HEAD").split("\n") == ["only new", "", "new.txt"]
    assert sorted(repo.changed_paths()) == ["a.txt", "b.txt", "staged.txt"]


def test_a_path_is_a_name_and_no_pattern(repo: Repo) -> None:
    # Was: `git add` reads `a*` as a pattern and stages `ab` too (the next plain --amend takes it along).
    for name in ("a*", "ab"):
        put(repo, name, "one\n")
        repo.run("--literal-pathspecs", "add", "--", name)
    repo.run("commit", "-m", "both")
    for name in ("a*", "ab"):
        put(repo, name, "two\n")
    repo.commit(["a*"], "one of them")
    assert repo.changed_paths() == ["ab"]
    assert git(repo.path, "diff", "--cached", "--name-only") == ""


def test_an_ignored_file_can_be_committed(repo: Repo) -> None:
    put(repo, ".gitignore", "results.tsv\n")
    repo.commit([".gitignore"], "ignore")
    put(repo, "results.tsv", "row\n")
    assert repo.changed_paths() == []
    repo.commit(["results.tsv"], "results")
    assert tree(repo) == [".gitignore", "a.txt", "results.tsv"]


def test_an_unchanged_tree_is_committed_too(repo: Repo) -> None:
    before = repo.head()
    after = repo.commit(["a.txt"], "again")
    assert after != before
    assert repo.resolve("HEAD~1") == before


def test_a_deleted_file_is_committed_as_deleted(repo: Repo) -> None:
    put(repo, "b.txt", "b\n")
    repo.commit(["b.txt"], "b")
    (repo.path / "a.txt").unlink()
    repo.commit(["a.txt"], "gone")
    assert tree(repo) == ["b.txt"]


def test_a_commit_carries_the_machines_name(repo: Repo, user_config: Path) -> None:
    user_config.write_text("[user]\n\tname = Ada\n\temail = ada@example.org\n")
    repo.commit(["a.txt"], "whose")
    people = git(repo.path, "log", "-1", "--format=%an %ae %cn %ce")
    assert people == "mac-mini mac-mini@swarm mac-mini mac-mini@swarm"


def test_a_message_is_kept_to_the_last_line(repo: Repo) -> None:
    repo.commit(["a.txt"], "experiment: ü & 'quotes' $HOME\n\nExperiment-Id: 7")
    assert git(repo.path, "log", "-1", "--format=%B") == "experiment: ü & 'quotes' $HOME\n\nExperiment-Id: 7"
    assert git(repo.path, "log", "-1", "--format=%(trailers:key=Experiment-Id,valueonly)") == "7"


def test_amending_folds_the_paths_in_and_keeps_message_and_parent(repo: Repo) -> None:
    parent = repo.head()
    put(repo, "a.txt", "two\n")
    repo.commit(["a.txt"], "experiment: two")
    put(repo, "results.tsv", "row\n")
    amended = repo.amend(["results.tsv"], DATE)
    assert amended == repo.head()
    assert tree(repo) == ["a.txt", "results.tsv"]
    assert git(repo.path, "log", "-1", "--format=%s %P %aI %cI") == f"experiment: two {parent} {DATE} {DATE}"


def test_the_same_content_and_date_amend_to_the_same_hash(repo: Repo) -> None:
    tested = repo.commit(["a.txt"], "experiment: same")
    put(repo, "results.tsv", "row\n")
    first = repo.amend(["results.tsv"], DATE)
    repo.run("reset", "--hard", tested)
    put(repo, "results.tsv", "row\n")
    assert repo.amend(["results.tsv"], DATE) == first != tested


def test_amending_takes_only_the_given_paths(repo: Repo) -> None:
    # Was: without `-- paths` git folds in whatever else is staged.
    put(repo, "staged.txt", "c\n")
    git(repo.path, "add", "staged.txt")
    put(repo, "results.tsv", "row\n")
    repo.amend(["results.tsv"], DATE)
    assert tree(repo) == ["a.txt", "results.tsv"]


def test_a_hard_reset_brings_the_tree_back(repo: Repo) -> None:
    before = repo.head()
    put(repo, "a.txt", "two\n")
    repo.commit(["a.txt"], "two")
    put(repo, "a.txt", "three\n")
    repo.reset_hard(before)
    assert (repo.head(), (repo.path / "a.txt").read_text(), repo.changed_paths()) == (before, "one\n", [])


def test_a_link_is_a_commit_with_the_given_parents_and_the_tree(repo: Repo) -> None:
    first = repo.head()
    put(repo, "a.txt", "two\n")
    second = repo.commit(["a.txt"], "two")
    put(repo, "a.txt", "not committed\n")
    link = repo.link("refs/attic/mac", first, [second, first], "attic: one")
    assert repo.resolve("refs/attic/mac") == link
    assert git(repo.path, "log", "-1", "--format=%P|%T|%s", link) == "|".join(
        [f"{second} {first}", git(repo.path, "rev-parse", f"{first}^{{tree}}"), "attic: one"]
    )
    assert (repo.head(), repo.changed_paths()) == (second, ["a.txt"])


def test_a_second_link_moves_the_ref_on(repo: Repo) -> None:
    first = repo.link("refs/attic/mac", "HEAD", [repo.head()], "one")
    second = repo.link("refs/attic/mac", "HEAD", [first, repo.head()], "two")
    assert git(repo.path, "rev-list", "--first-parent", "refs/attic/mac").split() == [second, first, repo.head()]


# -- what stands in the way


@pytest.mark.parametrize("place", [".git/hooks", "hooks of the user"])
@pytest.mark.parametrize("hook", ["pre-commit", "prepare-commit-msg", "commit-msg", "post-commit", "post-rewrite"])
def test_hooks_are_not_run(repo: Repo, tmp_path: Path, user_config: Path, hook: str, place: str) -> None:
    marker = tmp_path / "ran"
    folder = repo.path / place
    touching(folder / hook, marker, status=1)
    if not place.startswith(".git"):
        user_config.write_text(f'[core]\n\thooksPath = "{folder}"\n')
    with suppress(subprocess.CalledProcessError):
        git(repo.path, "commit", "--amend", "--allow-empty", "-m", "by hand")
    assert marker.exists()  # the hook works; now for us
    marker.unlink()
    put(repo, "b.txt", "b\n")
    commit = repo.commit(["b.txt"], "b")
    repo.link("refs/attic/mac", repo.amend(["a.txt"], DATE), [commit], "attic")
    assert tree(repo) == ["a.txt", "b.txt"]
    assert not marker.exists()


def test_reference_hooks_are_not_run(repo: Repo, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    touching(repo.path / ".git" / "hooks" / "reference-transaction", marker, status=1)
    with pytest.raises(subprocess.CalledProcessError):
        git(repo.path, "update-ref", "refs/attic/hand", "HEAD")
    marker.unlink()
    assert repo.resolve("refs/attic/mac") is None
    assert repo.link("refs/attic/mac", "HEAD", [repo.head()], "x") == repo.resolve("refs/attic/mac")
    assert not marker.exists()


def test_a_file_monitor_is_not_run(repo: Repo, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    touching(tmp_path / "monitor", marker, status=1)
    git(repo.path, "config", "core.fsmonitor", str(tmp_path / "monitor"))
    git(repo.path, "status")
    marker.unlink()
    put(repo, "a.txt", "two\n")
    assert repo.changed_paths() == ["a.txt"]
    assert not marker.exists()


def test_a_user_who_signs_commits_does_not_matter(repo: Repo, user_config: Path) -> None:
    user_config.write_text("[commit]\n\tgpgSign = true\n[gpg]\n\tprogram = /bin/false\n")
    with pytest.raises(subprocess.CalledProcessError):
        git(repo.path, "commit", "--allow-empty", "-m", "by hand")
    commit = repo.commit(["a.txt"], "unsigned")
    amended = repo.amend(["a.txt"], DATE)
    assert commit != amended == repo.head()
    assert "gpgsig" not in git(repo.path, "cat-file", "commit", "HEAD")


# -- looking


def test_a_revision_resolves_to_its_commit_or_none(repo: Repo) -> None:
    git(repo.path, "tag", "-a", "v1", "-m", "a tag has an object of its own")
    assert repo.resolve("v1") == repo.resolve("main") == repo.head()
    assert [repo.resolve(r) for r in ("nothing", "HEAD~1", "HEAD:a.txt", "0" * 40, "")] == [None] * 5


def test_the_top_is_found_from_inside_and_none_outside(repo: Repo, tmp_path: Path) -> None:
    put(repo, "deep/er/x", "x")
    assert Repo(repo.path / "deep" / "er").top() == repo.path.resolve()
    assert Repo(tmp_path / "elsewhere").top() is None


@pytest.mark.parametrize(
    "text",
    ["a\r\nb\r\n", "a\n\n\n", "no end", "", "\n", "\r\n", "  a \t\n ", "é 🦥\x0c\u2028\n", "mixed\r\nends\n\r\n"],
)
@pytest.mark.parametrize("autocrlf", ["true", "input", "false"])
def test_a_shown_file_is_exact_to_the_last_newline(repo: Repo, user_config: Path, text: str, autocrlf: str) -> None:
    user_config.write_text(f"[core]\n\tautocrlf = {autocrlf}\n")
    put(repo, "file name.txt", text)
    commit = repo.commit(["file name.txt"], "text")
    assert repo.show(commit, "file name.txt") == text
    assert repo.show("HEAD~1", "a.txt") == "one\n"
    repo.reset_hard("HEAD~1")
    repo.reset_hard(commit)
    assert (repo.path / "file name.txt").read_bytes() == text.encode()


def test_changed_paths_are_named_as_they_are(repo: Repo) -> None:
    names = ["with space.txt", " lead", "trail ", "ünï/🦥 é.txt", 'quo"te', "tab\there", "new\nline", "a -> b", "-dash"]
    for name in names:
        put(repo, name, "new\n")
    assert sorted(repo.changed_paths()) == sorted(names)
    repo.commit(names, "all")
    assert repo.changed_paths() == []
    assert sorted(tree(repo)) == sorted(["a.txt", *names])
    for name in names:
        put(repo, name, "changed\n")
    assert sorted(repo.changed_paths()) == sorted(names)


def test_every_kind_of_change_is_a_changed_path_and_ignored_files_are_none(repo: Repo, user_config: Path) -> None:
    user_config.write_text(
        "[status]\n\tshowUntrackedFiles = no\n\trelativePaths = true\n\tbranch = true\n\trenames = true\n"
    )
    for name in ("deleted", "moved", "staged"):
        put(repo, name, f"{name}\n" * 5)
    put(repo, ".gitignore", "*.log\n")
    repo.commit(["deleted", "moved", "staged", ".gitignore"], "more")
    (repo.path / "deleted").unlink()
    git(repo.path, "mv", "moved", "moved to")
    put(repo, "staged", "new\n")
    git(repo.path, "add", "staged")
    put(repo, "a.txt", "modified\n")
    put(repo, "folder/deep/untracked", "u\n")
    put(repo, "run.log", "ignored\n")
    expected = ["a.txt", "deleted", "folder/deep/untracked", "moved", "moved to", "staged"]
    assert sorted(repo.changed_paths()) == expected
    assert sorted(Repo(repo.path / "folder").changed_paths()) == expected


def test_a_diff_names_what_changed_between_two_commits(repo: Repo) -> None:
    put(repo, "a.txt", "two\n")
    put(repo, "b.txt", "b\n")
    repo.commit(["a.txt", "b.txt"], "both")
    assert "-one\n+two" in repo.diff("HEAD~1", "HEAD")
    only = repo.diff("HEAD~1", "HEAD", ["b.txt"])
    assert "+b" in only
    assert "a.txt" not in only
    assert repo.diff("HEAD", "HEAD") == ""


@pytest.mark.parametrize(
    "config", ["", "[diff]\n\tnoprefix = true\n", "[diff]\n\tmnemonicPrefix = true\n", "[color]\n\tui = always\n"]
)
def test_a_diff_can_be_applied_whatever_the_users_config(repo: Repo, user_config: Path, config: str) -> None:
    # Was: the final newline is stripped (git: "corrupt patch"), and diff.noprefix takes away `a/` and `b/`.
    user_config.write_text(config)
    put(repo, "a.txt", "two\n")
    after = repo.commit(["a.txt"], "two")
    patch = repo.diff("HEAD~1", "HEAD")
    repo.reset_hard("HEAD~1")
    put(repo, "the.patch", patch)
    user_config.write_text("")
    git(repo.path, "apply", "the.patch")
    assert (repo.path / "a.txt").read_text() == repo.show(after, "a.txt")


# -- excluding


def test_excluding_patterns_twice_writes_them_once(repo: Repo) -> None:
    put(repo, "run.log", "x")
    put(repo, "cache/x", "x")
    repo.exclude(["run.log", "cache/"])
    once = (repo.path / ".git" / "info" / "exclude").read_text()
    repo.exclude(["run.log", "cache/"])
    assert (repo.path / ".git" / "info" / "exclude").read_text() == once
    assert once.splitlines().count("run.log") == once.splitlines().count("cache/") == 1
    assert repo.changed_paths() == []


@pytest.mark.parametrize("before", ["mine", "# mine\nmine\n", "", "*.log\n"])
def test_excluding_keeps_what_was_excluded_and_including_takes_only_ours_back(repo: Repo, before: str) -> None:
    path = repo.path / ".git" / "info" / "exclude"
    path.write_text(before)
    put(repo, "run.log", "x")
    repo.exclude(["*.log"])
    lines = path.read_text().splitlines()
    assert lines[: len(before.splitlines())] == before.splitlines()
    assert lines[-1] == "*.log"
    assert repo.changed_paths() == []
    repo.include(["*.log"])
    assert path.read_text().splitlines() == before.splitlines()
    assert repo.changed_paths() == ([] if "*.log" in before else ["run.log"])


def test_including_what_was_never_excluded_changes_nothing(repo: Repo) -> None:
    path = repo.path / ".git" / "info" / "exclude"
    before = path.read_text()
    repo.include(["*.log"])
    assert path.read_text() == before


def test_excluding_works_where_git_made_no_exclude_file(repo: Repo) -> None:
    path = repo.path / ".git" / "info" / "exclude"
    path.unlink()
    path.parent.rmdir()
    put(repo, "run.log", "x")
    repo.include(["*.log"])
    repo.exclude(["*.log"])
    assert repo.changed_paths() == []


def test_excluding_from_a_linked_worktree_works_there(repo: Repo, tmp_path: Path) -> None:
    repo.run("worktree", "add", "--quiet", str(tmp_path / "linked"), "-b", "other")
    linked = Repo(tmp_path / "linked")
    linked.exclude(["*.log"])
    put(linked, "run.log", "x")
    put(linked, "seen", "x")
    assert linked.changed_paths() == ["seen"]


# -- cloning


def listing(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every entry with its time of change, number of links and content."""
    return {
        str(path.relative_to(folder)): (stat.st_mtime_ns, stat.st_nlink, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
        for stat in [path.lstat()]
    }


def test_a_clone_never_writes_to_its_source(repo: Repo, tmp_path: Path) -> None:
    git(repo.path, "gc", "--quiet")
    put(repo, "b.txt", "loose\n")
    repo.commit(["b.txt"], "loose objects beside the pack")
    put(repo, "dirty.txt", "not committed\n")
    before = listing(repo.path)
    copy = clone(repo.path, tmp_path / "copies" / "copy", "h100")
    assert listing(repo.path) == before
    put(copy, "a.txt", "two\n")
    copy.commit(["a.txt"], "in the copy")
    copy.run("gc", "--quiet", "--prune=now")
    assert listing(repo.path) == before
    assert copy.resolve("HEAD~1") == repo.head()
    assert tree(copy) == ["a.txt", "b.txt"]
    assert git(copy.path, "log", "-1", "--format=%an") == "h100"


def test_a_clone_stands_without_its_source(repo: Repo, tmp_path: Path) -> None:
    head = repo.head()
    copy = clone(repo.path, tmp_path / "copy")
    repo.path.rename(tmp_path / "gone")
    assert copy.head() == head
    assert git(copy.path, "fsck", "--full") == ""


def test_folders_may_be_named_from_where_one_stands(
    repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Was: git runs inside the source, where the source's relative name means nothing.
    monkeypatch.chdir(tmp_path)
    assert clone(Path("repo"), Path("copy")).head() == repo.head()


def test_a_clone_of_nothing_is_a_git_error(tmp_path: Path) -> None:
    with pytest.raises(GitError):
        clone(tmp_path / "elsewhere", tmp_path / "copy")


# -- what a killed git leaves


def test_left_locks_are_removed_and_named_and_nothing_else_goes(repo: Repo, tmp_path: Path) -> None:
    repo.run("worktree", "add", "--quiet", str(tmp_path / "linked"), "-b", "other")
    linked = Repo(tmp_path / "linked")
    inside = repo.path / ".git"
    for name in ("index.lock", "refs/heads/main.lock", "worktrees/linked/HEAD.lock"):
        (inside / name).touch()
    before = set(listing(inside))
    assert linked.clear_locks(0.0) == ["HEAD.lock", "index.lock", "main.lock"]
    assert before - set(listing(inside)) == {"index.lock", "refs/heads/main.lock", "worktrees/linked/HEAD.lock"}
    assert linked.clear_locks(0.0) == []
    repo.commit(["a.txt"], "git works again")


# -- the right folder


def test_a_folder_that_is_gone_is_an_error_and_not_the_current_folder(
    repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Was: GitPython runs git in the CURRENT folder when its own is missing: a reset --hard would hit what stands here.
    monkeypatch.chdir(repo.path)
    put(repo, "a.txt", "work of hours\n")
    with pytest.raises(GitError, match="gone"):
        Repo(tmp_path / "gone").reset_hard("HEAD")
    assert (repo.path / "a.txt").read_text() == "work of hours\n"


@pytest.mark.parametrize("name", ["$HOME", "${PATH}", "a $LC_ALL b", "~", "ü 🦥 'x\""])
def test_a_folder_is_named_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # Was: GitPython expands variables in the path; git init then runs in the current folder.
    monkeypatch.setenv("LC_ALL", "C")
    init(tmp_path / name)
    assert (tmp_path / name / ".git").is_dir()
    assert not (tmp_path / "elsewhere" / ".git").exists()


def test_the_variables_of_a_calling_git_are_dropped(
    repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = init(tmp_path / "caller")
    monkeypatch.setenv("GIT_DIR", str(caller.path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(caller.path))
    monkeypatch.setenv("GIT_INDEX_FILE", str(caller.path / ".git" / "index"))
    monkeypatch.setenv("GIT_OBJECT_DIRECTORY", str(caller.path / ".git" / "objects"))
    monkeypatch.setenv("GIT_PREFIX", "sub/")
    assert repo.top() == caller.path.resolve()  # misled
    forget_caller()
    assert repo.top() == repo.path.resolve()
    assert len(repo.head()) == 40
    assert not {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX"} & set(os.environ)


def test_forgetting_a_caller_that_never_was_changes_nothing() -> None:
    before = dict(os.environ)
    forget_caller()
    assert dict(os.environ) == before


# -- failing


def test_an_error_holds_the_command_the_folder_and_gits_words(repo: Repo) -> None:
    with pytest.raises(GitError) as caught:
        repo.run("add", "--", "nofile")
    assert str(caught.value) == (f"git add -- nofile in {repo.path}: fatal: pathspec 'nofile' did not match any files")
    assert isinstance(caught.value, SwarmError)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rev-parse", "nope"], "unknown revision"),
        (["checkout", "nope"], "did not match"),
        (["no-such-command"], "is not a git command"),
        (["commit", "-m", "x"], "nothing to commit"),
    ],
)
def test_an_error_is_one_line(repo: Repo, arguments: list[str], words: str) -> None:
    # Was: git's words come with their newlines; what it says on stdout comes as "stdout: 'On branch main...".
    with pytest.raises(GitError) as caught:
        repo.run(*arguments)
    message = str(caught.value)
    assert message.startswith(f"git {' '.join(arguments)} in {repo.path}: ")
    assert words in message
    assert "stdout:" not in message
    assert len(message.splitlines()) == 1


def test_a_missing_git_is_said_so(repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    with pytest.raises(GitError, match="not installed or not on PATH"):
        repo.head()


@pytest.mark.parametrize(
    ("says", "fine"),
    [
        ("git version 2.32.0", True),
        ("git version 2.39.5 (Apple Git-154)", True),
        ("git version 2.50.0.windows.1", True),
        ("git version 3.0", True),
        ("git version 2.31.8", False),
        ("git version 1.8.3.1", False),
        ("something else", False),
    ],
)
def test_a_git_that_is_too_old_is_named_with_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, fine: bool
) -> None:
    program = tmp_path / "git"
    program.write_text(f"#!/bin/sh\necho '{says}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    if fine:
        check_version()
        return
    with pytest.raises(BadInput) as caught:
        check_version()
    assert str(caught.value) == f"{says} is too old: git 2.32 or newer is needed"


def test_a_missing_git_is_for_a_person_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    with pytest.raises(BadInput, match=r"not installed or not on PATH; git 2\.32 or newer is needed"):
        check_version()


def test_committing_a_file_that_is_not_there_is_an_error(repo: Repo) -> None:
    before = repo.head()
    with pytest.raises(GitError, match="nofile"):
        repo.commit(["nofile"], "x")
    assert repo.head() == before


def test_git_is_never_asked_for_a_password(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_TERMINAL_PROMPT", "1")
    assert repo.run("-c", "alias.ask=!echo $GIT_TERMINAL_PROMPT", "ask") == "0"
