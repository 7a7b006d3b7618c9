"""What model requests cost by list prices, before the CLI says it. Its own figure replaces these when it comes.

Order of truth: the CLI's ``costUSD`` → list prices of genai-prices → unknown. Unknown stays unknown: None, never 0,
and never another model's price.
"""

import re
from collections.abc import Mapping
from typing import Any

#: What the provider takes of the list price for requests in batches.
BATCH_DISCOUNT = 0.5

# Names by which the CLI chooses a model itself; which one it is, is known when it runs.
_ALIASES = frozenset({"default", "inherit", "best", "opus", "sonnet", "haiku", "fable", "opusplan"})


def estimate_usd(model: str, usage: Mapping[str, Any]) -> float | None:
    """List price in USD of one Messages API ``usage`` object; None for a model without a known price."""
    # Imported here: loading the price list costs 50 ms that most commands do not need.
    from genai_prices import calc_price, extract_usage  # noqa: PLC0415

    provider, name = _listed(model)
    try:
        # Usage has the provider's own shape wherever the request went.
        counted = extract_usage({"usage": dict(usage)}, provider_id="anthropic").usage
        return float(calc_price(counted, name, provider_id=provider).total_price)
    except (LookupError, ValueError, TypeError):
        return None


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
