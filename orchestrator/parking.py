"""Usage limits of a provider account, and runs that wait for their end. Pure: ``now`` is passed in, nothing waits.

A used-up window holds for the account, whichever run meets it first. A run that is refused for it is *parked*: its
process ends, its session stays, its status is ``waiting``. Afterwards the session goes on, by these rules:

* The prompt is sent again under the uuid it had. A session that has it swallows it, one that lost it answers it.
* Only when it was swallowed, a short prompt with a uuid of its own has the agent go on. Tool results of the refused
  turn are part of the session, so nothing is done twice, and the prompt is never in the history twice.
* A run waits only where ``limits.park`` allows it, for ``limits.max_park_s`` in all, and only while the process
  that parked it lives. Nothing else takes it up again.
"""

import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.config import LimitsConfig
from orchestrator.errors import OrchestratorError, RateLimitError
from orchestrator.messages import CommandLifecycle, Message, RateLimitEvent

#: What a parked run's agent is told when its session goes on.
CONTINUE_PROMPT = "Continue from where you left off."

#: The first wait is as long as the provider says; if it refuses again, each further one lasts at least this long,
#: doubled every time: a reset time that is wrong costs few requests.
AGAIN_S = 30.0
#: No window is longer. A time further away is in another unit, or nonsense.
_FARTHEST_S = 366 * 86_400.0

_NAMESPACE = uuid.UUID("6f1c0b52-7f0e-4b0e-9d5e-3a1f4f0f9a51")

RefuseReason = Literal["off", "unknown_end", "too_long"]


# -- the account ----------------------------------------------------------------------------------------------

#: Variables that hold the credential a CLI uses instead of its login.
_CREDENTIALS = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN")
#: Variables that choose another provider, and whose account there.
_PROVIDERS = (
    *("CLAUDE_CODE_USE_BEDROCK", "AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_BEARER_TOKEN_BEDROCK", "AWS_REGION"),
    *("CLAUDE_CODE_USE_VERTEX", "ANTHROPIC_VERTEX_PROJECT_ID", "CLOUD_ML_REGION"),
    *("CLAUDE_CODE_USE_FOUNDRY", "ANTHROPIC_FOUNDRY_API_KEY", "ANTHROPIC_FOUNDRY_RESOURCE"),
)


def account_of(env: Mapping[str, str], home: Path, base_url: str | None = None) -> str:
    """Which account a CLI with this environment uses: 16 hex digits that tell nothing of the credential.

    Without a credential in ``env`` it is the login kept under ``home`` (or CLAUDE_CONFIG_DIR). ``base_url`` is the
    provider's address, by default that of ``env``. Two names for one account only cost one more refused request.
    """
    url = (base_url or env.get("ANTHROPIC_BASE_URL") or "").rstrip("/")
    given = [f"{name}={env[name]}" for name in _CREDENTIALS if env.get(name)]
    login = [] if given else [env.get("CLAUDE_CONFIG_DIR") or str(home)]
    elsewhere = [f"{name}={env[name]}" for name in _PROVIDERS if env.get(name)]
    digest = hashlib.sha256()
    for part in (url, *given, *login, *elsewhere):
        data = part.encode("utf-8", "surrogateescape")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:16]


# -- the limit ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UsageLimit:
    """A limit an account has reached. ``resets_at`` is in seconds since 1970, None where nobody said when it ends.

    ``kind`` names the window (``five_hour``, ``seven_day``) as the provider does; ``request_rate`` is none of them.
    """

    account: str
    resets_at: float | None
    kind: str
    source: Literal["rate_limit_event", "retry_after", "status"]


def usage_limit(
    error: OrchestratorError | None, event: RateLimitEvent | None, *, account: str, now: float
) -> UsageLimit | None:
    """The limit that ended a turn with ``error``, None if none did. ``event`` is the last one of the turn.

    The error decides, not the event: with overage an account is ``rejected`` and works on, and a warning is none.
    """
    if not isinstance(error, RateLimitError):
        return None
    info = event.rate_limit_info if event else {}
    resets_at = _time(info.get("resetsAt"), now)
    if info.get("status") == "rejected" and resets_at is not None:
        return UsageLimit(account, resets_at, str(info.get("rateLimitType") or "unknown"), "rate_limit_event")
    if error.retry_after is not None:
        return UsageLimit(account, _time(now + error.retry_after, now), "request_rate", "retry_after")
    return UsageLimit(account, None, "request_rate", "status")


def _time(value: Any, now: float) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= now + _FARTHEST_S else None


class ReachedLimits:
    """The breaker of accounts: a limit that one run met holds for every run of the account until its reset.

    So no request is spent on learning it again, and a run that begins meanwhile waits before it has a process.
    """

    def __init__(self) -> None:
        self._limits: dict[str, UsageLimit] = {}

    def __repr__(self) -> str:
        return f"<ReachedLimits {sorted(self._limits)}>"

    def reach(self, limit: UsageLimit) -> None:
        """A run met the limit. The latest word counts; one without a known end bars nobody."""
        if limit.resets_at is not None:
            self._limits[limit.account] = limit

    def of(self, account: str, now: float) -> UsageLimit | None:
        """The limit the account has reached, None if none is known or its time is over."""
        limit = self._limits.get(account)
        if limit is None or limit.resets_at is None or limit.resets_at <= now:
            self._limits.pop(account, None)
            return None
        return limit


# -- to wait or not -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Park:
    """Wait until then (seconds since 1970)."""

    until: float


@dataclass(frozen=True, slots=True)
class Refuse:
    """Do not wait: the run fails with the provider's error. ``why`` is for people."""

    reason: RefuseReason
    why: str


@dataclass(slots=True)
class Waits:
    """How often a run was parked, and for how long in all, in seconds. The time does not count as wall time.

    ``over`` is when the last wait was over, on the monotonic clock.
    """

    parks: int = 0
    waited_s: float = 0.0
    over: float = 0.0

    def add(self, seconds: float) -> None:
        """One wait is over, or was broken off."""
        self.parks += 1
        self.waited_s += max(0.0, seconds)


def park(limit: UsageLimit, now: float, config: LimitsConfig, waits: Waits, run_id: str) -> Park | Refuse:
    """Whether a run refused for ``limit`` may wait for its end, and until when.

    Runs wait a little longer than the limit, each by its own part of ``limits.park_stagger_s``, so that they do not
    all come back in one moment.
    """
    if not config.park:
        return Refuse("off", "limits.park is off")
    if limit.resets_at is None:
        return Refuse("unknown_end", "the provider does not say when the limit ends")
    again = AGAIN_S * 2 ** min(waits.parks - 1, 20) if waits.parks else 0.0
    until = max(limit.resets_at, now + again) + stagger(run_id, config.park_stagger_s)
    if waits.waited_s + until - now > config.max_park_s:
        before = f", after {waits.waited_s:.0f} s already waited" if waits.parks else ""
        return Refuse(
            "too_long", f"{until - now:.0f} s to wait{before}; limits.max_park_s is {config.max_park_s:g} s"
        )
    return Park(until)


def stagger(run_id: str, span_s: float) -> float:
    """The run's own part of the span, the same every time: from 0 to ``span_s`` seconds."""
    share = int.from_bytes(hashlib.sha256(run_id.encode()).digest()[:8], "big") / 2**64
    return share * span_s


def refused(error: OrchestratorError, refusal: Refuse) -> OrchestratorError:
    """The provider's error with the reason why the run did not wait, in ``details["not_parked"]``."""
    error.details = {**error.details, "not_parked": refusal.reason}
    if refusal.reason == "too_long":
        error.advice = f"{refusal.why}. Try again after the reset, or raise it."
    return error


# -- going on ---------------------------------------------------------------------------------------------------


def prompt_uuid(run_id: str) -> str:
    """The uuid of a run's prompt: the same however often it is sent, so that a session takes it once."""
    return str(uuid.uuid5(_NAMESPACE, run_id))


def continue_uuid(run_id: str, attempt: int) -> str:
    """The uuid of the prompt that has a session go on after park number ``attempt``, counted from 1."""
    return str(uuid.uuid5(_NAMESPACE, f"{run_id}/{attempt}"))


class Redelivery:
    """Watches a prompt that is sent again to a session that may have it."""

    def __init__(self, prompt: str) -> None:
        self._uuid = prompt
        self._begun = False

    def swallowed(self, message: Message) -> bool:
        """Whether this message says that the session has had the prompt, so that no turn comes of it."""
        if not isinstance(message, CommandLifecycle) or message.command_uuid != self._uuid:
            return False
        self._begun = self._begun or message.state in ("queued", "started")
        return message.state == "completed" and not self._begun


# -- what is told -------------------------------------------------------------------------------------------------


def parked(limit: UsageLimit, decision: Park, attempt: int) -> dict[str, Any]:
    """The data of a ``run.parked`` event. ``until`` and ``resets_at`` are seconds since 1970."""
    return {
        "reason": limit.kind,
        "source": limit.source,
        "account": limit.account,
        "resets_at": limit.resets_at,
        "until": decision.until,
        "attempt": attempt,
    }


def resumed(limit: UsageLimit, decision: Park, attempt: int, waits: Waits) -> dict[str, Any]:
    """The data of a ``run.resumed`` event: that of its park, and the seconds waited in all."""
    return {**parked(limit, decision, attempt), "waited_s": round(waits.waited_s, 3)}
