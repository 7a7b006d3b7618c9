"""Budgets and depth: pure, decided before anything is spent and again with every message that carries usage.

Budgets form a tree as runs do. What a run uses is charged to it and to every run above it, so nobody can have more
than what is left above. A limit of None is no limit of one's own; 0 is none at all. The check comes after the
message that tells of the spending: each run at work may go over by the one message it is in, never by two.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self, TypeVar

from orchestrator.config import LimitsConfig
from orchestrator.errors import (
    BudgetExceededError,
    DepthLimitError,
    RunCancelledError,
    RunTimeoutError,
    UnknownCostError,
)

Number = TypeVar("Number", int, float)
Dimension = Literal["usd", "tokens", "turns", "runs"]


class Limits(NamedTuple):
    """What may be used at most, or is left. None: nothing limits it.

    ``usd`` is money. ``tokens`` are all a provider counts, those of its cache too. ``turns`` are model requests,
    from their first byte on; one that broke off and is made again is one. ``runs`` are runs below this one, at any
    depth. ``max_depth`` is the deepest level a run may have (a run nobody delegated has 1). ``deadline`` is in
    seconds of the monotonic clock.
    """

    usd: float | None = None
    tokens: int | None = None
    turns: int | None = None
    runs: int | None = None
    max_depth: int | None = None
    deadline: float | None = None


@dataclass(slots=True)
class Spent:
    """What has been used, in the units of ``Limits``."""

    usd: float = 0.0
    tokens: int = 0
    turns: int = 0
    runs: int = 0


@dataclass(slots=True, eq=False)
class Budget:
    """What a run and everything below it may use: the dimensions of ``Limits``, of its own and from above.

    ``timeout_s`` counts from ``began``, which is set when the run gets to work. ``spent`` has what this run and
    all below it have used; ``own`` what of that is its own (runs: how many it has started itself).
    """

    usd: float | None = None
    tokens: int | None = field(default=None, kw_only=True)
    turns: int | None = field(default=None, kw_only=True)
    runs: int | None = field(default=None, kw_only=True)
    max_depth: int | None = field(default=None, kw_only=True)
    timeout_s: float | None = field(default=None, kw_only=True)
    began: float | None = field(default=None, kw_only=True)
    parent: "Budget | None" = field(default=None, kw_only=True)
    spent: Spent = field(default_factory=Spent, init=False)
    own: Spent = field(default_factory=Spent, init=False)
    _counted: bool = field(default=False, init=False)

    @classmethod
    def of_rest(cls, rest: Limits, now: float) -> Self:
        """The budget of a run that works in another process, by what was left of it at ``now``."""
        began, timeout = (now, rest.deadline - now) if rest.deadline is not None else (None, None)
        return cls(
            rest.usd, tokens=rest.tokens, turns=rest.turns, runs=rest.runs, max_depth=rest.max_depth,
            timeout_s=timeout, began=began,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The limits of its own, as keyword arguments for another one like it."""
        names = ("usd", "tokens", "turns", "runs", "max_depth", "timeout_s")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def chain(self) -> "Iterator[Budget]":
        """This budget and all above it, nearest first."""
        each: Budget | None = self
        while each is not None:
            yield each
            each = each.parent

    @property
    def deadline(self) -> float | None:
        """When the run's own time is over; None before it began, or without a time-out."""
        return None if self.began is None or self.timeout_s is None else self.began + self.timeout_s

    @property
    def left(self) -> Limits:
        """What may still be used here: in each dimension the least of what is left here and above."""
        rests = zip(*(_left(each) for each in self.chain()), strict=True)
        return Limits(*map(_least, rests))  # type: ignore[arg-type]  # each stays of its own type

    def charge(self, usd: float = 0.0, *, tokens: int = 0, turns: int = 0, runs: int = 0) -> None:
        """Add what was used, here and above; negative amounts correct what was charged before."""
        self.own.usd += usd
        self.own.tokens += tokens
        self.own.turns += turns
        self.own.runs += runs
        for each in self.chain():
            each.spent.usd += usd
            each.spent.tokens += tokens
            each.spent.turns += turns
            each.spent.runs += runs

    def settle(self, *, usd: float, tokens: int, turns: int) -> None:
        """Say what this run itself has used in all, as known now: an estimate, later its correction."""
        self.charge(usd - self.own.usd, tokens=tokens - self.own.tokens, turns=turns - self.own.turns)

    def check(self, now: float | None = None) -> None:
        """Whether the run may go on.

        Raises BudgetExceededError where something is used up here or above, and what ``check_time`` raises;
        ``details`` has dimension, limit and spent of the nearest such budget.
        """
        for each in self.chain():
            _check_figures(each, starting=False)
            _check_time(each, now, above=each is not self)

    def check_time(self, now: float) -> None:
        """Raises RunTimeoutError where the run's own time is over, RunCancelledError where that of one above is.

        A run above that is out of time cancels what it delegated; which of the two is first must not matter.
        """
        for each in self.chain():
            _check_time(each, now, above=each is not self)

    def check_start(self, depth: int | None = None, now: float | None = None) -> None:
        """Whether the run may begin: something must be left of everything. Raises as ``check`` and ``check_depth``.

        Asked again after ``start``, when the run has waited for its place, the number of runs is no matter.
        """
        if depth is not None and (deepest := self.left.max_depth) is not None:
            check_depth(depth, deepest)
        for each in self.chain():
            _check_figures(each, starting=True)
            _check_time(each, now, above=each is not self)
            if each is not self and not self._counted:
                _check_runs(each)

    def start(self, depth: int | None = None, now: float | None = None) -> None:
        """``check_start``, and count the run above it, in one go: two that start at once cannot take one place."""
        self.check_start(depth, now)
        if self.parent is not None and not self._counted:
            self.parent.charge(runs=1)
            self._counted = True

    def give_back(self) -> None:
        """Undo ``start``, if it was, for a run that was refused after it."""
        if self.parent is not None and self._counted:
            self.parent.charge(runs=-1)
            self._counted = False


def _left(budget: Budget) -> Limits:
    rests = {
        name: max(0, limit - getattr(budget.spent, name))
        for name in ("usd", "tokens", "turns", "runs")
        if (limit := getattr(budget, name)) is not None
    }
    return Limits(**rests, max_depth=budget.max_depth, deadline=budget.deadline)


def _check_figures(budget: Budget, *, starting: bool) -> None:
    spent = budget.spent
    if _used_up(budget.usd, spent.usd):
        figures = f"${spent.usd:.4f} spent of ${budget.usd:.4f}"
        raise _exceeded("usd", budget.usd, round(spent.usd, 6), figures)
    if _used_up(budget.tokens, spent.tokens):
        raise _exceeded("tokens", budget.tokens, spent.tokens)
    # A turn counts from its beginning: the last one allowed may be answered to its end.
    if _used_up(budget.turns, spent.turns if starting or budget.turns == 0 else spent.turns - 1):
        raise _exceeded("turns", budget.turns, spent.turns)


def _check_time(budget: Budget, now: float | None, *, above: bool) -> None:
    if now is None or budget.deadline is None or now < budget.deadline:
        return
    assert budget.began is not None
    limit, spent = budget.timeout_s, round(now - budget.began, 3)
    details = {"kind": "wall", "dimension": "wall", "limit": limit, "spent": spent}
    if above:
        raise RunCancelledError(
            f"a run above, which delegated this one, took longer than {limit:g} s", details=details
        )
    raise RunTimeoutError(f"the run took longer than {limit:g} s", details=details)


def _check_runs(budget: Budget) -> None:
    if _used_up(budget.runs, budget.spent.runs):
        error = _exceeded("runs", budget.runs, budget.spent.runs)
        error.advice = "Do this work yourself instead of delegating it, or raise max_runs."
        raise error


def _least(values: tuple[float | None, ...]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _used_up(limit: float | None, spent: float) -> bool:
    return limit is not None and spent >= limit


def _exceeded(
    dimension: Dimension, limit: float | None, spent: float, figures: str | None = None
) -> BudgetExceededError:
    figures = figures or f"{spent:,} {dimension} spent of {limit:,}"
    return BudgetExceededError(
        f"budget used up: {figures}", details={"dimension": dimension, "limit": limit, "spent": spent}
    )


def budget_of(
    defaults: LimitsConfig,
    parent: Budget | None,
    *,
    depth: int,
    usd: float | None = None,
    tokens: int | None = None,
    turns: int | None = None,
    runs: int | None = None,
    levels: int | None = None,
    timeout_s: float | None = None,
) -> Budget:
    """The budget of a run at ``depth`` that asks for this much. ``levels`` counts the run itself as the first.

    What it does not ask for is the configured default, unless something above limits that already: then what is
    left there is enough of a limit. A plan has depth 0: it makes no requests, so turns are each step's own matter.
    """
    above = parent.left if parent is not None else Limits()
    turns_default = defaults.max_turns if depth > 0 else None
    return Budget(
        _either(usd, above.usd, defaults.budget_usd),
        tokens=_either(tokens, above.tokens, defaults.budget_tokens),
        turns=_either(turns, above.turns, turns_default),
        runs=_either(runs, above.runs, defaults.max_runs),
        max_depth=defaults.max_depth if levels is None else min(defaults.max_depth, depth + levels - 1),
        timeout_s=timeout_s,
        parent=parent,
    )


def _either(asked: Number | None, above: object, default: Number | None) -> Number | None:
    return asked if asked is not None or above is not None else default


def check_depth(depth: int, max_depth: int) -> None:
    """Raises DepthLimitError when a run of ``depth`` (1: nobody delegated it) may not begin."""
    if depth > max_depth:
        raise DepthLimitError(
            f"delegation is limited to {max_depth} levels and this would be level {depth}",
            details={"depth": depth, "max_depth": max_depth},
        )


def refuse_unknown_cost(budget: Budget, model: str, policy: Literal["allow", "refuse"]) -> None:
    """What to do about a model without a known price: nothing, unless money is limited and the policy refuses.

    Raises UnknownCostError.
    """
    if policy == "refuse" and (left := budget.left.usd) is not None:
        raise UnknownCostError(
            f"model {model!r} has no known price, and ${left:.4f} is all this run may spend",
            details={"model": model, "left_usd": round(left, 6)},
        )
