"""Whether the Messages API may stand in for the CLI. Pure: facts in, the reason against it out.

The API path has no tools, no sessions and no settings of Claude Code, and it is billed to a key. So it is off
unless the operator turns it on, and everything a task could miss there is a reason to fail as the CLI did.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.config import FallbackConfig
from orchestrator.conversation import Spec
from orchestrator.errors import (
    CircuitOpenError,
    CLIExitError,
    CLINotFoundError,
    CLIStartError,
    OrchestratorError,
    RunTimeoutError,
    StalledError,
)

KEY_ENV = "ANTHROPIC_API_KEY"


def why_not_fall_back(
    error: OrchestratorError, spec: Spec, settings: FallbackConfig, *, heard: bool, installed: bool
) -> str | None:
    """Why a run whose CLI failed may not be answered over the API; None if it may.

    ``heard``: whether any message of the CLI was taken in; what it began is never begun a second time.
    ``installed``: whether the SDK is there (``backends.api.installed``).
    """
    if not settings.enabled:
        return "fallback.enabled is false"
    if heard:
        return "the CLI had already begun"
    if not _is_covered(error, settings):
        return f"the settings under fallback do not name this failure ({error.code})"
    if (lacking := lacking_on_api(spec, settings.models)) is not None:
        return lacking
    if not spec.env.get(KEY_ENV):
        return f"{KEY_ENV} is neither in claude.env nor named in claude.pass_env"
    return None if installed else "the extra is not installed: pip install 'orchestrator-mcp[api]'"


def _is_covered(error: OrchestratorError, settings: FallbackConfig) -> bool:
    match error:
        case CLINotFoundError() | CLIExitError():
            return settings.on_cli_unavailable
        case CLIStartError():
            # A start that the agent's file or the task made impossible is no fault of the CLI.
            return settings.on_cli_unavailable and error.scope == "host"
        case CircuitOpenError():
            return settings.on_circuit_open
        case RunTimeoutError():
            # With the wall time the run's own time is over.
            return settings.on_timeout and error.details.get("kind") == "idle"
        case StalledError():
            return settings.on_timeout
        case _:
            return False


def lacking_on_api(spec: Spec, models: Mapping[str, str]) -> str | None:
    """What the conversation needs and the API path does not have; None if it has everything."""
    if spec.tools is None:
        return "the agent has the CLI's default tools; only one with an empty list of tools can do without the CLI"
    if spec.tools or spec.allowed_tools or spec.mcp or spec.mcp_servers:
        return "the agent has tools or MCP servers"
    if spec.session_mode != "fresh":
        return "the task goes on with a session, which only the CLI keeps"
    if spec.settings:
        return "the task brings Claude Code settings"
    if spec.output_schema is not None and (problem := next(_unsayable(spec.output_schema), None)) is not None:
        return f"the API cannot be held to the output schema: {problem}"
    if api_model(spec.model, models) is None:
        named = f"{spec.model!r} is not a model id of the API" if spec.model else "the task names no model"
        return f"{named}, and fallback.models has no entry {spec.model or 'default'!r}"
    return None


def api_model(name: str | None, models: Mapping[str, str]) -> str | None:
    """The API's id of the model: by ``fallback.models``, or the name itself where it is one."""
    if mapped := models.get(name or "default"):
        return mapped
    # "[1m]" and the like are the CLI's own marks.
    return name if name is not None and name.startswith("claude-") and "[" not in name else None


def _unsayable(schema: Any, at: str = "") -> Iterator[str]:
    """What in a schema the API's structured outputs would lose or refuse, as ``where: what``.

    Bounds and patterns are not among it: they go along as description, and the answer is checked against them.
    """
    where = at or "the top"
    if not isinstance(schema, Mapping):
        yield f"{where}: anything is allowed"
        return
    for name, part in dict(schema.get("$defs") or {}).items():
        yield from _unsayable(part, f"{at}/$defs/{name}")
    variants = [key for key in ("anyOf", "oneOf", "allOf") if key in schema]
    for key in variants:
        for number, part in enumerate(schema[key]):
            yield from _unsayable(part, f"{at}/{key}/{number}")
    kind = schema.get("type")
    if "$ref" in schema or "const" in schema or "enum" in schema or (variants and kind is None):
        return
    if kind == "object":
        yield from _unsayable_object(schema, at)
    elif kind == "array":
        yield from _unsayable(schema.get("items"), f"{at}/items")
    elif kind not in ("string", "integer", "number", "boolean", "null"):
        yield f"{where}: its type is {kind!r}" if kind else f"{where}: it has no type"


def _unsayable_object(schema: Mapping[str, Any], at: str) -> Iterator[str]:
    properties = schema.get("properties") or {}
    if not properties or isinstance(schema.get("additionalProperties"), Mapping) or "patternProperties" in schema:
        yield f"{at or 'the top'}: an object whose keys are not all named"
    for name, part in properties.items():
        yield from _unsayable(part, f"{at}/{name}")
