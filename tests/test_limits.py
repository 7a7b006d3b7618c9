"""Budgets and depth: what is spent below is spent above, and nobody has more than what is left above."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import BudgetExceededError, DepthLimitError, LimitError
from orchestrator.limits import Budget, check_depth
from orchestrator.pricing import estimate_usd

money = st.floats(0, 1000, allow_nan=False)
limits = st.none() | money


@st.composite
def trees(draw: st.DrawFn) -> list[Budget]:
    """Budgets, each below one that comes before it, or below none."""
    budgets: list[Budget] = []
    for _ in range(draw(st.integers(1, 8))):
        parent = draw(st.sampled_from([None, *budgets])) if budgets else None
        budgets.append(Budget(draw(limits), parent=parent))
    return budgets


def above(budget: Budget) -> list[Budget]:
    """The budget and everything above it, nearest first."""
    return [budget, *(above(budget.parent) if budget.parent else [])]


@given(tree=trees(), data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_child_never_has_more_than_its_parent_has_left(tree: list[Budget], data: st.DataObject) -> None:
    for usd in data.draw(st.lists(st.floats(-10, 200, allow_nan=False), max_size=10)):
        data.draw(st.sampled_from(tree)).charge(usd)
        for budget in tree:
            left = budget.remaining
            assert left is None or left >= 0
            if budget.limit is not None:
                assert left is not None
                assert left <= budget.limit or budget.spent < 0
            if budget.parent is not None and (over := budget.parent.remaining) is not None:
                assert left is not None
                assert left <= over


@given(tree=trees(), data=st.data())
@settings(max_examples=100, deadline=None)
def test_what_is_spent_below_is_spent_everywhere_above(tree: list[Budget], data: st.DataObject) -> None:
    charges = data.draw(st.lists(st.tuples(st.integers(0, len(tree) - 1), st.integers(-50, 500)), max_size=10))
    for index, usd in charges:
        tree[index].charge(usd)
    for budget in tree:
        expected = sum(usd for index, usd in charges if any(each is budget for each in above(tree[index])))
        assert budget.spent == expected


@given(tree=trees(), data=st.data())
@settings(max_examples=150, deadline=None)
def test_check_refuses_exactly_what_is_used_up_and_names_the_nearest_owner(
    tree: list[Budget], data: st.DataObject
) -> None:
    for usd in data.draw(st.lists(money, max_size=6)):
        data.draw(st.sampled_from(tree)).charge(usd)
    for budget in tree:
        owners = [each for each in above(budget) if each.limit is not None and each.spent >= each.limit]
        if not owners:
            budget.check()
            continue
        with pytest.raises(BudgetExceededError) as caught:
            budget.check()
        assert caught.value.details["limit_usd"] == owners[0].limit
        assert caught.value.details["spent_usd"] == round(owners[0].spent, 6)


def test_a_correction_gives_back() -> None:
    plan = Budget(1.0)
    step = Budget(parent=plan)
    step.charge(1.0)
    with pytest.raises(BudgetExceededError, match=r"\$1\.0000 spent of \$1\.0000"):
        step.check()
    step.charge(-0.25)
    step.check()
    assert plan.remaining == step.remaining == 0.25


def test_nothing_limits_a_budget_without_limit() -> None:
    budget = Budget(parent=Budget())
    budget.charge(1e9)
    budget.check()
    assert budget.remaining is None


def test_zero_means_that_nothing_may_be_spent() -> None:
    with pytest.raises(BudgetExceededError) as caught:
        Budget(0).check()
    assert caught.value.exit_code == 4
    assert isinstance(caught.value, LimitError)
    with pytest.raises(BudgetExceededError):
        Budget(5.0, parent=Budget(0)).check()


def test_siblings_share_what_their_parent_has() -> None:
    plan = Budget(1.0)
    first, second = Budget(0.9, parent=plan), Budget(0.9, parent=plan)
    first.charge(0.7)
    assert second.remaining == pytest.approx(0.3)
    second.charge(0.3)
    with pytest.raises(BudgetExceededError, match=r"of \$1\.0000"):
        first.check()


@given(depth=st.integers(0, 10), max_depth=st.integers(1, 10))
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


def test_the_long_context_mark_of_the_cli_is_no_part_of_the_name() -> None:
    usage = {"input_tokens": 1000, "output_tokens": 10}
    assert estimate_usd("claude-sonnet-4-5[1m]", usage) == estimate_usd("claude-sonnet-4-5", usage)


@pytest.mark.parametrize("model", ["my-own-model", "", "None", "<synthetic>", "gpt-5", "[1m]"])
def test_a_model_without_a_known_price_has_none(model: str) -> None:
    assert estimate_usd(model, {"input_tokens": 1000, "output_tokens": 10}) is None


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
@settings(max_examples=150, deadline=None)
def test_usage_of_any_shape_gives_a_price_or_none(usage: dict[str, object]) -> None:
    price = estimate_usd("claude-sonnet-4-5", usage)
    assert price is None or math.isfinite(price)
