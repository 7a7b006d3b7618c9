"""The layer of Claude Code settings a run is started with: what its task asks for, but for what it may not. Pure.

The layer is given on the command line. There it wins over settings files, and with ``allowUnsandboxedCommands:
false`` in it the CLI ignores whatever the files of a project say to loosen the sandbox. The user's own file can
still name commands to run outside, so ``setting_sources`` leaves it out.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.errors import ConfigError

#: Every shell command in the sandbox, or no run: by itself the CLI would only warn and go on without.
REQUIRED = {"enabled": True, "failIfUnavailable": True, "allowUnsandboxedCommands": False}

#: What a task may say of a sandbox it must have: these narrow it.
_NARROWING = frozenset({"filesystem.denyRead", "filesystem.denyWrite", "network.deniedDomains"})


def check_settings(settings: Mapping[str, Any] | None, *, sandboxed: bool, allow_bypass: bool) -> None:
    """Whether a run may have the settings a task asks for.

    ``sandboxed``: the agent's file says ``sandbox: required``. Raises ConfigError.
    """
    asked = settings or {}
    if not allow_bypass and _part(asked, "permissions").get("defaultMode") == "bypassPermissions":
        raise ConfigError(
            "settings.permissions.defaultMode asks for bypassPermissions, which the operator has not allowed",
            advice="Set claude.allow_bypass_permissions in orchestrator.yaml, in a sandbox only.",
        )
    if sandboxed and (loose := next(_loosening(asked.get("sandbox", {})), None)):
        raise ConfigError(
            f"settings.{loose} would loosen the sandbox that the agent's file requires",
            advice="Leave it out; filesystem.denyRead, filesystem.denyWrite and network.deniedDomains may be set.",
        )


def run_settings(
    settings: Mapping[str, Any] | None, *, sandboxed: bool, allow_bypass: bool
) -> dict[str, Any] | None:
    """The settings a run is started with; None if there are none. Raises what ``check_settings`` does."""
    check_settings(settings, sandboxed=sandboxed, allow_bypass=allow_bypass)
    layer = dict(settings or {})
    if not allow_bypass:
        # The mode is an argument of its own; this holds for whatever else could choose one, sub-agents for example.
        layer["permissions"] = {**_part(layer, "permissions"), "disableBypassPermissionsMode": "disable"}
    if sandboxed:
        layer["sandbox"] = {**_part(layer, "sandbox"), **REQUIRED}
    return layer or None


def setting_sources(sources: Sequence[str], *, sandboxed: bool) -> tuple[str, ...]:
    """Which settings files a run loads: not the user's own, where they could take commands out of the sandbox."""
    return tuple(source for source in sources if not (sandboxed and source == "user"))


def _part(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = settings.get(name)
    return part if isinstance(part, Mapping) else {}


def _loosening(sandbox: Any) -> Iterator[str]:
    """The dotted settings that are neither what is required anyway nor narrow the sandbox."""
    if not isinstance(sandbox, Mapping):
        yield "sandbox"
        return
    for name, value in sandbox.items():
        if name in REQUIRED:
            if value is not REQUIRED[name]:
                yield f"sandbox.{name}"
        elif isinstance(value, Mapping):
            yield from (f"sandbox.{name}.{key}" for key in value if f"{name}.{key}" not in _NARROWING)
        else:
            yield f"sandbox.{name}"
