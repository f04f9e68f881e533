"""TaskSpec: the reference's template loads as it is, and whatever is wrong is said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import BadInput
from shared.task import CONFIG_NAME, TaskSpec, load_task, parse_task

#: Verbatim from the reference, "Adapting to Other Domains", "Template".
TEMPLATE = """\
# autoresearch-config.yaml
name: "my-project"
metric: "the_metric_name" # what to optimize
metric_direction: "minimize" # or "maximize"

mutable_files:
- "the_file_agent_can_edit.py"

immutable_files:
- "evaluation.py" # metric computation, cannot be gamed
- "data_loader.py" # fixed data pipeline

run_command: "python train.py > run.log 2>&1"
eval_command: "grep '^metric:' run.log"

budget_minutes: 5 # fixed time per experiment
branch_prefix: "autoresearch" # git branch naming

rules:
- "Only modify files listed in mutable_files"
- "Do not install new dependencies"
- "Simpler solutions preferred over complex ones"
- "Run indefinitely until interrupted"
"""

SMALL = """\
name: small
metric: score
metric_direction: maximize
mutable_files: [a.py]
run_command: ./run
budget_minutes: 0.5
"""


def write(folder: Path, config: str, *files: str) -> Path:
    """A task's folder; returns the path of its config."""
    for name in files:
        (folder / name).write_text("x = 1\n")
    (folder / CONFIG_NAME).write_text(config)
    return folder / CONFIG_NAME


def without(key: str) -> str:
    return "".join(line for line in SMALL.splitlines(keepends=True) if not line.startswith(f"{key}:"))


def complaint(config: str) -> str:
    """What parse_task says about a config, the file's name taken off."""
    with pytest.raises(BadInput) as caught:
        parse_task(config, "somewhere/task.yaml")
    return said(caught.value, "somewhere/task.yaml")


def said(error: BadInput, where: str) -> str:
    message = str(error)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{where}: ")
    assert error.exit_code == 2
    return message.removeprefix(f"{where}: ")


# -- what loads


def test_the_references_template_loads_verbatim(tmp_path: Path) -> None:
    write(tmp_path, TEMPLATE, "the_file_agent_can_edit.py", "evaluation.py", "data_loader.py")
    assert load_task(tmp_path) == TaskSpec(
        name="my-project",
        metric="the_metric_name",
        metric_direction="minimize",
        mutable_files=("the_file_agent_can_edit.py",),
        immutable_files=("evaluation.py", "data_loader.py"),
        run_command="python train.py > run.log 2>&1",
        eval_command="grep '^metric:' run.log",
        budget_minutes=5,
        branch_prefix="autoresearch",
        rules=(
            "Only modify files listed in mutable_files",
            "Do not install new dependencies",
            "Simpler solutions preferred over complex ones",
            "Run indefinitely until interrupted",
        ),
    )


def test_the_template_parses_without_its_files() -> None:
    task = parse_task(TEMPLATE, "template")
    assert (task.name, task.budget_s, task.sign) == ("my-project", 300, 1)


def test_keys_that_are_not_needed_have_defaults() -> None:
    task = parse_task(SMALL, "x")
    assert (task.immutable_files, task.eval_command, task.branch_prefix, task.rules) == ((), None, "autoresearch", ())
    assert (task.ratchet.policy, task.ratchet.rerun_after, task.profile, task.rungs) == ("rerun-best", 8, None, ())


def test_higher_is_better_turns_the_sign() -> None:
    task = parse_task(SMALL, "x")
    assert (task.sign, task.budget_s) == (-1, 30)


def test_search_space_ratchet_and_rungs_are_read() -> None:
    task = parse_task(
        SMALL
        + "search_space: {LR: {low: 0.01, high: 1, log: true}, PATTERN: {choices: [SL, 2, 0.5, true]}}\n"
        + "ratchet: {policy: strict, sigma_per_gb: 0}\n"
        + "rungs: [{name: big, set: {DEPTH: 12, NAME: x}, budget_minutes: 10, needs: {memory_gb: 40}}]\n",
        "x",
    )
    assert (task.search_space["LR"].low, task.search_space["LR"].high, task.search_space["LR"].log) == (0.01, 1, True)
    choices = task.search_space["PATTERN"].choices
    assert choices is not None
    assert [(type(c), c) for c in choices] == [(str, "SL"), (int, 2), (float, 0.5), (bool, True)]
    assert (task.ratchet.policy, task.ratchet.sigma_per_gb) == ("strict", 0)
    assert (task.rungs[0].set, task.rungs[0].needs) == ({"DEPTH": 12, "NAME": "x"}, {"memory_gb": 40})


def test_a_folder_may_be_immutable(tmp_path: Path) -> None:
    (tmp_path / "prepare").mkdir()
    write(tmp_path, SMALL + "immutable_files: [prepare]\n", "a.py")
    assert load_task(tmp_path).immutable_files == ("prepare",)


def test_a_link_is_no_mutable_file(tmp_path: Path) -> None:
    """What is written through it would be another file than what git commits."""
    write(tmp_path, SMALL, "real.py")
    (tmp_path / "a.py").symlink_to("real.py")
    with pytest.raises(BadInput, match=r"mutable_files: 'a\.py' is no plain file"):
        load_task(tmp_path)


@pytest.mark.parametrize("name", ["./a.py", "a.py/", ".//a.py"])
def test_a_name_is_the_same_however_it_is_written(tmp_path: Path, name: str) -> None:
    write(tmp_path, SMALL.replace("[a.py]", f"[{name}]"), "a.py")
    assert load_task(tmp_path).mutable_files == ("a.py",)


# -- what does not: keys and values


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SMALL + "budget_minuts: 5\n", "budget_minuts: unknown key; did you mean 'budget_minutes'?"),
        (SMALL + "immutable_file: [b.py]\n", "immutable_file: unknown key; did you mean 'immutable_files'?"),
        (SMALL + "ratchet: {equal_withn: 1}\n", "ratchet.equal_withn: unknown key; did you mean 'equal_within'?"),
        (
            SMALL + "search_space: {LR: {choises: [1]}}\n",
            "search_space.LR.choises: unknown key; did you mean 'choices'?",
        ),
        (SMALL + "rungs: [{name: b, set: {}, need: {}}]\n", "rungs.0.need: unknown key; did you mean 'needs'?"),
    ],
)
def test_an_unknown_key_is_named_with_the_likeliest_known_one(config: str, message: str) -> None:
    assert complaint(config) == message


def test_an_unknown_key_like_no_other_is_answered_with_the_known_ones() -> None:
    message = complaint(SMALL + "qqq: 1\n")
    assert message.startswith("qqq: unknown key; known: ")
    assert all(key in message for key in TaskSpec.model_fields)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("budget_minutes", "budget_minuts"), ("metric_direction", "direction_metric"), ("mutable_files", "mutable_file")],
)
def test_a_misspelt_needed_key_is_named_not_only_missed(right: str, wrong: str) -> None:
    # Was: only `budget_minutes: missing` is said, to someone who is looking at his `budget_minuts: 5`.
    message = complaint(SMALL.replace(f"{right}:", f"{wrong}:"))
    assert message.startswith(f"{wrong}: unknown key")
    assert right in message


@pytest.mark.parametrize(
    "key", ["name", "metric", "metric_direction", "mutable_files", "run_command", "budget_minutes"]
)
def test_a_missing_key_is_named(key: str) -> None:
    assert complaint(without(key)) == f"{key}: missing"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "''"),
        ("name", "5"),
        ("name", "null"),
        ("name", "[a]"),
        ("metric", "''"),
        ("metric", "{a: b}"),
        ("metric_direction", "min"),
        ("metric_direction", "Minimize"),
        ("metric_direction", "minimise"),
        ("metric_direction", "lower"),
        ("metric_direction", "true"),
        ("mutable_files", "a.py"),
        ("mutable_files", "[]"),
        ("mutable_files", "[1]"),
        ("mutable_files", "null"),
        ("mutable_files", "{a.py: 1}"),
        ("immutable_files", "b.py"),
        ("run_command", "''"),
        ("run_command", "[python, train.py]"),
        ("eval_command", "5"),
        ("budget_minutes", "0"),
        ("budget_minutes", "-1"),
        ("budget_minutes", "five"),
        ("budget_minutes", "5 min"),
        ("budget_minutes", "null"),
        ("budget_minutes", "[5]"),
        ("budget_minutes", ".nan"),
        # Was: an infinite budget never ends a run.
        ("budget_minutes", ".inf"),
        ("branch_prefix", "a/b"),
        ("branch_prefix", "''"),
        ("branch_prefix", "-x"),
        ("rules", "be nice"),
        ("search_space", "[LR]"),
        ("ratchet", "strict"),
        ("rungs", "{name: x}"),
        ("memory_limit_gb", "0"),
        ("sampler", "random"),
        ("train_shards", "0"),
        ("train_shards", "1.5"),
        ("profile", "h200"),
        ("profile", "[h100]"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(key: str, value: str) -> None:
    assert complaint(without(key) + f"{key}: {value}\n").startswith(key)


def test_a_wrong_direction_is_answered_with_the_right_ones() -> None:
    message = complaint(SMALL.replace("maximize", "maximise"))
    assert message.startswith("metric_direction: ")
    assert all(word in message for word in ("'minimize'", "'maximize'", "'maximise'"))


def test_an_unknown_profile_is_answered_with_the_known_ones() -> None:
    assert complaint(SMALL + "profile: h200\n") == "profile is 'h200': one of h100, apple, tiny"


@pytest.mark.parametrize(
    ("inner", "key"),
    [
        ("ratchet: {policy: greedy}", "ratchet.policy"),
        ("ratchet: {baseline_runs: 0}", "ratchet.baseline_runs"),
        ("ratchet: {sigma_per_node: -1}", "ratchet.sigma_per_node"),
        ("search_space: {LR: 5}", "search_space.LR"),
        ("search_space: {LR: {}}", "search_space.LR"),
        ("search_space: {LR: {low: 1}}", "search_space.LR"),
        ("search_space: {LR: {choices: []}}", "search_space.LR"),
        ("search_space: {LR: {low: 1, high: 2, choices: [1]}}", "search_space.LR"),
        ("search_space: {LR: {low: 2, high: 1}}", "search_space.LR"),
        ("search_space: {LR: {low: 0, high: 1, log: true}}", "search_space.LR"),
        ("search_space: {LR: {low: a, high: 1}}", "search_space.LR.low"),
        # Was: half a range beside choices is silently ignored.
        ("search_space: {LR: {low: 1, choices: [1]}}", "search_space.LR"),
        ("rungs: [{set: {DEPTH: 4}}]", "rungs.0.name"),
        ("rungs: [{name: a, set: {}}, {name: b}]", "rungs.1.set"),
        ("rungs: [{name: a, set: {}, budget_minutes: 0}]", "rungs.0.budget_minutes"),
        ("rungs: [{name: a, set: {}, needs: {memory_gb: much}}]", "rungs.0.needs.memory_gb"),
        # Was: said to be `rungs.0.set.DEPTH.bool`, a key that nobody wrote.
        ("rungs: [{name: a, set: {DEPTH: [4]}}]", "rungs.0.set.DEPTH"),
    ],
)
def test_a_wrong_inner_value_is_named_with_the_way_to_it(inner: str, key: str) -> None:
    assert complaint(f"{SMALL}{inner}\n").startswith(f"{key}: ")


@pytest.mark.parametrize("inner", ["low: .nan, high: 1", "low: 0, high: .inf", "low: 0, high: .nan"])
def test_a_range_is_finite(inner: str) -> None:
    # Was: infinity is a bound like any other, and nan is neither below nor above anything.
    assert complaint(f"{SMALL}search_space: {{LR: {{{inner}}}}}\n").startswith("search_space.LR")


# -- what does not: the file


@pytest.mark.parametrize(
    "config",
    [
        "a: b: c",
        "name: [unclosed",
        "\tname: x",
        "a: 'x",
        "a: &b\n  c: *nothing",
        "\x00",
        "? [1]\n: 2",
        "!!python/object:os.system {}",
        # Was: PyYAML builds these values itself and lets a ValueError through.
        "name: 2024-13-45",
        "name: 0b_",
        # Was: PyYAML recurses once for each bracket: RecursionError.
        "[" * 3000,
    ],
)
def test_what_is_no_yaml_is_said_so(config: str) -> None:
    assert complaint(config).startswith("not YAML: ")


@pytest.mark.parametrize(
    ("config", "kind"), [("", "NoneType"), ("# only a comment\n", "NoneType"), ("- a\n", "list"), ("word", "str")]
)
def test_what_is_no_mapping_is_said_so(config: str, kind: str) -> None:
    assert complaint(config) == f"expected a mapping of keys to values, found {kind}"


@pytest.mark.parametrize("key", ["1", '"a\\nb"', "null"])  # Was: a newline in the key is a newline in the message
def test_a_key_that_is_no_name_is_refused_in_one_line(key: str) -> None:
    assert complaint(f"{SMALL}{key}: 1\n")


def test_a_missing_config_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        load_task(tmp_path)
    assert said(caught.value, str(tmp_path / CONFIG_NAME)).startswith("missing; make one with `swarm init")


@pytest.mark.parametrize("content", [b"name: \xff\xfe\n", None], ids=["not UTF-8", "a folder"])
def test_a_config_that_cannot_be_read_is_bad_input(tmp_path: Path, content: bytes | None) -> None:
    # Was: UnicodeDecodeError and IsADirectoryError come through (PermissionError would, too).
    path = tmp_path / CONFIG_NAME
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        load_task(tmp_path)
    assert said(caught.value, str(path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("name: x\n", "metric: missing"),
        (SMALL + "qq: 1\n", "qq: unknown key"),
        ("[", "not YAML"),
        ("", "expected a mapping"),
    ],
)
def test_a_wrong_config_is_named_by_its_path(tmp_path: Path, config: str, message: str) -> None:
    path = write(tmp_path, config, "a.py")
    with pytest.raises(BadInput) as caught:
        load_task(tmp_path)
    assert said(caught.value, str(path)).startswith(message)


@pytest.mark.parametrize(
    ("lines", "key", "name"),
    [
        ("mutable_files: [gone.py]\n", "mutable_files", "gone.py"),
        ("mutable_files: [a.py, gone.py]\n", "mutable_files", "gone.py"),
        ("mutable_files: [a.py]\nimmutable_files: [gone.py]\n", "immutable_files", "gone.py"),
        ("mutable_files: [../beside.py]\n", "mutable_files", "../beside.py"),
        ("mutable_files: [a.py]\nimmutable_files: [../beside.py]\n", "immutable_files", "../beside.py"),
        ("mutable_files: [/etc/passwd]\n", "mutable_files", "/etc/passwd"),
        ("mutable_files: [link.py]\n", "mutable_files", "link.py"),
        ("mutable_files: [a.py]\nimmutable_files: [a.py]\n", "immutable_files", "a.py"),
        # Was: a folder passes for a mutable file; reading it later is an IsADirectoryError.
        ("mutable_files: [folder]\n", "mutable_files", "folder"),
        ("mutable_files: ['']\n", "mutable_files", ""),
        # Was: names are compared as written.
        ("mutable_files: [a.py]\nimmutable_files: [./a.py]\n", "immutable_files", "a.py"),
        ("mutable_files: [folder/b.py]\nimmutable_files: [folder]\n", "immutable_files", "folder"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path: Path, lines: str, key: str, name: str) -> None:
    (tmp_path / "beside.py").write_text("x = 1\n")
    folder = tmp_path / "task"
    (folder / "folder").mkdir(parents=True)
    (folder / "folder" / "b.py").write_text("x = 1\n")
    (folder / "link.py").symlink_to(tmp_path / "beside.py")
    path = write(folder, without("mutable_files") + lines, "a.py")
    with pytest.raises(BadInput) as caught:
        load_task(folder)
    message = said(caught.value, str(path))
    assert message.startswith(f"{key}: ")
    assert name in message
