"""`swarm` as a person uses it: real processes, real git, a fast task."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import fast_task
from tests.conftest import ROOT

HOME_VARIABLES = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}


def swarm(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "coordinator.cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **HOME_VARIABLES, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def everything(folder: Path) -> dict[str, bytes]:
    """All files below a folder by content, and all refs; git's own book-keeping left out."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    own = (".git/objects/", ".git/index", ".git/logs", ".git/packed-refs")
    refs = fast_task.git(folder, "for-each-ref").encode()
    return {"refs": refs, **{k: v for k, v in files.items() if not k.startswith(own)}}


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return fast_task.make(tmp_path / "task")


def run(task: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return swarm("run", "--yes", "--name", "m1", "--tag", "t", *more, cwd=task, **environment)


def test_five_experiments_and_what_they_leave(task: Path) -> None:
    done = run(task, "--experiments", "5")
    assert done.returncode == 0, done.stderr
    shown = json.loads(swarm("results", "--json", cwd=task).stdout)
    assert shown["standing"]["experiments"] == 5
    assert len(shown["experiments"]) == 6
    assert len({e["seeds"][0] for e in shown["experiments"]}) == 6
    rows = (task / ".swarm/t-m1/work/results.tsv").read_text().splitlines()
    assert rows[0] == "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
    assert [row.split("\t")[0] for row in rows[1:]] == [e["commit"][:7] for e in shown["experiments"]]
    log = fast_task.git(task, "log", "--format=%s", "main..autoresearch/t-m1").splitlines()
    assert log[-1] == "experiment: baseline"
    assert len(log) == 1 + shown["standing"]["keeps"]
    assert fast_task.git(task, "status", "--porcelain") == ""
    table = swarm("results", cwd=task).stdout
    assert all(e["commit"][:7] in table for e in shown["experiments"])


def test_a_second_call_resumes_with_its_memory(task: Path) -> None:
    run(task, "--experiments", "3")
    again = swarm("run", "--yes", "--name", "m1", "--experiments", "3", cwd=task)  # the tag is found again
    assert again.returncode == 0, again.stderr
    shown = json.loads(swarm("results", "--json", cwd=task).stdout)["experiments"]
    assert [e["number"] for e in shown] == list(range(7))
    assert len({e["description"] for e in shown}) == 7  # nothing tried twice


def test_best_and_plot_write_what_they_say(task: Path, tmp_path: Path) -> None:
    run(task, "--experiments", "4")
    out = tmp_path / "best.py"
    done = swarm("best", "--out", out, "--json", cwd=task)
    head = fast_task.git(task, "show", "autoresearch/t-m1:train.py")
    assert out.read_text().strip() == head.strip()
    assert json.loads(done.stdout)["files"] == [str(out)]
    assert swarm("best", "--out", out, cwd=task).returncode == 4
    picture = tmp_path / "p.png"
    assert swarm("plot", "--out", picture, cwd=task).returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert swarm("plot", "--out", tmp_path / "p.txt", cwd=task).returncode == 2
    assert swarm("plot", "--out", tmp_path / "no/such/p.png", cwd=task).returncode == 2
    assert swarm("best", "--out", out / "x.py", cwd=task).returncode == 2


BROKEN = {
    "unknown key": (
        "metric_direction: minimize",
        "metric_direction: minimize\nbudget_hours: 1",
        "budget_hours: unknown key",
    ),
    "misspelt key": ("eval_command:", "eval_comand:", "did you mean 'eval_command'"),
    "misspelt direction": ("minimize", "minimise", "metric_direction: "),
    "missing file": ("[train.py]", "[trian.py]", "mutable_files: 'trian.py' does not exist"),
    "missing key": ("metric: val_bpb\n", "", "metric: missing"),
    "metric that never appears": (
        "metric: val_bpb",
        "metric: loss",
        "metric: the baseline gave no score: no 'loss:' line in",
    ),
    "command that fails": ("sh score.sh", "sh nothing.sh", "run_command: the baseline gave no score: exit 2"),
}


@pytest.mark.parametrize(("before", "after", "complaint"), BROKEN.values(), ids=list(BROKEN))
def test_a_wrong_yaml_is_one_line_exit_2_and_changes_nothing(
    tmp_path: Path, before: str, after: str, complaint: str
) -> None:
    config = fast_task.CONFIG.replace(before, after)
    if "metric: loss" in config:
        config = config.replace("grep '^val_bpb:'", "grep '^loss:'")
    task = fast_task.make(tmp_path / "task", config)
    first = everything(task)
    done = run(task, "--experiments", "1")
    assert done.returncode == 2
    complaints = [line for line in done.stderr.splitlines() if line.startswith("swarm: ")]
    assert len(complaints) == 1
    assert complaint in complaints[0]
    assert everything(task) == first


def test_outside_a_campaign_it_says_how_to_make_one(tmp_path: Path) -> None:
    done = swarm("run", "--yes", cwd=tmp_path)
    assert done.returncode == 2
    assert "swarm init DIR" in done.stderr


def test_without_a_terminal_it_wants_a_yes(task: Path) -> None:
    done = swarm("run", "--name", "m1", cwd=task)
    assert done.returncode == 2
    assert "say --yes" in done.stderr
    assert not (task / ".swarm").exists()


def start(task: Path, start_new_session: bool = False, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "coordinator.cli", "run", "--yes", "--name", "m1", "--tag", "t"],
        cwd=task,
        env={**os.environ, **HOME_VARIABLES, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=start_new_session,
    )


def wait_for(path: Path, text: str, process: subprocess.Popen[str], times: int = 1) -> None:
    until = time.monotonic() + 60
    while not path.exists() or path.read_text().count(text) < times:
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < until, f"no {text} in {path}"
        time.sleep(0.02)


def test_ctrl_c_ends_cleanly_and_the_run_in_progress_is_made_again(task: Path) -> None:
    journal = task / ".swarm/t-m1/journal.jsonl"
    worker = start(task, NAP="0.4")
    wait_for(journal, '"event": "experiment"', worker, times=3)
    worker.send_signal(signal.SIGINT)
    output, _ = worker.communicate(timeout=60)
    assert worker.returncode == 0, output
    assert "stopped by hand" in output
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    assert events[-1]["event"] == "void"
    interrupted = events[-1]["experiment"]
    head = fast_task.git(task, "rev-parse", "autoresearch/t-m1")
    assert head == [e["commit"] for e in events if e["event"] == "kept"][-1]
    again = run(task, "--experiments", "0")
    assert again.returncode == 0
    decided = [e["experiment"] for e in map(json.loads, journal.read_text().splitlines()) if e["event"] == "decision"]
    assert decided.count(interrupted) == 1


def test_a_lock_left_by_a_git_that_died_with_the_machine_does_not_stop_the_next_start(task: Path) -> None:
    run(task, "--experiments", "1")
    lock = task / ".git/worktrees/work/index.lock"
    lock.write_text("")
    again = run(task, "--experiments", "1")
    assert again.returncode == 0, again.stderr
    assert "removed index.lock" in again.stdout
    assert not lock.exists()


def test_the_users_checkout_survives_a_worktree_without_its_link(task: Path) -> None:
    run(task, "--experiments", "2")
    (task / ".swarm/t-m1/work/.git").unlink()
    (task / "score.sh").write_text((task / "score.sh").read_text() + "# work of hours\n")
    again = run(task, "--experiments", "1")
    assert again.returncode == 0, again.stderr
    assert (task / "score.sh").read_text().endswith("# work of hours\n")
    assert fast_task.git(task, "log", "--format=%s", "main") == "the task"
    assert len(json.loads(swarm("results", "--json", cwd=task).stdout)["experiments"]) == 4


def test_a_run_that_breaks_its_worktree_is_a_crash_and_the_loop_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "task"
    task = fast_task.make(folder)
    score = (task / "score.sh").read_text()
    (task / "score.sh").write_text(score + "\ngrep -q 'LR = 0.5' train.py || rm -rf .git\n")
    fast_task.git(folder, "commit", "--quiet", "--all", "-m", "a score that breaks things")
    done = run(task, "--experiments", "3")
    assert done.returncode == 0, done.stderr
    shown = json.loads(swarm("results", "--json", cwd=task).stdout)["experiments"]
    assert "it broke its worktree" in [e["reason"] for e in shown if "LR " in e["description"]]
    assert len(shown) == 4
    assert fast_task.git(task, "log", "--format=%s", "main").splitlines() == ["a score that breaks things", "the task"]


def test_a_failing_second_tag_takes_nothing_from_the_first(task: Path) -> None:
    assert run(task, "--experiments", "3").returncode == 0
    attic = fast_task.git(task, "rev-parse", "refs/attic/m1")
    (task / "score.sh").write_text("exit 1\n")
    fast_task.git(task, "commit", "--quiet", "--all", "-m", "broken")
    failed = swarm("run", "--yes", "--name", "m1", "--tag", "two", cwd=task)
    assert failed.returncode == 2
    assert fast_task.git(task, "rev-parse", "refs/attic/m1") == attic
    assert fast_task.git(task, "status", "--porcelain") == ""
    assert [p.name for p in (task / ".swarm").iterdir()] == ["t-m1"]
    assert fast_task.git(task, "for-each-ref", "--format=%(refname:short)", "refs/heads").split() == [
        "autoresearch/t-m1",
        "main",
    ]


def test_a_branch_whose_state_is_gone_is_left_alone(task: Path) -> None:
    run(task, "--experiments", "4")
    head = fast_task.git(task, "rev-parse", "autoresearch/t-m1")
    shutil.rmtree(task / ".swarm")
    again = run(task, "--experiments", "1")
    assert again.returncode == 4
    assert "take another --tag" in again.stderr
    assert fast_task.git(task, "rev-parse", "autoresearch/t-m1") == head


def test_another_task_is_not_measured_on_the_same_branch(task: Path) -> None:
    run(task, "--experiments", "1")
    config = task / "autoresearch-config.yaml"
    config.write_text(config.read_text().replace("budget_minutes: 0.02", "budget_minutes: 5"))
    again = run(task, "--experiments", "1")
    assert again.returncode == 2
    assert "budget_minutes is 5.0, autoresearch/t-m1 was measured with 0.02" in again.stderr


def test_uncommitted_work_is_not_silently_left_out(task: Path) -> None:
    (task / "train.py").write_text(fast_task.TRAIN.replace("0.5", "0.2"))
    done = run(task)
    assert done.returncode == 2
    assert "train.py: not committed" in done.stderr
    assert not (task / ".swarm").exists()


def test_a_misspelt_constant_in_the_search_space_is_named(tmp_path: Path) -> None:
    task = fast_task.make(tmp_path / "task", fast_task.CONFIG.replace("  WIDTH:", "  WIDHT:"))
    before = everything(task)
    done = run(task)
    assert done.returncode == 2
    assert "search_space: WIDHT: no constant of that name in train.py; did you mean 'WIDTH'?" in done.stderr
    assert everything(task) == before


def test_code_that_does_not_parse_is_a_baseline_without_a_score(tmp_path: Path) -> None:
    task = fast_task.make(tmp_path / "task")
    (task / "train.py").write_text("print 'x'\n")
    (task / "score.sh").write_text("python -m py_compile train.py\n")
    fast_task.git(task, "commit", "--quiet", "--all", "-m", "python 2")
    done = run(task)
    assert done.returncode == 2
    assert "the baseline gave no score" in done.stderr
    assert not (task / ".swarm").exists()


def test_a_moved_campaign_goes_on(task: Path) -> None:
    run(task, "--experiments", "2")
    moved = task.rename(task.parent / "moved")
    again = run(moved, "--experiments", "1")
    assert again.returncode == 0, again.stderr
    assert len(json.loads(swarm("results", "--json", cwd=moved).stdout)["experiments"]) == 4


def test_ctrl_c_to_the_whole_group_ends_cleanly_whenever_it_comes(task: Path) -> None:
    """As a terminal sends it: to every process of the foreground group, also a git in the middle of a commit."""
    journal = task / ".swarm/t-m1/journal.jsonl"
    for times in range(1, 9):
        worker = start(task, start_new_session=True)
        wait_for(journal, '"event": "decision"', worker, times=2 * times)
        os.killpg(worker.pid, signal.SIGINT)
        output, _ = worker.communicate(timeout=60)
        assert worker.returncode == 0, output
        assert "Traceback" not in output


def test_four_machines_start_at_once_in_one_campaign(task: Path) -> None:
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "coordinator.cli",
                "run",
                "--yes",
                "--name",
                f"m{n}",
                "--tag",
                "t",
                "--experiments",
                "3",
            ],
            cwd=task,
            env={**os.environ, **HOME_VARIABLES},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in range(4)
    ]
    for worker in workers:
        output, _ = worker.communicate(timeout=120)
        assert worker.returncode == 0, output
    branches = fast_task.git(task, "for-each-ref", "--format=%(refname:short)", "refs/heads/autoresearch").split()
    assert branches == [f"autoresearch/t-m{n}" for n in range(4)]
    for n in range(4):
        assert (task / f".swarm/t-m{n}/work/results.tsv").read_text().count("\n") == 5


def test_a_second_worker_on_the_same_slot_is_refused(task: Path) -> None:
    worker = start(task, NAP="0.4")
    try:
        wait_for(task / ".swarm/t-m1/journal.jsonl", '"event": "experiment"', worker)
        done = run(task, "--experiments", "1")
        assert done.returncode == 3
        assert f"worker {worker.pid} is running here" in done.stderr
    finally:
        worker.send_signal(signal.SIGINT)
        worker.communicate(timeout=60)


def test_an_idea_that_edits_a_fixed_file_while_it_runs_is_a_crash(tmp_path: Path) -> None:
    config = fast_task.CONFIG.replace("immutable_files: [score.sh]", "immutable_files: [score.sh, fixed.txt]")
    folder = tmp_path / "task"
    task = fast_task.make(folder, config.replace("[score.sh, fixed.txt]", "[score.sh]"))
    (task / "fixed.txt").write_text("fixed\n")
    (task / "autoresearch-config.yaml").write_text(config)
    score = (task / "score.sh").read_text()
    (task / "score.sh").write_text(score + "\ngrep -q 'LR = 0.5' train.py || echo forged > fixed.txt\n")
    fast_task.git(folder, "add", "--all")
    fast_task.git(folder, "commit", "--quiet", "-m", "a score that forges")
    assert run(task, "--experiments", "2").returncode == 0
    shown = json.loads(swarm("results", "--json", cwd=task).stdout)["experiments"]
    forging = [e for e in shown if "LR " in e["description"]]
    assert forging
    assert all(e["reason"] == "it changed an immutable file" for e in forging)
    assert (task / ".swarm/t-m1/work/fixed.txt").read_text() == "fixed\n"


# -- init


COMMON_TRAIN = """\
import prepare
LR = 0.5
WIDTH = 64
if __name__ == "__main__":
    print(f"val_bpb: {prepare.evaluate(LR, WIDTH):.6f}")
    print("peak_vram_mb: 10.0")
"""
COMMON_PREPARE = """\
TIME_BUDGET = 6
def evaluate(lr, width):
    return 1.0 + (lr - 0.2) ** 2 + abs(width - 128) / 1000
"""


def test_the_common_shape_is_adopted_without_a_yaml(tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    source.mkdir()
    (source / "train.py").write_text(COMMON_TRAIN)
    (source / "prepare.py").write_text(COMMON_PREPARE)
    (source / ".gitignore").write_text("results.tsv\n")
    fast_task.git(source, "init", "--quiet", "--initial-branch=main")
    fast_task.git(source, "add", "--all")
    fast_task.git(source, "commit", "--quiet", "-m", "theirs")
    before = everything(source)
    made = swarm("init", "mine", "--from", source, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    mine = tmp_path / "mine"
    assert "budget_minutes: 0.1" in (mine / "autoresearch-config.yaml").read_text()
    done = swarm("run", "--yes", "--name", "m1", "--experiments", "5", cwd=mine)
    assert done.returncode == 0, done.stderr + done.stdout
    shown = json.loads(swarm("results", "--json", cwd=mine).stdout)
    assert shown["standing"]["experiments"] == 5
    assert shown["standing"]["best"] < shown["standing"]["baseline"]
    assert everything(source) == before


MAXIMISE = """\
name: throughput
metric: requests_per_s
metric_direction: maximize
mutable_files: [config.toml]
immutable_files: [bench.sh]
run_command: "sh bench.sh > run.log 2>&1"
eval_command: "grep '^requests_per_s:' run.log"
budget_minutes: 0.05
branch_prefix: autoresearch
rules: []
"""
BENCH = """\
awk '/^workers/ {w = $3} /^queue/ {q = $3}
     END {print "requests_per_s: " 1000 - (w - 12) * (w - 12) - (q - 300) * (q - 300) / 1000}' config.toml
"""


def test_what_is_not_committed_is_not_adopted_silently(tmp_path: Path) -> None:
    source = fast_task.make(tmp_path / "theirs")
    config = source / "autoresearch-config.yaml"
    config.write_text(config.read_text() + "# changed\n")
    made = swarm("init", "mine", "--from", source, cwd=tmp_path)
    assert made.returncode == 2
    assert "autoresearch-config.yaml is not committed" in made.stderr
    assert not (tmp_path / "mine").exists()


def test_a_maximise_task_on_toml_without_python_in_a_monorepo(tmp_path: Path) -> None:
    source = tmp_path / "mono" / "services" / "web"
    source.mkdir(parents=True)
    (source / "config.toml").write_text('[server]\nworkers = 4  # processes\nqueue = 128\nname = "web"\n')
    (source / "bench.sh").write_text(BENCH)
    (source / "autoresearch-config.yaml").write_text(MAXIMISE)
    (tmp_path / "mono" / "README").write_text("the rest\n")
    fast_task.git(tmp_path / "mono", "init", "--quiet", "--initial-branch=main")
    fast_task.git(tmp_path / "mono", "add", "--all")
    fast_task.git(tmp_path / "mono", "commit", "--quiet", "-m", "mono")
    made = swarm("init", "mine", "--from", source, "--json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    inside = Path(json.loads(made.stdout)["directory"])
    assert inside == (tmp_path / "mine" / "services" / "web").relative_to(tmp_path) or inside.is_absolute()
    inside = tmp_path / "mine" / "services" / "web"
    done = swarm("run", "--yes", "--name", "m1", "--tag", "t", "--experiments", "5", cwd=inside)
    assert done.returncode == 0, done.stderr + done.stdout
    standing = json.loads(swarm("results", "--json", cwd=inside).stdout)["standing"]
    assert standing["experiments"] == 5
    assert standing["best"] > standing["baseline"]
    changed = fast_task.git(inside, "diff", "--name-only", "main", "autoresearch/t-m1").split()
    assert changed == ["services/web/config.toml", "services/web/results.tsv"]
    best = fast_task.git(inside, "show", "autoresearch/t-m1:services/web/config.toml")
    assert "# processes" in best
    assert 'name = "web"' in best


def test_init_refuses_what_exists_and_what_it_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    assert swarm("init", "full", cwd=tmp_path).returncode == 4
    unknown = swarm("init", "new", "--profile", "h101", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "h100, apple, tiny" in unknown.stderr
    nothing = swarm("init", "new", "--from", "nowhere", cwd=tmp_path)
    assert nothing.returncode == 2
    mixed = swarm("init", "new", "--from", "full", "--profile", "tiny", cwd=tmp_path)
    assert mixed.returncode == 2
    assert "belong to the template" in mixed.stderr
    inside = swarm("init", "full/new", "--from", "full", cwd=tmp_path)
    assert inside.returncode == 2
    assert "lies inside" in inside.stderr
    beneath = swarm("init", "full/file/new", cwd=tmp_path)
    assert beneath.returncode == 2
    assert beneath.stderr.count("\n") == 1
    (tmp_path / "shapeless").mkdir()
    shapeless = swarm("init", "new", "--from", "shapeless", cwd=tmp_path)
    assert shapeless.returncode == 2
    assert "not the common shape" in shapeless.stderr
    assert not (tmp_path / "new").exists()


def test_a_campaign_from_the_template_is_whole_and_committed(tmp_path: Path) -> None:
    assert swarm("init", "mine", "--profile", "tiny", cwd=tmp_path).returncode == 0
    mine = tmp_path / "mine"
    assert fast_task.git(mine, "status", "--porcelain") == ""
    train = (mine / "train.py").read_text()
    assert "DEPTH = 2 " in train
    assert "TOTAL_BATCH_SIZE = 2**13 " in train
    program = (mine / "program.md").read_text()
    assert [line[3:5] for line in program.splitlines() if line.startswith("## ")] == [
        "1.",
        "2.",
        "3.",
        "4.",
        "5.",
        "6.",
    ]
    assert "{" not in program


def test_prepare_with_a_folder_of_parquet(tmp_path: Path, small_cache: Path) -> None:
    folder = small_cache / "data" / "small"
    environment = {"AUTORESEARCH_CACHE": str(tmp_path / "cache")}
    copy = tmp_path / "my texts"
    copy.mkdir()
    for shard in folder.iterdir():
        (copy / shard.name).write_bytes(shard.read_bytes())
    made = swarm("init", "mine", "--profile", "tiny", "--data", copy, cwd=tmp_path, **environment)
    assert made.returncode == 0, made.stderr
    assert not (tmp_path / "mine" / "prepare" / "sotu.parquet").exists()
    done = swarm("prepare", "--json", cwd=tmp_path / "mine", **environment)
    result = json.loads(done.stdout)
    assert result["train_rows"] > 100
    assert result["lost_train"] < 0.06
    again = json.loads(swarm("prepare", "--json", cwd=tmp_path / "mine", **environment).stdout)
    assert again == result
    bad = swarm("init", "other", "--data", tmp_path / "nothing", cwd=tmp_path, **environment)
    assert bad.returncode == 2
    assert "0 parquet files" in bad.stderr


def test_usage_errors_are_exit_2(tmp_path: Path) -> None:
    assert swarm("run", "--experiments", "-1", cwd=tmp_path).returncode == 2
    assert swarm("nonsense", cwd=tmp_path).returncode == 2
