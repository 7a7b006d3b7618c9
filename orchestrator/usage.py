"""Adding up what models were used for: the requests of one turn as they are seen, and whole runs.

Pure. A cost that is not known is None and makes every sum it is in None; the tokens still count.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.outcome import Outcome, Usage
from orchestrator.pricing import estimate_usd

# Where the CLI says of an answer only how it began, its output is guessed from its length: English and code have
# three to five characters to a token.
_CHARS_PER_TOKEN = 4


@dataclass(slots=True)
class _Request:
    """A model request as far as it is known. ``said`` counts characters where nothing counts its tokens."""

    id: str | None
    model: str
    streamed: bool
    ended: bool = False
    counts: dict[str, Any] = field(default_factory=dict)
    said: int = 0
    usage: Usage = field(default_factory=Usage)
    price: float | None = None

    def learn(self, counts: Mapping[str, Any], said: int = 0) -> None:
        self.said += said
        self.counts |= {key: value for key, value in counts.items() if value is not None}
        guess = self.said // _CHARS_PER_TOKEN
        if guess > _count(self.counts, "output_tokens"):
            self.counts["output_tokens"] = guess
        if self.counts:
            counted = {"input_tokens": 0, "output_tokens": 0, **self.counts}
            self.usage, self.price = _tokens(counted), estimate_usd(self.model, counted)

    @property
    def unpriced(self) -> bool:
        return bool(self.counts) and self.price is None


@dataclass(slots=True)
class Meter:
    """The model requests of one turn, counted from their beginning: how many, their tokens, their list price.

    A thread is the tool use that started a sub-agent, None for the agent itself; each is in one request at a time.
    ``requests`` counts those of all threads. One that broke off and is made again is one request, paid for twice.
    """

    requests: int = 0
    _done: Usage = field(default_factory=Usage)
    _done_usd: float | None = None
    _unpriced: str | None = None
    _open: dict[str | None, _Request] = field(default_factory=dict)

    @property
    def usage(self) -> Usage:
        return sum((each.usage for each in self._open.values()), self._done)

    @property
    def cost_usd(self) -> float | None:
        """The list price of all requests that have one; None if none has."""
        prices = [self._done_usd, *(each.price for each in self._open.values())]
        known = [price for price in prices if price is not None]
        return sum(known) if known else None

    @property
    def unpriced_model(self) -> str | None:
        """The first model seen to be used at no known price."""
        return self._unpriced or next((each.model for each in self._open.values() if each.unpriced), None)

    def begin(
        self, thread: str | None, request_id: str | None, model: str, counts: Mapping[str, Any], *, streamed: bool
    ) -> bool:
        """The thread begins a request; the one it was in is over. Whether it is another, not the same again."""
        before = self._open.pop(thread, None)
        if before is not None:
            self._close(before)
        again = before is not None and before.streamed and not before.ended
        self.requests += not again
        self._open[thread] = _Request(request_id, model, streamed)
        self._open[thread].learn(counts)
        return not again

    def end(self, thread: str | None, counts: Mapping[str, Any]) -> None:
        """The answer to the thread's request is whole; ``counts`` are the last ones, which may come repeatedly."""
        if (request := self._open.get(thread)) is not None:
            request.learn(counts)
            request.ended = True

    def block(
        self, thread: str | None, request_id: str | None, model: str, counts: Mapping[str, Any], said: int
    ) -> None:
        """A finished part of an answer, ``said`` characters long. Nothing new where the answer was streamed."""
        request = self._open.get(thread)
        if request is None or request.id != request_id:
            self.begin(thread, request_id, model, counts, streamed=False)
            request = self._open[thread]
        if not request.streamed:
            request.learn({}, said)

    def _close(self, request: _Request) -> None:
        self._done += request.usage
        if request.price is not None:
            self._done_usd = (self._done_usd or 0.0) + request.price
        elif request.unpriced:
            self._unpriced = self._unpriced or request.model


def _tokens(counts: Mapping[str, Any]) -> Usage:
    return Usage(
        input_tokens=_count(counts, "input_tokens"),
        output_tokens=_count(counts, "output_tokens"),
        cache_read_tokens=_count(counts, "cache_read_input_tokens"),
        cache_write_tokens=_count(counts, "cache_creation_input_tokens"),
    )


def _count(counts: Mapping[str, Any], name: str) -> int:
    # Streamed events are the provider's, unchecked: a count in a new shape must not end the run.
    value = counts.get(name)
    return max(0, value) if isinstance(value, int) else 0


@dataclass(slots=True)
class ModelStats:
    """What one model was used for. ``requests`` are what the runs call turns; ``cost_usd`` None is unknown."""

    usage: Usage = field(default_factory=Usage)
    cost_usd: float | None = 0.0
    requests: int = 0

    def add(self, usage: Usage, cost_usd: float | None, requests: int) -> None:
        self.usage += usage
        self.cost_usd = None if self.cost_usd is None or cost_usd is None else self.cost_usd + cost_usd
        self.requests += requests


@dataclass(slots=True)
class UsageStats:
    """Sums over runs, by model: ``stats.add(outcome)`` for each. Runs that used no model count under None."""

    model_usage: dict[str | None, ModelStats] = field(default_factory=dict)
    runs: int = 0

    def add(self, outcome: Outcome) -> None:
        """Add a run. A plan's outcome is already the sum of its steps: add it or them, not both."""
        self.runs += 1
        self._of(outcome.model).add(outcome.usage, outcome.cost_usd, outcome.num_turns)

    def merge(self, other: "UsageStats") -> None:
        """Add everything another one has."""
        self.runs += other.runs
        for model, stats in list(other.model_usage.items()):
            self._of(model).add(stats.usage, stats.cost_usd, stats.requests)

    def reset(self) -> None:
        """Forget everything."""
        self.model_usage, self.runs = {}, 0

    @property
    def usage(self) -> Usage:
        return sum((stats.usage for stats in self.model_usage.values()), Usage())

    @property
    def total_tokens(self) -> int:
        """Every token counted, the cache's included."""
        return self.usage.total_tokens

    @property
    def total_cost_usd(self) -> float | None:
        """The sum of all costs; None if that of one run is unknown."""
        costs = [stats.cost_usd for stats in self.model_usage.values()]
        known = [cost for cost in costs if cost is not None]
        return sum(known, start=0.0) if len(known) == len(costs) else None

    @property
    def request_count(self) -> int:
        return sum(stats.requests for stats in self.model_usage.values())

    def to_dict(self) -> dict[str, Any]:
        """The sums as plain data for JSON; tokens, US dollars, and the same by model."""
        return {
            "runs": self.runs,
            "requests": self.request_count,
            "total_tokens": self.total_tokens,
            "total_cost_usd": self.total_cost_usd,
            **self.usage.model_dump(),
            "models": {
                model or "": {
                    "requests": stats.requests,
                    "total_tokens": stats.usage.total_tokens,
                    "cost_usd": stats.cost_usd,
                    **stats.usage.model_dump(),
                }
                for model, stats in self.model_usage.items()
            },
        }

    def _of(self, model: str | None) -> ModelStats:
        return self.model_usage.setdefault(model, ModelStats())
