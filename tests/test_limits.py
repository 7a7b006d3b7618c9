"""Budgets and depth: what is spent below is spent above, and nobody has more than what is left above."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import (
    BudgetExceededError,
    DepthLimitError,
    LimitError,
    RunCancelledError,
    RunTimeoutError,
    UnknownCostError,
)
from orchestrator.limits import Budget, Limits, Spent, check_depth, refuse_unknown_cost
from orchestrator.pricing import BATCH_DISCOUNT, calculate_cost, estimate_usd, has_price

DIMENSIONS = ("usd", "tokens", "turns", "runs")
# Cents in sixty-fourths: floats add up exactly, so that sums may be compared.
money = st.integers(0, 64_000).map(lambda sixty_fourths: sixty_fourths / 64)
counts = st.integers(0, 100_000)
limits: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {}, optional={"usd": money, "tokens": counts, "turns": st.integers(0, 6), "runs": st.integers(0, 6)}
)


@st.composite
def trees(draw: st.DrawFn) -> list[Budget]:
    """Budgets, each below one that comes before it, or below none."""
    budgets: list[Budget] = []
    for _ in range(draw(st.integers(1, 8))):
        parent = draw(st.sampled_from([None, *budgets])) if budgets else None
        budgets.append(Budget(**draw(limits), parent=parent))
    return budgets


def spending(tree: list[Budget], data: st.DataObject) -> Iterator[tuple[Budget, dict[str, Any]]]:
    """Runs of the tree say, again and again, what they have used in all: more, or less than was estimated."""
    figures = st.fixed_dictionaries({"usd": money, "tokens": counts, "turns": st.integers(0, 9)})
    for _ in range(data.draw(st.integers(0, 12))):
        yield data.draw(st.sampled_from(tree)), data.draw(figures)


# -- the tree -----------------------------------------------------------------------------------------------


@given(tree=trees(), data=st.data())
@settings(max_examples=75, deadline=None)
def test_a_child_never_has_more_than_its_parent_has_left(tree: list[Budget], data: st.DataObject) -> None:
    for run, figures in spending(tree, data):
        run.settle(**figures)
        for budget in tree:
            for name in DIMENSIONS:
                left, limit = getattr(budget.left, name), getattr(budget, name)
                assert left is None or left >= 0
                assert limit is None or left <= limit
                if budget.parent is not None and (over := getattr(budget.parent.left, name)) is not None:
                    assert left <= over


@given(tree=trees(), data=st.data())
@settings(max_examples=75, deadline=None)
def test_what_is_used_below_is_used_everywhere_above_and_nothing_is_lost(
    tree: list[Budget], data: st.DataObject
) -> None:
    said: dict[int, dict[str, Any]] = {}
    for run, figures in spending(tree, data):
        run.settle(**figures)
        said[id(run)] = figures
        for budget in tree:
            below = [said[id(each)] for each in tree if budget in each.chain() and id(each) in said]
            for name in ("usd", "tokens", "turns"):
                total = getattr(budget.spent, name)
                assert total == sum(figures[name] for figures in below) >= 0
                assert getattr(budget.own, name) == said.get(id(budget), {}).get(name, 0)


@given(tree=trees(), data=st.data())
@settings(max_examples=75, deadline=None)
def test_saying_it_again_changes_nothing_and_a_correction_gives_back(
    tree: list[Budget], data: st.DataObject
) -> None:
    run = data.draw(st.sampled_from(tree))
    before = [budget.left for budget in tree]
    run.settle(usd=3.0, tokens=700, turns=2)
    once = [budget.left for budget in tree]
    run.settle(usd=3.0, tokens=700, turns=2)
    assert [budget.left for budget in tree] == once
    run.settle(usd=0.0, tokens=0, turns=0)
    assert [budget.left for budget in tree] == before


@given(tree=trees(), data=st.data())
@settings(max_examples=100, deadline=None)
def test_runs_that_are_checked_go_over_by_one_message_each_at_most(tree: list[Budget], data: st.DataObject) -> None:
    """Runs at work at the same time, in any order; each is checked after each of its messages, then stopped."""
    longest = data.draw(st.integers(1, 5000))
    working = [budget for budget in tree if may_start(budget)]
    at_work = len(working)
    for _ in range(40):
        if not working:
            break
        run = data.draw(st.sampled_from(working))
        tokens = data.draw(st.integers(0, longest))
        run.charge(tokens / 1024, tokens=tokens, turns=1)
        if not goes_on(run):
            working.remove(run)
    for budget in tree:
        for name, most in (("usd", longest / 1024), ("tokens", longest), ("turns", 1)):
            if (limit := getattr(budget, name)) is not None:
                assert getattr(budget.spent, name) <= limit + most * at_work


def may_start(budget: Budget) -> bool:
    try:
        budget.check_start()
    except BudgetExceededError:
        return False
    return True


def goes_on(budget: Budget) -> bool:
    try:
        budget.check()
    except BudgetExceededError:
        return False
    return True


@given(tree=trees(), data=st.data())
@settings(max_examples=100, deadline=None)
def test_check_refuses_exactly_what_is_used_up_and_names_the_nearest_owner(
    tree: list[Budget], data: st.DataObject
) -> None:
    for run, figures in spending(tree, data):
        run.settle(**figures)
    for budget in tree:
        used_up = [
            (name, each)
            for each in budget.chain()
            for name in ("usd", "tokens", "turns")
            if (limit := getattr(each, name)) is not None
            and (spent := getattr(each.spent, name)) >= limit
            and not (name == "turns" and spent == limit > 0)
        ]
        if not used_up:
            budget.check()
            continue
        with pytest.raises(BudgetExceededError, match="budget used up") as caught:
            budget.check()
        name, owner = used_up[0]
        assert caught.value.details == {
            "dimension": name,
            "limit": getattr(owner, name),
            "spent": getattr(owner.spent, name),
        }


def test_siblings_share_what_their_parent_has() -> None:
    plan = Budget(1.0)
    first, second = Budget(0.9, parent=plan), Budget(0.9, parent=plan)
    first.charge(0.75)
    assert second.left.usd == 0.25
    second.charge(0.25)
    with pytest.raises(BudgetExceededError, match=r"\$1\.0000 spent of \$1\.0000"):
        first.check()


def test_nothing_limits_a_budget_without_limit() -> None:
    budget = Budget(parent=Budget())
    budget.charge(1e9, tokens=10**12, turns=10**6, runs=10**6)
    budget.check(now=1e9)
    assert budget.left == Limits()


@pytest.mark.parametrize("name", ["usd", "tokens", "turns"])
def test_zero_is_none_at_all(name: str) -> None:
    nothing: dict[str, Any] = {name: 0}
    for budget in (Budget(**nothing), Budget(5.0, parent=Budget(**nothing))):
        for check in (budget.check, budget.check_start):
            with pytest.raises(BudgetExceededError) as caught:
                check()
            assert caught.value.details == {"dimension": name, "limit": 0, "spent": 0}
            assert caught.value.exit_code == 4
            assert isinstance(caught.value, LimitError)


# -- turns, runs, depth, time -------------------------------------------------------------------------------


def test_the_last_turn_allowed_may_be_answered_and_no_other_begun() -> None:
    budget = Budget(turns=2)
    budget.charge(turns=2)
    budget.check()
    with pytest.raises(BudgetExceededError, match="2 turns spent of 2"):
        Budget(parent=budget).check_start()
    budget.charge(turns=1)
    with pytest.raises(BudgetExceededError, match="3 turns spent of 2"):
        budget.check()


@given(most=st.integers(0, 5), tries=st.integers(0, 8), nested=st.lists(st.booleans(), min_size=8, max_size=8))
@settings(max_examples=100, deadline=None)
def test_no_more_runs_start_below_one_than_it_may_have(most: int, tries: int, nested: list[bool]) -> None:
    top = Budget(runs=most)
    top.start()
    started = [top]
    for index in range(tries):
        child = Budget(parent=started[-1] if nested[index] else top)
        if len(started) <= most:
            child.start()
            started.append(child)
            continue
        with pytest.raises(BudgetExceededError) as caught:
            child.start()
        assert caught.value.details == {"dimension": "runs", "limit": most, "spent": most}
        assert "Do this work yourself" in caught.value.advice
        assert top.left.runs == 0
    assert top.spent.runs == len(started) - 1 == min(most, tries)


def test_a_run_that_was_refused_after_all_leaves_its_place() -> None:
    top = Budget(runs=1)
    first, second = Budget(parent=top), Budget(parent=top)
    first.start()
    with pytest.raises(BudgetExceededError, match="1 runs spent of 1"):
        second.start()
    first.give_back()
    second.start()
    assert top.spent == Spent(runs=1)


def test_a_refused_start_counts_nothing() -> None:
    top = Budget(0, runs=3)
    with pytest.raises(BudgetExceededError):
        Budget(parent=top).start()
    assert top.spent == Spent()


@given(depth=st.integers(0, 10), max_depth=st.integers(0, 10))
def test_depth_is_limited(depth: int, max_depth: int) -> None:
    if depth <= max_depth:
        check_depth(depth, max_depth)
        return
    with pytest.raises(
        DepthLimitError, match=f"limited to {max_depth} levels and this would be level {depth}"
    ) as e:
        check_depth(depth, max_depth)
    assert e.value.details == {"depth": depth, "max_depth": max_depth}
    assert not e.value.retryable


def test_nobody_opens_more_levels_than_those_above_may() -> None:
    top = Budget(max_depth=2)
    child = Budget(max_depth=9, parent=top)
    child.start(depth=2)
    with pytest.raises(DepthLimitError, match="limited to 2 levels"):
        Budget(parent=child).start(depth=3)
    assert top.spent.runs == 1


times = st.integers(0, 1000).map(float)


@given(clocks=st.lists(st.tuples(times, st.none() | times), min_size=1, max_size=5), now=times)
@settings(max_examples=75, deadline=None)
def test_a_childs_time_is_over_when_its_parents_is(clocks: list[tuple[float, float | None]], now: float) -> None:
    budget: Budget | None = None
    for began, timeout in clocks:
        budget = Budget(timeout_s=timeout, began=began, parent=budget)
    assert budget is not None
    ends = [began + timeout for began, timeout in clocks if timeout is not None]
    assert budget.left.deadline == min(ends, default=None)
    if now < min(ends, default=math.inf):
        budget.check(now)
        return
    own = clocks[-1][1] is not None and now >= sum(clocks[-1])  # type: ignore[arg-type]
    with pytest.raises(RunTimeoutError if own else RunCancelledError) as caught:
        budget.check(now)
    assert caught.value.details["kind"] == caught.value.details["dimension"] == "wall"
    assert caught.value.details["spent"] >= caught.value.details["limit"]


def test_time_does_not_run_before_the_work_begins() -> None:
    waiting = Budget(timeout_s=5)
    waiting.check(now=1e6)
    waiting.began = 1e6
    waiting.check(now=1e6 + 4.5)
    with pytest.raises(RunTimeoutError, match="the run took longer than 5 s"):
        waiting.check(now=1e6 + 5)
    with pytest.raises(RunCancelledError, match="a run above, which delegated this one, took longer than 5 s"):
        Budget(parent=waiting).check_start(now=1e6 + 5)


def test_what_is_left_in_another_process_bounds_here() -> None:
    elsewhere = Budget(2.0, tokens=100, turns=3, runs=1, max_depth=4, timeout_s=50, began=1000.0)
    elsewhere.charge(0.5, tokens=40, turns=1)
    above = Budget.of_rest(elsewhere.left, now=1010.0)
    assert above.left == elsewhere.left == Limits(1.5, 60, 2, 1, 4, 1050.0)
    child = Budget(9.0, tokens=1000, parent=above)
    child.start(depth=2, now=1010.0)
    assert child.left == Limits(1.5, 60, 2, 0, 4, 1050.0)
    assert Budget.of_rest(Limits(), now=1010.0).left == Limits()


# -- costs that are not known -------------------------------------------------------------------------------


def test_an_unknown_cost_is_refused_only_where_asked_for_and_money_is_limited() -> None:
    limited = Budget(parent=Budget(1.0))
    with pytest.raises(UnknownCostError, match="'mine' has no known price") as caught:
        refuse_unknown_cost(limited, "mine", "refuse")
    assert caught.value.code == "unknown_cost"
    assert "limits.on_unknown_cost" in caught.value.advice
    refuse_unknown_cost(limited, "mine", "allow")
    refuse_unknown_cost(Budget(tokens=5, parent=Budget(turns=1)), "mine", "refuse")


# -- list prices --------------------------------------------------------------------------------------------


def test_list_prices_count_every_kind_of_token() -> None:
    usage = {"input_tokens": 1000, "output_tokens": 1000}
    plain = estimate_usd("claude-sonnet-4-5", usage)
    assert plain is not None
    assert plain == pytest.approx(0.003 + 0.015)
    cached = estimate_usd("claude-sonnet-4-5", {**usage, "cache_read_input_tokens": 1000})
    written = estimate_usd("claude-sonnet-4-5", {**usage, "cache_creation_input_tokens": 1000})
    assert cached == pytest.approx(plain + 0.0003)
    assert written == pytest.approx(plain + 0.00375)


def test_what_the_cache_keeps_for_an_hour_costs_more() -> None:
    kept = {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 1000}
    usage = {"input_tokens": 0, "output_tokens": 0, "cache_creation_input_tokens": 1000}
    assert estimate_usd("claude-sonnet-4-5", usage) == pytest.approx(0.00375)
    assert estimate_usd("claude-sonnet-4-5", {**usage, "cache_creation": kept}) == pytest.approx(0.006)


def test_the_cost_of_tokens_can_be_asked_for() -> None:
    assert calculate_cost("claude-sonnet-4-5", 1000, 500) == pytest.approx(0.0105)
    cached = calculate_cost("claude-sonnet-4-5", 1000, 500, cache_read_tokens=10_000, cache_write_tokens=1000)
    assert cached == pytest.approx(0.0105 + 0.003 + 0.00375)
    assert calculate_cost("claude-sonnet-4-5", 1000, 500, batch=True) == pytest.approx(0.0105 * BATCH_DISCOUNT)
    assert calculate_cost("my-own-model", 1000, 500) is None
    assert calculate_cost("my-own-model", 1000, 500, batch=True) is None


@given(tokens=st.tuples(*[st.integers(0, 10_000)] * 4))
@settings(max_examples=50, deadline=None)
def test_more_tokens_never_cost_less(tokens: tuple[int, int, int, int]) -> None:
    def cost(given_: list[int]) -> float:
        price = calculate_cost(
            "claude-sonnet-4-5", given_[0], given_[1], cache_read_tokens=given_[2], cache_write_tokens=given_[3]
        )
        assert price is not None
        return price

    for index in range(4):
        more = list(tokens)
        more[index] += 1000
        assert cost(more) > cost(list(tokens)) >= 0


def test_prices_that_rise_with_length_are_taken_at_the_length() -> None:
    short, long = calculate_cost("claude-haiku-5-5", 50_000, 0), calculate_cost("claude-haiku-5-5", 200_000, 0)
    assert short is not None
    assert long is not None
    assert long > 4 * short


@pytest.mark.parametrize(
    "name",
    ["claude-sonnet-4-5[1m]", "anthropic/claude-sonnet-4-5", "CLAUDE-SONNET-4-5", "claude-sonnet-4-5@20250929"],
)
def test_other_spellings_of_a_models_name_cost_the_same(name: str) -> None:
    usage = {"input_tokens": 1000, "output_tokens": 10}
    assert estimate_usd(name, usage) == estimate_usd("claude-sonnet-4-5", usage)


def test_amazons_names_have_amazons_prices() -> None:
    price = estimate_usd(
        "us.anthropic.claude-sonnet-4-5-20250929-v1:0", {"input_tokens": 1000, "output_tokens": 500}
    )
    assert price == pytest.approx(0.0105, rel=0.15), "the list adds a tenth for a region"


@pytest.mark.parametrize("model", ["my-own-model", "", "None", "<synthetic>", "gpt-5", "[1m]", "claude-sonnet-9-9"])
def test_a_model_without_a_known_price_has_none(model: str) -> None:
    assert estimate_usd(model, {"input_tokens": 1000, "output_tokens": 10}) is None
    assert has_price(model) is False


@pytest.mark.parametrize("model", [None, "opus", "sonnet", "haiku", "sonnet[1m]", "inherit", "default"])
def test_which_model_an_alias_means_shows_when_it_runs(model: str | None) -> None:
    assert has_price(model) is None


def test_a_price_that_is_known_is_known() -> None:
    assert has_price("claude-opus-5-5") is has_price("claude-opus-5-5[1m]") is True


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**12) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@given(
    usage=st.dictionaries(
        st.sampled_from(["input_tokens", "output_tokens", "cache_read_input_tokens", "server_tool_use", "x"]),
        json_values,
    )
)
@settings(max_examples=75, deadline=None)
def test_usage_of_any_shape_gives_a_price_or_none(usage: dict[str, object]) -> None:
    price = estimate_usd("claude-sonnet-4-5", usage)
    assert price is None or math.isfinite(price)
