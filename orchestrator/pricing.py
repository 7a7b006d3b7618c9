"""What model requests cost by list prices, before the CLI says it. Its own figure replaces these when it comes.

Order of truth: the CLI's ``costUSD`` → list prices of genai-prices → unknown. Unknown stays unknown: None, never 0,
and never another model's price.
"""

import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import lru_cache
from operator import mul
from typing import Any

#: What the provider takes of the list price for requests in batches.
BATCH_DISCOUNT = 0.5

#: Counts that nearly every usage has, and no other that is paid for.
_PLAIN = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
_MANY = 1_000_000

# Names by which the CLI chooses a model itself; which one it is, is known when it runs.
_ALIASES = frozenset({"default", "inherit", "best", "opus", "sonnet", "haiku", "fable", "opusplan"})


def estimate_usd(model: str, usage: Mapping[str, Any]) -> float | None:
    """List price in USD of one Messages API ``usage`` object; None for a model without a known price."""
    counts = _plain_counts(usage)
    rates = _rates(model, datetime.now(UTC).date()) if counts is not None else None
    if counts is None or rates is None:
        price = _by_list(model, usage)
        return None if price is None else float(price[0])
    return float(sum(map(mul, counts, rates), Decimal()))


def _by_list(model: str, usage: Mapping[str, Any]) -> tuple[Decimal, bool] | None:
    """The price, and whether it is the same for every token; None for a model without a known price."""
    # Imported here: loading the price list costs 50 ms that most commands do not need.
    from genai_prices import calc_price, extract_usage  # noqa: PLC0415
    from genai_prices.types import TieredPrices  # noqa: PLC0415

    provider, name = _listed(model)
    try:
        # Usage has the provider's own shape wherever the request went.
        counted = extract_usage({"usage": dict(usage)}, provider_id="anthropic").usage
        found = calc_price(counted, name, provider_id=provider)
    except (LookupError, ValueError, TypeError):
        return None
    return found.total_price, not any(isinstance(price, TieredPrices) for price in vars(found.model_price).values())


@lru_cache(maxsize=128)
def _rates(model: str, _day: date) -> tuple[Decimal, ...] | None:
    """The price of one token of each of ``_PLAIN``, None if it depends on how many there are or is not known.

    The list takes a third of a millisecond for each usage, and there are two for every model request. Its prices
    may change with the day.
    """
    prices = [_by_list(model, {**dict.fromkeys(_PLAIN, 0), name: _MANY}) for name in _PLAIN]
    flat = [price[0] / _MANY for price in prices if price is not None and price[1]]
    return tuple(flat) if len(flat) == len(_PLAIN) else None


def _plain_counts(usage: Mapping[str, Any]) -> list[int] | None:
    """The counts of ``_PLAIN``; None if the usage has anything that is priced in another way."""
    counts = [usage.get(name) or 0 for name in _PLAIN]
    kept = usage.get("cache_creation") or {}
    plain = (
        all(type(count) is int and count >= 0 for count in counts)
        and isinstance(kept, Mapping)
        and not (any(kept.values()) and kept.get("ephemeral_5m_input_tokens") != counts[-1])
        and not usage.get("server_tool_use")
    )
    return counts if plain else None


def calculate_cost(
    model: str,
    input_tokens: int,
    output_tokens: int,
    *,
    cache_read_tokens: int = 0,
    cache_write_tokens: int = 0,
    batch: bool = False,
) -> float | None:
    """List price in USD of that many tokens in one request; None for a model without a known price.

    ``input_tokens`` are those that did not pass through the cache; written ones are priced as kept for five
    minutes. Prices that rise with the length of the request are taken at its length.
    """
    price = estimate_usd(
        model,
        {
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "cache_read_input_tokens": cache_read_tokens,
            "cache_creation_input_tokens": cache_write_tokens,
        },
    )
    return price if price is None or not batch else price * BATCH_DISCOUNT


def has_price(model: str | None) -> bool | None:
    """Whether the model has a list price. None where that shows only when it runs: an alias, or no model named."""
    if model is None or re.sub(r"\[.*\]$", "", model).lower() in _ALIASES:
        return None
    return calculate_cost(model, 0, 0) is not None


def _listed(model: str) -> tuple[str, str]:
    """The provider and the name under which the price list has the model."""
    # "[1m]" marks the CLI's long-context variants; the API's model name comes without it.
    name = re.sub(r"\[.*\]$", "", model).removeprefix("anthropic/")
    # Amazon's names: "eu.anthropic.claude-…-v1:0", or the end of an ARN.
    return ("aws" if "anthropic." in name else "anthropic", name)
