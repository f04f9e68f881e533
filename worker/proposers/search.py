"""`search`: proposes constants without any LLM, by TPE (Optuna) or CMA-ES (cmaes, the library inside Optuna's sampler).

TPE changes one to three constants at a time: small diffs say what helped, and can be carried to another machine. Its
first pass tries each constant once, in the order of the search space, so that the broadest levers come first. CMA-ES
moves all numeric constants at once. Each proposal rebuilds its sampler from the history it is given (at most WINDOW
experiments), so a restart forgets nothing and the cost does not grow with the campaign.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from shared import constants
from shared.pyedit import Constant, EditError, Literal
from shared.task import Range, TaskSpec

from ..journal import Experiment
from ..workspace import Files, code_state
from . import Proposal

WINDOW = 200  #: experiments that a sampler learns from: the best quarter of these, and the latest
ATTEMPTS = 60  #: draws before what is left is looked up in order
ENUMERATED = 64  #: values of a constant that are looked up in order
COMBINATIONS = 20_000  #: combinations looked up before the search says that it has nothing new
CHANGES = (1, 1, 1, 2, 2, 3)  #: how many constants a TPE proposal changes, drawn evenly
FAR = 0.1  #: a number is moved by at least this share of its range: smaller steps drown in the noise
NOT_SEARCHED = frozenset(
    {
        "SEED",
        "MAX_SEQ_LEN",
        "TIME_BUDGET",
        "EVAL_TOKENS",
        "VOCAB_SIZE",
        "MAX_LOSS",
        "GC_EVERY_STEPS",
        "DEVICE_BATCH_SIZE",
    }
)


@dataclass(frozen=True)
class Domain:
    """Where one constant may go. Always holds its present value."""

    file: str
    name: str
    present: Literal
    text: str  #: the present value as written
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Literal, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether only integers are tried: the present value is one, and so are the ends of its range."""
        return isinstance(self.present, int) and float(self.low).is_integer() and float(self.high).is_integer()

    def contains(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        return isinstance(value, int if self.whole else (int, float)) and self.low <= value <= self.high

    def tidy(self, value: float, digits: int = 2) -> Literal:
        """A drawn number as a person would write it: whole, or to about a hundredth of its range, inside the range.

        More digits than 2 where the tidy ones have been tried.
        """
        if self.whole:
            return int(min(max(round(value), self.low), self.high))
        if self.log and self.high > 4 * self.low:
            short = float(f"{value:.{digits}g}")
        else:
            short = round(value, digits - math.ceil(math.log10(self.high - self.low)))
        return float(min(max(short, self.low), self.high))

    def values(self) -> list[Literal]:
        """Everything it can be, where that is a short list; else only what it is."""
        if self.choices:
            return list(self.choices)
        if self.whole and self.high - self.low < ENUMERATED:
            return list(range(int(self.low), int(self.high) + 1))
        return [self.present]


class Search:
    """The proposer without an LLM."""

    name = "search"

    def __init__(self, task: TaskSpec, seed: int) -> None:
        self._task = task
        self._seed = seed

    def params(self, files: Files) -> dict[str, Any]:
        return {domain.name: domain.present for domain in self.space(files)}

    def space(self, files: Files) -> list[Domain]:
        """The constants to search, in the task's order; without a search_space, all numeric ones there are."""
        found = _found(files)
        every: dict[str, Range | None] = {name: None for name in found if name not in NOT_SEARCHED}
        asked = self._task.search_space or every
        domains = []
        for name, given in asked.items():
            if name in found:
                file, constant = found[name]
                if domain := _domain(file, constant, given):
                    domains.append(domain)
        return domains

    def propose(self, files: Files, history: Sequence[Experiment]) -> Proposal | None:
        domains = self.space(files)
        if not domains:
            return None
        draw = random.Random(f"{self._seed}-{len(history)}")
        tried_edits = {_key(e.edits) for e in history if e.edits}
        tried_codes = {e.code_state for e in history}
        lessons = _lessons(history, domains, self._task.sign)
        sampler: _Sampler = (
            _CmaEs(domains, lessons, draw) if self._task.sampler == "cmaes" else _Tpe(domains, lessons, draw)
        )
        untried = [d for d in domains if not any(d.name in e.edits for e in history)]
        for attempt in range(ATTEMPTS):
            first = untried[attempt * 2 * len(untried) // ATTEMPTS] if attempt < ATTEMPTS // 2 and untried else None
            if proposal := self._new(files, domains, sampler.draw(first), tried_edits, tried_codes):
                return proposal
        for edits in itertools.chain(_combinations(domains), _anything(domains, draw)):
            if proposal := self._new(files, domains, edits, tried_edits, tried_codes):
                return proposal
        return None

    def _new(
        self,
        files: Files,
        domains: Sequence[Domain],
        edits: Mapping[str, Literal],
        tried_edits: Set[tuple[tuple[str, str], ...]],
        tried_codes: Set[str],
    ) -> Proposal | None:
        """The proposal to make these edits, or None when there is nothing in them or it has been tried."""
        if not edits or _key(edits) in tried_edits:
            return None
        changed = _apply(files, domains, edits)
        if code_state({**files, **changed}) in tried_codes:
            return None
        params = {d.name: edits.get(d.name, d.present) for d in domains}
        return Proposal(_describe(domains, edits, changed), changed, self.name, edits, params)


def _combinations(domains: Sequence[Domain]) -> Iterator[dict[str, Literal]]:
    """What short lists of values there are, changed alone, then two at a time, and so on."""
    short = [d for d in domains if len(d.values()) > 1]
    every = (
        dict(zip((d.name for d in chosen), values, strict=True))
        for count in range(1, len(short) + 1)
        for chosen in itertools.combinations(short, count)
        for values in itertools.product(*([v for v in d.values() if v != d.present] for d in chosen))
    )
    return itertools.islice(every, COMBINATIONS)


def _anything(domains: Sequence[Domain], draw: random.Random) -> Iterator[dict[str, Literal]]:
    """Random changes in finer steps than a sampler's tidy ones, where a constant is continuous."""
    continuous = [d for d in domains if not d.choices and not d.whole]
    for _ in range(ATTEMPTS if continuous else 0):
        free = {draw.choice(continuous), *draw.sample(domains, draw.randint(0, len(domains) - 1))}
        drawn = {
            d: draw.choice(d.values()) if d.choices or d.whole else _value(d, draw.random(), digits=4)
            for d in domains
            if d in free
        }
        yield {d.name: value for d, value in drawn.items() if value != d.present}


def _found(files: Files) -> dict[str, tuple[str, Constant]]:
    """Each constant with its file; a file that does not parse has none (its run will say why)."""
    found = {}
    for file, text in files.items():
        with contextlib.suppress(EditError):
            found.update({name: (file, constant) for name, constant in constants.find(file, text).items()})
    return found


def unknown_constants(task: TaskSpec, files: Files) -> str | None:
    """What is wrong with the names in the task's search_space, in words; None when each is a constant."""
    found = _found(files)
    for name in task.search_space if found else ():
        if name not in found:
            close = difflib.get_close_matches(name, found, n=1)
            where = ", ".join(files)
            return f"{name}: no constant of that name in {where}" + (f"; did you mean {close[0]!r}?" if close else "")
    return None


def _domain(file: str, constant: Constant, given: Range | None) -> Domain | None:
    value = constant.value
    where = (file, constant.name, value, constant.text)
    if given is not None and given.choices is not None:
        choices = given.choices if value in given.choices else (*given.choices, value)
        return Domain(*where, choices=tuple(choices)) if len(choices) > 1 else None
    if isinstance(value, (str, bool)):
        return None
    if given is not None and given.low is not None and given.high is not None:
        return Domain(*where, low=min(given.low, value), high=max(given.high, value), log=given.log and value > 0)
    if isinstance(value, int) and value >= 8 and value & (value - 1) == 0:
        return Domain(*where, choices=tuple(value * 2**step // 4 for step in range(5)))
    if value > 0:
        low, high = (max(1, value // 2), value * 2) if isinstance(value, int) else (value / 4, value * 4)
        return Domain(*where, low=low, high=high, log=isinstance(value, float))
    return Domain(*where, low=0.0, high=0.1) if value == 0 and isinstance(value, float) else None


def _apply(files: Files, domains: Sequence[Domain], edits: Mapping[str, Literal]) -> dict[str, str]:
    changed: dict[str, str] = {}
    for file in {d.file for d in domains if d.name in edits}:
        mine = {d.name: edits[d.name] for d in domains if d.file == file and d.name in edits}
        changed[file] = constants.set_values(file, files[file], mine)
    return changed


def _describe(domains: Sequence[Domain], edits: Mapping[str, Literal], changed: Files) -> str:
    after = {name: c.text for file, text in changed.items() for name, c in constants.find(file, text).items()}
    return "; ".join(f"{d.name} {d.text} -> {after[d.name]}" for d in domains if d.name in edits)


def _key(edits: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, repr(value)) for name, value in edits.items()))


@dataclass(frozen=True)
class _Lesson:
    params: dict[str, Any]
    loss: float | None  #: lower is better whatever the task's direction; None where there was no score


def _lessons(history: Sequence[Experiment], domains: Sequence[Domain], sign: int) -> list[_Lesson]:
    """What the sampler learns from: the experiments whose constants all lie in today's space, at most WINDOW."""
    usable = [
        _Lesson(
            {d.name: e.params[d.name] for d in domains},
            sign * math.fsum(e.scores) / len(e.scores) if e.scores else None,
        )
        for e in history
        if e.status is not None and all(d.contains(e.params.get(d.name)) for d in domains)
    ]
    if len(usable) <= WINDOW:
        return usable
    order = sorted(range(len(usable)), key=lambda i: math.inf if (loss := usable[i].loss) is None else loss)
    best = set(order[: WINDOW // 4])
    latest = [i for i in range(len(usable) - 1, -1, -1) if i not in best][: WINDOW - len(best)]
    return [usable[i] for i in sorted(best | set(latest))]


class _Sampler:
    def __init__(self, domains: Sequence[Domain], lessons: Sequence[_Lesson], draw: random.Random) -> None:
        self._domains, self._lessons, self._draw = domains, lessons, draw

    def draw(self, first: Domain | None) -> dict[str, Literal]:
        """Values that differ from the present ones; of `first` alone where it is given."""
        raise NotImplementedError

    def _edits(self, values: Mapping[str, Literal]) -> dict[str, Literal]:
        return {d.name: values[d.name] for d in self._domains if d.name in values and values[d.name] != d.present}


class _Tpe(_Sampler):
    def __init__(self, domains: Sequence[Domain], lessons: Sequence[_Lesson], draw: random.Random) -> None:
        super().__init__(domains, lessons, draw)
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self._optuna = optuna
        self._distributions: dict[str, Any] = {d.name: self._distribution(d) for d in domains}
        self._base = optuna.samplers.TPESampler(seed=draw.randrange(2**31), n_startup_trials=len(domains))
        self._study = optuna.create_study(sampler=self._base)
        self._study.add_trials([self._trial(lesson) for lesson in lessons])

    def _distribution(self, domain: Domain) -> Any:
        kinds = self._optuna.distributions
        if domain.choices:
            return kinds.CategoricalDistribution(domain.choices)
        if domain.whole:
            return kinds.IntDistribution(math.ceil(domain.low), math.floor(domain.high), log=domain.log)
        return kinds.FloatDistribution(domain.low, domain.high, log=domain.log)

    def _trial(self, lesson: _Lesson) -> Any:
        """A crash is a pruned trial without a value, which TPE takes for worse than any score."""
        state = self._optuna.trial.TrialState
        return self._optuna.trial.create_trial(
            params=lesson.params,
            distributions=self._distributions,
            value=lesson.loss,
            state=state.PRUNED if lesson.loss is None else state.COMPLETE,
        )

    def draw(self, first: Domain | None) -> dict[str, Literal]:
        if first is not None:
            free = [first]
        else:
            free = self._draw.sample(self._domains, min(self._draw.choice(CHANGES), len(self._domains)))
        names = {d.name for d in free}
        fixed = {d.name: d.present for d in self._domains if d.name not in names}
        self._study.sampler = self._optuna.samplers.PartialFixedSampler(fixed, self._base)
        trial = self._study.ask(self._distributions)
        self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)  # a draw, no result
        drawn = {d.name: trial.params[d.name] if d.choices else d.tidy(trial.params[d.name]) for d in free}
        far = all(d.choices or d.whole or abs(_unit(d, drawn[d.name]) - _unit(d, d.present)) >= FAR for d in free)
        return self._edits(drawn) if far else {}


class _CmaEs(_Sampler):
    """All numeric constants at once, in a unit cube; constants with choices of other kinds stay as they are."""

    def __init__(self, domains: Sequence[Domain], lessons: Sequence[_Lesson], draw: random.Random) -> None:
        super().__init__(domains, lessons, draw)
        import cmaes
        import numpy as np

        self._numeric = [d for d in domains if not d.choices or all(not isinstance(c, (str, bool)) for c in d.choices)]
        self._cma: Any = None
        if len(self._numeric) < 2:
            return
        start = np.array([_unit(d, d.present) for d in self._numeric])
        bounds = np.array([[0.0, 1.0]] * len(self._numeric))
        self._cma = cmaes.CMA(mean=start, sigma=0.15, bounds=bounds, seed=draw.randrange(2**31))
        worst = max((lesson.loss for lesson in lessons if lesson.loss is not None), default=0.0)
        told = [
            (
                np.array([_unit(d, lesson.params[d.name]) for d in self._numeric]),
                worst if lesson.loss is None else lesson.loss,
            )
            for lesson in lessons
        ]
        size = self._cma.population_size
        for generation in range(len(told) // size):
            self._cma.tell(told[generation * size : (generation + 1) * size])

    def draw(self, first: Domain | None) -> dict[str, Literal]:
        if self._cma is None:  # one dimension: nothing for CMA-ES to adapt
            domain = self._draw.choice(self._domains)
            if domain.choices:
                return self._edits({domain.name: self._draw.choice(domain.choices)})
            return self._edits({domain.name: _value(domain, self._draw.random())})
        return self._edits({d.name: _value(d, float(x)) for d, x in zip(self._numeric, self._cma.ask(), strict=True)})


def _unit(domain: Domain, value: Any) -> float:
    """The value's place in its domain, 0 to 1."""
    if domain.choices:
        ordered = sorted(domain.choices)  # numbers only
        return ordered.index(value) / (len(ordered) - 1)
    low, high, at = domain.low, domain.high, float(value)
    if domain.log:
        low, high, at = math.log(low), math.log(high), math.log(at)
    return (at - low) / (high - low) if high > low else 0.5


def _value(domain: Domain, place: float, digits: int = 2) -> Literal:
    if domain.choices:
        ordered = sorted(domain.choices)  # numbers only
        return ordered[round(place * (len(ordered) - 1))]
    if domain.log:
        return domain.tidy(
            math.exp(math.log(domain.low) + place * (math.log(domain.high) - math.log(domain.low))), digits
        )
    return domain.tidy(domain.low + place * (domain.high - domain.low), digits)
