"""What came of a run: the one result type that steps, delegates, the journal and the doors share."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

#: ``waiting``: parked until a usage limit of the provider ends.
RunStatus = Literal["queued", "running", "waiting", "succeeded", "failed", "cancelled", "timed_out", "interrupted"]

#: The states a run never leaves.
ENDED: frozenset[RunStatus] = frozenset({"succeeded", "failed", "cancelled", "timed_out", "interrupted"})


class Usage(BaseModel):
    """Tokens of one run or of several added up. Thinking tokens are inside ``output_tokens``."""

    model_config = ConfigDict(frozen=True)

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cache_read_tokens=self.cache_read_tokens + other.cache_read_tokens,
            cache_write_tokens=self.cache_write_tokens + other.cache_write_tokens,
        )

    @property
    def total_tokens(self) -> int:
        """Every token the provider counted, read from or written to its cache included."""
        return self.input_tokens + self.output_tokens + self.cache_read_tokens + self.cache_write_tokens


class Outcome(BaseModel):
    """The result of a run, whatever became of it; a failure is an outcome too.

    ``structured`` is the answer that satisfied the output schema, and is meaningful only if
    ``has_structured`` is true: ``null`` is a valid answer. ``cost_usd`` is in US dollars and ``None`` where
    it is unknown, never 0. ``duration_ms`` is wall time in milliseconds. ``error`` is
    ``OrchestratorError.to_dict()``. ``text`` keeps what a failed run had said until then.
    """

    model_config = ConfigDict(frozen=True)

    run_id: str
    status: RunStatus
    text: str = ""
    structured: Any = None
    has_structured: bool = False
    session_id: str | None = None
    usage: Usage = Field(default_factory=Usage)
    cost_usd: float | None = None
    num_turns: int = 0
    duration_ms: int | None = None
    model: str | None = None
    error: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        """Whether the run succeeded."""
        return self.status == "succeeded"
