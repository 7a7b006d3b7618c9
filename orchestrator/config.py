"""Settings: defaults < orchestrator.yaml < .env < environment < command line, in this one place.

Every setting is a field below; its environment name is ``ORCHESTRATOR_`` and the dotted path in capitals with
two underscores for each dot (``limits.max_depth`` is ``ORCHESTRATOR_LIMITS__MAX_DEPTH``). Values from the
environment are read as YAML, so lists and numbers work; where a setting is text or a path, they are taken as
they stand. An empty one counts as not given. Nothing else of the environment is looked at.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args

import yaml
from dotenv import dotenv_values
from platformdirs import user_config_path, user_data_path
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.errors import ConfigError

CONFIG_FILE = "orchestrator.yaml"
ENV_PREFIX = "ORCHESTRATOR_"


class _Section(BaseModel):
    # Numbers may stand where text is asked for: a port or a size in claude.env is meant as it is written.
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class ClaudeConfig(_Section):
    """How the Claude Code CLI is found and started. Times are seconds."""

    path: Path | None = Field(None, description="The binary; looked up when not set.")
    home: Path | None = Field(None, description="HOME of the CLI: where its login and its sessions are.")
    base_url: str | None = Field(None, description="ANTHROPIC_BASE_URL of the CLI.")
    pass_env: tuple[str, ...] = Field((), description="Variables (or globs) of ours that the CLI may see.")
    env: dict[str, str] = Field(default_factory=dict, description="Variables set for the CLI.")
    max_retries: int = Field(3, ge=0, description="The CLI's own retries of one request (its default is 10).")
    request_timeout_s: float = Field(300, gt=0, description="How long one request may wait for its head.")
    stream_idle_timeout_s: float = Field(
        120, ge=10, le=1800, description="How long a started answer may pause before it is asked for again."
    )
    max_line_bytes: int = Field(64 * 1024 * 1024, ge=65536, description="Longest line of output accepted.")
    allow_bypass_permissions: bool = Field(
        False, description="Whether agents may run with permissionMode bypassPermissions. For sandboxes only."
    )
    trusted_dirs: tuple[Path, ...] = Field(
        (), description="Directories beside the project whose Claude Code settings and CLAUDE.md agents load."
    )
    setting_sources: tuple[str, ...] = Field(
        ("user", "project", "local"), description="Claude Code settings files that agents load."
    )


class LimitsConfig(_Section):
    """What runs may use at most. Times are seconds, money is USD; 0 for a budget means none may be spent."""

    max_depth: int = Field(3, ge=1, description="How deep delegation may nest; a top-level run has depth 1.")
    max_processes: int = Field(8, ge=1, description="CLI processes at once; further runs wait.")
    budget_usd: float | None = Field(None, ge=0, description="Budget of a run that names none.")
    budget_tokens: int | None = Field(None, ge=0, description="Tokens of a run that names no budget of them.")
    max_turns: int | None = Field(None, ge=0, description="Model requests of a run that names none.")
    max_runs: int | None = Field(None, ge=0, description="Runs that may be started below one that names none.")
    on_unknown_cost: Literal["allow", "refuse"] = Field(
        "allow", description="Whether models without a known price may run where money is limited."
    )
    timeout_s: float = Field(3600, gt=0, description="Wall time of a run that names none.")
    idle_timeout_s: float = Field(900, gt=0, description="Silence of a run that names none.")
    park: bool = Field(True, description="Whether runs wait for the end of a usage limit of the provider.")
    max_park_s: float = Field(6 * 3600, ge=0, description="How long one run may wait for that in all.")
    park_stagger_s: float = Field(30, ge=0, description="Over how many seconds waiting runs come back.")
    rate: str | None = Field(None, description="Beginnings of runs at most, such as 10/60s; further ones wait.")
    max_queue: int = Field(100, ge=0, description="Runs that may wait for a process; one more is refused.")
    max_prompt_bytes: int = Field(10 * 1024 * 1024, ge=1, description="Longest prompt accepted, in UTF-8.")
    allowed_dirs: tuple[Path, ...] | None = Field(
        None,
        description="Where alone runs may work, beside project_dir; none: only what models ask for is bounded.",
    )


class PoolConfig(_Section):
    """CLI processes that are kept for runs to come. Times are seconds, memory is MB."""

    warm: dict[str, int] = Field(
        {}, description="Agents to keep warm processes for, and how many, whatever demand says."
    )
    max_idle: int = Field(4, ge=0, description="Warm processes at most; 0 keeps none.")
    idle_s: float = Field(300, gt=0, description="How long a warm process may wait before it is replaced.")
    max_sessions: int = Field(4, ge=0, description="Sessions kept in a living process between turns; 0: none.")
    session_idle_s: float = Field(300, ge=0, description="How long such a process waits for the next turn.")
    max_starts: int | None = Field(None, ge=1, description="Processes that start at once; default: the CPUs.")
    memory_mb: float | None = Field(None, gt=0, description="For all processes; default: half of the machine's.")


class RetryConfig(_Section):
    """Giving a turn to another process when one ended before it said anything. Times are seconds."""

    codes: tuple[str, ...] = Field(("cli_exit",), description="Error codes that are retried.")
    max_retries: int = Field(1, ge=0, description="Attempts after the first.")
    base_delay_s: float = Field(0.1, ge=0, description="Wait before the first of them.")
    max_delay_s: float = Field(30.0, ge=0, description="Longest wait of our own choice.")
    exponential_base: float = Field(2.0, ge=1, description="Each wait is this many times the one before.")
    jitter: float = Field(0.1, ge=0, le=1, description="Share of a wait that is left to chance.")
    max_retry_after_s: float = Field(60.0, ge=0, description="Longest retry_after worth waiting for.")


class BreakerConfig(_Section):
    """When no run is begun because those before failed, for each CLI login. Times are seconds."""

    failure_threshold: int = Field(5, ge=1, description="Failures in a row that open it.")
    success_threshold: int = Field(2, ge=1, description="Successful probes that close it again.")
    reset_timeout_s: float = Field(30.0, gt=0, description="How long it stays open before a probe.")
    half_open_max_calls: int = Field(1, ge=1, description="Probes at once.")


class AgentsConfig(_Section):
    """Where agent files are read from."""

    paths: tuple[Path, ...] = Field((Path("agents"),), description="Folders of the project's agents.")
    user_path: Path = Field(
        default_factory=lambda: user_config_path("orchestrator") / "agents", description="Your own agents."
    )
    workspaces: tuple[Path, ...] = Field((), description="Folders whose .claude/agents are read too.")
    default_model: str | None = Field(None, description="Model where neither agent nor task names one.")


class StoreConfig(_Section):
    """Where runs are kept."""

    path: Path | None = Field(None, description="The SQLite file; default: runs.db in the data directory.")


class ServerConfig(_Section):
    """The served process."""

    host: str = Field("127.0.0.1", description="Address to listen on; loopback unless you know why not.")
    port: int = Field(0, ge=0, le=65535, description="Port of the HTTP door; 0 chooses a free one.")
    mcp_wait_s: float = Field(
        100, gt=0, description="How long an MCP call of a person's client waits by default; agents' wait 25 min."
    )
    progress_s: float = Field(
        10, ge=0.01, description="How often at least a client that waits for a run is told that it goes on."
    )
    on_stop: Literal["cancel", "interrupt", "finish"] = Field(
        "cancel", description="What becomes of runs when the server is told to stop."
    )
    finish_s: float = Field(600, gt=0, description="How long `finish` waits for runs; the rest is cancelled.")


class TelemetryConfig(_Section):
    """Spans and metrics. Where they go is said by the standard OTEL_* variables."""

    enabled: bool = Field(True, description="Whether telemetry is sent when an OTLP endpoint is configured.")
    metrics: bool = Field(True, description="Whether metrics are sent too.")
    cli_spans: bool = Field(True, description="Whether the agents' CLIs send their own spans too.")
    content: bool = Field(False, description="Whether prompts and answers are put on spans.")


class LogConfig(_Section):
    """Logs; always on stderr, because stdout belongs to MCP and to scripts."""

    level: str = Field(
        "WARNING", pattern="(?i)^(debug|info|warning|error|critical)$", description="DEBUG, INFO, WARNING or ERROR."
    )
    format: str = Field("console", pattern="^(console|json)$", description="console or json.")


class QuestionsConfig(_Section):
    """What becomes of permission prompts and questions of agents. Times are seconds."""

    policy: Literal["deny", "ask"] = Field("deny", description="Denied at once, or put to whoever delegates.")
    timeout_s: float = Field(600, gt=0, description="How long a question waits before it is denied.")


class FallbackConfig(_Section):
    """Answers over the Messages API where the CLI cannot give one, billed to the API key. Times are seconds."""

    enabled: bool = Field(False, description="Whether tasks that need no tools may be answered over the API.")
    on_cli_unavailable: bool = Field(True, description="When the CLI is missing, does not start or dies at once.")
    on_circuit_open: bool = Field(True, description="When a circuit breaker keeps the CLI from being asked.")
    on_timeout: bool = Field(False, description="When the CLI stays silent until a time-out.")
    models: dict[str, str] = Field({}, description="The API's model ids for the CLI's aliases.")
    max_tokens: int = Field(4096, ge=1, description="Longest answer asked of the API.")
    timeout_s: float = Field(300, gt=0, description="How long the API may be silent.")


class Config(_Section):
    """All settings. ``origin`` maps each dotted setting that is not a default to where its value came from."""

    data_dir: Path = Field(
        default_factory=lambda: user_data_path("orchestrator"), description="Where state is kept."
    )
    claude: ClaudeConfig = ClaudeConfig()
    limits: LimitsConfig = LimitsConfig()
    pool: PoolConfig = Field(default_factory=PoolConfig)
    retry: RetryConfig = RetryConfig()
    breaker: BreakerConfig = BreakerConfig()
    questions: QuestionsConfig = QuestionsConfig()
    fallback: FallbackConfig = FallbackConfig()
    agents: AgentsConfig = Field(default_factory=AgentsConfig)
    store: StoreConfig = StoreConfig()
    server: ServerConfig = ServerConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    log: LogConfig = LogConfig()
    project_dir: Path = Field(default_factory=Path.cwd, description="Directory relative paths start from.")

    _origin: dict[str, str] = {}

    @property
    def origin(self) -> Mapping[str, str]:
        return self._origin

    def absolute(self, path: Path) -> Path:
        """``path`` seen from the project directory, with ``~`` expanded."""
        return self.project_dir / path.expanduser()

    def resolve(self, path: Path) -> Path:
        """The same with links followed."""
        return self.absolute(path).resolve()

    @property
    def data_path(self) -> Path:
        return self.resolve(self.data_dir)

    @property
    def claude_path(self) -> Path | None:
        """The configured CLI, if one is."""
        return self.resolve(self.claude.path) if self.claude.path else None

    @property
    def store_path(self) -> Path:
        return self.resolve(self.store.path) if self.store.path else self.data_path / "runs.db"


@dataclass(frozen=True, slots=True)
class Layer:
    """One source of settings: its name for people, and dotted path → value."""

    origin: str
    values: Mapping[str, Any]


def load_config(
    path: Path | None = None,
    *,
    project_dir: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Read all sources and return the settings in force.

    ``path`` is a configuration file; without one, ``orchestrator.yaml`` is looked for in ``project_dir`` (default:
    the current directory) and its parents, and its directory becomes the project directory. ``overrides`` maps
    dotted settings to values and wins over everything else.

    Raises ConfigError naming each wrong setting, where its value came from, and a near name for an unknown one.
    """
    start = (project_dir or Path.cwd()).resolve()
    environ = os.environ if environ is None else environ
    file = _config_file(path, start, environ)
    base = file.parent if file else start
    layers = [
        Layer(str(file), dict(flatten(_read_yaml(file)))) if file else Layer("", {}),
        Layer(str(base / ".env"), _from_environ(_read_dotenv(base / ".env"))),
        Layer("environment", _from_environ(environ)),
        Layer("command line", dict(overrides or {})),
    ]
    return merge(layers, project_dir=base, file=file)


def default_data_dir(file: Path | None) -> Path:
    """Where state is kept if no setting says: a directory for each configuration file, one for all without any.

    A server has one data directory and the settings it started with. Were the directory shared, a project would
    get a server with the limits of whichever project came first. ``orchestrator.shim`` computes the same.
    """
    shared = user_data_path("orchestrator")
    if file is None:
        return shared
    digest = hashlib.sha256(os.fsencode(file)).hexdigest()
    return shared / "projects" / f"{file.parent.name or 'root'}-{digest[:8]}"


def merge(layers: list[Layer], *, project_dir: Path, file: Path | None = None) -> Config:
    """Later layers win, setting by setting; ``claude.env.NAME`` adds to the ``claude.env`` below it.

    ``project_dir`` is where relative paths start, ``file`` the configuration file in force, whose values are in
    one of the layers. Raises ConfigError.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for layer in layers:
        for name, value in sorted(layer.values.items()):
            for part in [part for part in values if part.startswith(f"{name}.")]:
                del values[part], origin[part]
            values[name] = value
            origin[name] = layer.origin
    known = settings()
    problems = [_unknown(name, origin[name], known) for name in values if not _is_known(name, known)]
    if problems:
        raise ConfigError("; ".join(problems))
    if values.get("data_dir") is None:
        values["data_dir"] = default_data_dir(file)
        origin.pop("data_dir", None)
    if isinstance(given := values.setdefault("project_dir", project_dir), str | Path):
        values["project_dir"] = project_dir / Path(given).expanduser()
    try:
        config = Config.model_validate(_nest(values))
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(e, origin) for e in error.errors())) from None
    config._origin.update(origin)  # noqa: SLF001  # our own private attribute, filled once at birth
    return config


def settings(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Every setting's dotted name → its pydantic field, in order of declaration."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found.update(settings(kind, f"{prefix}{name}."))
        else:
            found[prefix + name] = field
    return found


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings → dotted names, stopping at settings that are mappings themselves."""
    known = settings()
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in known:
            yield from flatten(value, f"{name}.")
        elif value is not None or not _is_section(name, known):  # a section may be empty: all its lines comments
            yield name, value


def _config_file(path: Path | None, start: Path, environ: Mapping[str, str]) -> Path | None:
    if path is None and (named := environ.get(f"{ENV_PREFIX}CONFIG")):
        path = Path(named)
    if path is not None:
        if not path.is_file():
            raise ConfigError(f"no configuration file at {path}")
        return path.resolve()
    for folder in (start, *start.parents):
        if (folder / CONFIG_FILE).is_file():
            return folder / CONFIG_FILE
    return None


def _read_yaml(file: Path) -> Mapping[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{file} must be a mapping of settings, not {type(tree).__name__}")
    return tree


def _read_dotenv(file: Path) -> Mapping[str, str | None]:
    try:
        # Without interpolation: ${NAME} would bring in variables that are none of ours.
        return dotenv_values(file, interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None


def _from_environ(environ: Mapping[str, str | None]) -> dict[str, Any]:
    known = settings()
    found: dict[str, Any] = {}
    for name, text in environ.items():
        if not name.startswith(ENV_PREFIX) or text is None or name in _NOT_SETTINGS:
            continue
        if name.startswith(_CLI_VARIABLE):  # a variable for the CLI: its name and its text are verbatim
            found[f"claude.env.{name.removeprefix(_CLI_VARIABLE)}"] = text
        elif text.strip():
            setting = name.removeprefix(ENV_PREFIX).lower().replace("__", ".")
            found[setting] = parse_value(setting, text, known)
    return found


def parse_value(setting: str, text: str, known: Mapping[str, Any]) -> Any:
    """The value that ``text`` from the environment or a command line means for a dotted setting."""
    if _is_text(known.get(setting)):
        # "a: b", "#1" and "010" are fine names of files.
        return None if text.strip() == "null" else text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _is_text(field: Any) -> bool:
    kind = getattr(field, "annotation", None)
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return set(kinds) - {NoneType} <= {str, Path}


# Variables of ours that are not settings: the configuration file's place, the token for MCP clients over HTTP, and
# what the executor gives to its own children so that they can be recognised and can call back.
_CLI_VARIABLE = f"{ENV_PREFIX}CLAUDE__ENV__"
_NOT_SETTINGS = {
    f"{ENV_PREFIX}{name}" for name in ("CONFIG", "TOKEN", "RUN_ID", "RUN_TOKEN", "PROCESS_ID", "INSTANCE_ID")
}


def _is_known(name: str, known: Mapping[str, Any]) -> bool:
    return name in known or name.rpartition(".")[0] == "claude.env"


def _is_section(name: str, known: Mapping[str, Any]) -> bool:
    return any(setting.startswith(f"{name}.") for setting in known)


def _unknown(name: str, origin: str, known: Mapping[str, Any]) -> str:
    if _is_section(name, known):
        return f"{name!r} is a section of settings and has no value of its own ({origin})"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown setting {name!r} ({origin}){hint}"


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names → nested mappings; a setting comes before the parts that add to it (``merge`` sees to that)."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                break  # validation names the value that ought to be a mapping
        else:
            node[leaf] = dict(value) if isinstance(value, Mapping) else value
    return tree


def _explain(error: Mapping[str, Any], origin: Mapping[str, str]) -> str:
    path = [str(part) for part in error["loc"]]
    name = next((n for n in (".".join(path[:i]) for i in range(len(path), 0, -1)) if n in origin), ".".join(path))
    # Variables for the CLI may be keys, and this text ends up in logs.
    got = "***" if name.startswith("claude.env") else json.dumps(error["input"], default=str)
    return f"{name}: {error['msg']}, got {got} ({origin.get(name, 'default')})"
