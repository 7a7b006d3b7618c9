"""Prices are those of the list, however they are computed."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.pricing import _by_list, _plain_counts, _rates, estimate_usd

MODELS = (
    "claude-opus-5-5",
    "claude-sonnet-5-5",
    "claude-haiku-4-5",
    "claude-sonnet-4-5",
    "claude-3-5-sonnet-20241022",
)
tokens = st.integers(0, 2_000_000)


@given(model=st.sampled_from(MODELS), new=tokens, said=tokens, read=tokens, kept=tokens, detailed=st.booleans())
def test_a_price_is_that_of_the_list(model: str, new: int, said: int, read: int, kept: int, detailed: bool) -> None:
    usage: dict[str, Any] = {
        "input_tokens": new,
        "output_tokens": said,
        "cache_read_input_tokens": read,
        "cache_creation_input_tokens": kept,
        "service_tier": "standard",
    }
    if detailed:
        usage["cache_creation"] = {"ephemeral_5m_input_tokens": kept, "ephemeral_1h_input_tokens": 0}
    listed = _by_list(model, usage)
    assert listed is not None
    assert estimate_usd(model, usage) == pytest.approx(float(listed[0]), rel=1e-12, abs=0)


@pytest.mark.parametrize(
    "more",
    [
        {"cache_creation_input_tokens": 7, "cache_creation": {"ephemeral_1h_input_tokens": 7}},
        {"server_tool_use": {"web_search_requests": 3}},
        {"input_tokens": -1},
        {"input_tokens": "many"},
        {"cache_creation": "odd"},
    ],
)
def test_what_is_priced_in_another_way_is_left_to_the_list(more: dict[str, Any]) -> None:
    usage = {"input_tokens": 100, "output_tokens": 5, **more}
    assert _plain_counts(usage) is None
    listed = _by_list("claude-sonnet-4-5", usage)
    assert estimate_usd("claude-sonnet-4-5", usage) == (None if listed is None else float(listed[0]))


def test_prices_that_rise_with_the_length_are_left_to_the_list() -> None:
    today = datetime.now(UTC).date()
    assert _by_list("claude-sonnet-4-5", {"input_tokens": 1, "output_tokens": 1}) == (Decimal("0.000018"), False)
    assert _rates("claude-sonnet-4-5", today) is None
    assert _rates("claude-opus-5-5", today) is not None
    assert _rates("no-such-model", today) is None
