"""What a run has cost so far, before the CLI says it. The CLI's own figure replaces this as soon as it comes.

Order of truth: the CLI's ``costUSD`` → list prices of genai-prices → unknown. Unknown stays unknown.
"""

import re
from collections.abc import Mapping
from typing import Any


def estimate_usd(model: str, usage: Mapping[str, Any]) -> float | None:
    """List price in USD of one Messages API ``usage`` object; None for a model without a known price."""
    # Imported here: loading the price list costs 50 ms that most commands do not need.
    from genai_prices import extract_usage  # noqa: PLC0415

    # "[1m]" marks the CLI's long-context variants; the API's model name comes without it.
    body = {"model": re.sub(r"\[.*\]$", "", model), "usage": dict(usage)}
    try:
        return float(extract_usage(body, provider_id="anthropic").calc_price().total_price)
    except (LookupError, ValueError, TypeError):
        return None
