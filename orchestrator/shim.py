"""The stdio door: pumps JSON-RPC lines between an MCP client and the served runtime. Standard library only.

A client starts this once per window and waits for it, so it imports nothing of ours and answers within
hundredths of a second. It finds the server of its data directory, or starts it; when the server goes away, the
client keeps its connection: open calls get an error that says what to do, and the next line finds or starts a
server again. No run lives here: ending the shim ends none.
"""

import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from orchestrator import __version__

USAGE = "usage: orchestrator mcp [--config FILE] [--data-dir DIR]; MCP on stdin and stdout, for MCP clients"

START_SECONDS = 20.0
HELLO_SECONDS = 5.0
POLL_SECONDS = 0.03

#: Codes of our own errors, outside the ranges that JSON-RPC and MCP reserve.
SERVER_LOST = -31001
NO_SERVER = -31002
#: What the server's side says of requests it drops while it goes down. We have better words for that.
CONNECTION_CLOSED = -32000

LISTEN = "subscriptions/listen"
ACKNOWLEDGED = "notifications/subscriptions/acknowledged"
SUBSCRIPTION_ID = "io.modelcontextprotocol/subscriptionId"
CALLER = "orchestrator/caller"

#: Requests by which one may see or touch runs: they say on whose behalf.
STAMPED = ("tools/call", "resources/read", "tasks/get", "tasks/update", "tasks/cancel")

# A server started from inside an agent must not be taken for a part of that agent's run, nor join its trace.
NOT_FOR_THE_SERVER = (
    *("ORCHESTRATOR_RUN_ID", "ORCHESTRATOR_RUN_TOKEN", "ORCHESTRATOR_PROCESS_ID", "ORCHESTRATOR_INSTANCE_ID"),
    *("CLAUDE_CODE_SESSION_ID", "TRACEPARENT", "TRACESTATE"),
)


class NoServerError(Exception):
    """The server can be neither found nor started. The message says why."""


# -- where the server is ------------------------------------------------------------------------------------


def data_directory(argument: str | None, environ: Mapping[str, str], start: Path) -> Path:
    """The data directory that ``orchestrator.config`` finds for a project at ``start``, found without YAML."""
    if argument is not None:
        return Path(argument).expanduser().resolve()
    start = start.resolve()
    file = _config_file(environ, start)
    base = file.parent if file else start
    project = Path(_setting("project_dir", environ, base, file) or base).expanduser()
    named = _setting("data_dir", environ, base, file) or _default_data_dir(environ, file)
    return (base / project / Path(named).expanduser()).resolve()


def _config_file(environ: Mapping[str, str], start: Path) -> Path | None:
    if named := environ.get("ORCHESTRATOR_CONFIG"):
        return Path(named).resolve()
    files = (folder / "orchestrator.yaml" for folder in (start, *start.parents))
    return next((file for file in files if file.is_file()), None)


def _setting(name: str, environ: Mapping[str, str], base: Path, file: Path | None) -> str | None:
    """A path among the settings: of the environment, else of ``.env``, else of the file."""
    variable = f"ORCHESTRATOR_{name.upper()}"
    text = environ.get(variable, "")
    if not text.strip():
        text = _assigned(base / ".env", rf"(?:export[ \t]+)?{variable}[ \t]*=[ \t]*")
    if not text.strip() and file is not None:
        text = _assigned(file, rf"{name}[ \t]*:[ \t]+(?!~[ \t]*(?:#|$))")  # a bare ~ is YAML's null
    return None if text.strip() in ("", "null") else text


def _assigned(file: Path, name: str) -> str:
    """What follows ``name`` (a regular expression) in the last unindented line that has it, unquoted; or ``""``."""
    import re  # noqa: PLC0415  # only where there is a file to look into

    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    value = r"(?:\"([^\"\n]*)\"|'([^'\n]*)'|([^#'\"\s][^\n]*?))"
    found = re.findall(rf"^{name}{value}(?:[ \t]+#.*)?[ \t]*$", text, re.MULTILINE)
    return "".join(found[-1]) if found else ""


def _default_data_dir(environ: Mapping[str, str], file: Path | None) -> str:
    xdg = environ.get("XDG_DATA_HOME", "")
    usual = "~/Library/Application Support" if sys.platform == "darwin" else "~/.local/share"
    shared = f"{xdg if xdg.startswith('/') else usual}/orchestrator"
    if file is None:
        return shared
    from hashlib import sha256  # noqa: PLC0415  # 3 ms, and only where there is a file

    digest = sha256(os.fsencode(file)).hexdigest()
    return f"{shared}/projects/{file.parent.name or 'root'}-{digest[:8]}"


# -- reaching it --------------------------------------------------------------------------------------------


class Connection(NamedTuple):  # a dataclass would cost a fifth of the whole start
    """A connection that is past its hello."""

    socket: socket.socket
    lines: IO[bytes]


def dial(data: Path) -> Connection | None:
    """A connection to the server that the state file names; None if there is none, or it does not answer."""
    try:
        state = json.loads((data / "server.json").read_bytes())
        if not _lives(state["pid"]):  # its port may belong to anyone by now: not the one to tell the token
            return None
        link = socket.create_connection(("127.0.0.1", state["line_port"]), HELLO_SECONDS)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        link.sendall(_line({"token": state["token"], "version": __version__}))
        lines = link.makefile("rb")
        answer = json.loads(lines.readline())
        if not answer.get("ok"):
            raise ValueError(answer.get("error"))
    except (OSError, ValueError, AttributeError, KeyError) as problem:
        _say(f"the server did not let us in: {problem}")
        link.close()
        return None
    link.settimeout(None)
    if answer.get("version") != __version__:
        _say(f"version {__version__} talks to a server of version {answer.get('version')}")
    return Connection(link, lines)


def _lives(pid: int) -> bool:
    os.kill(pid, 0)
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):  # no Linux, or it is ending just now
        return True
    return state != b"Z"  # nobody's child: where process 1 does not look after such, it stays a zombie


def reach(data: Path, project: Path, environ: Mapping[str, str]) -> Connection:
    """Connect to the server, started if need be. Raises NoServerError."""
    if connection := dial(data):
        return connection
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(data / "spawn.lock"):
            return dial(data) or _start(data, project, environ)
    except OSError as problem:
        raise NoServerError(f"the orchestrator server could not be started: {problem}") from problem


def _start(data: Path, project: Path, environ: Mapping[str, str]) -> Connection:
    living, held = os.pipe()  # the server holds the one end for as long as it lives, and writes nothing
    try:
        try:
            _launch(data, project, environ, held)
        finally:
            os.close(held)
        return _started(data, living)
    finally:
        os.close(living)


def _launch(data: Path, project: Path, environ: Mapping[str, str], held: int) -> None:
    import subprocess  # noqa: PLC0415  # rarely needed, and not free

    log = os.open(data / "server.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        # Apart from us: an agent may have started us, and is ended with all that descends from it.
        # -P: a project with a file json.py in it must not become part of the server.
        starter = subprocess.Popen(
            [sys.executable, "-P", "-m", "orchestrator.apart", "--data-dir", str(data), "serve"],
            cwd=project,
            env={name: value for name, value in environ.items() if name not in NOT_FOR_THE_SERVER},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(held,),
        )
    finally:
        os.close(log)
    # It ends as soon as it has forked. Not waited for here, or what holds it up would hold the client up, too.
    threading.Thread(target=starter.wait, daemon=True).start()


def _started(data: Path, living: int) -> Connection:
    """The connection to the server just started. ``living`` can be read from when it has ended."""
    import select  # noqa: PLC0415  # like subprocess, which has it loaded

    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if connection := dial(data):
            return connection
        if select.select([living], [], [], POLL_SECONDS)[0]:
            raise NoServerError(f"the orchestrator server ended at once; {_last_words(data)}")
    raise NoServerError(f"the orchestrator server did not start within {START_SECONDS:g} s; {_last_words(data)}")


def _last_words(data: Path) -> str:
    text = (data / "server.log").read_bytes()[-400:].decode("utf-8", "replace").strip()
    return f"the end of {data / 'server.log'}: {text or '(empty)'}"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Of all shims that find no server, one starts it."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- pumping ------------------------------------------------------------------------------------------------


class Shim:
    """One client's connection, which outlives its server's.

    Two threads: the caller of ``forward`` is the only one that connects and sends; one more per connection
    receives. They share what is guarded by ``_lock``.
    """

    def __init__(self, data: Path, project: Path, environ: Mapping[str, str], stdout: int = 1) -> None:
        self._data = data
        self._project = project
        self._environ = environ
        self._stdout = stdout
        self._writing = threading.Lock()
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._unanswered: dict[Any, str] = {}
        self._handshake: list[tuple[Any, bytes]] = []
        self._listening: dict[Any, bytes] = {}
        self._heard: set[Any] = set()

    def forward(self, line: bytes) -> None:
        """Hand one line of the client to the server. Returns when it is sent, or has got its error."""
        message = _object(line)
        if message.get("method") in STAMPED:
            line = self._stamped(message)
        while True:
            try:
                connection = self._connected()
            except NoServerError as problem:
                if "method" in message and _id(message) is not None:
                    self._write(_error(_id(message), NO_SERVER, str(problem)))
                return
            with self._lock:
                if self._connection is not connection:
                    continue  # lost in between, and what was open then has been answered
                self._note(message, line)
            # If this fails, the receiving thread sees the end of the connection and answers what is open.
            with suppress(OSError):
                connection.socket.sendall(line)
            return

    def _stamped(self, message: dict[str, Any]) -> bytes:
        """A request with what only we can know of its caller: the server never sees our environment."""
        params = message.setdefault("params", {})
        meta = params.setdefault("_meta", {}) if isinstance(params, dict) else {}
        if isinstance(meta, dict):
            if parent := self._environ.get("TRACEPARENT"):
                meta.setdefault("traceparent", parent)
            caller = {
                "session_id": self._environ.get("CLAUDE_CODE_SESSION_ID"),
                "project_dir": str(self._project),
                "run_id": self._environ.get("ORCHESTRATOR_RUN_ID"),
            }
            meta[CALLER] = {name: value for name, value in caller.items() if value}
        return _line(message)

    def _note(self, message: dict[str, Any], line: bytes) -> None:
        """Remember what must be answered, and what a new server must be told."""
        method, id_ = message.get("method"), _id(message)
        if method == "initialize":
            self._handshake = [(id_, line)]
        elif method == "notifications/initialized":
            self._handshake.append((None, line))
        elif method == "notifications/cancelled":
            self._forget(_inside(message, "params", "requestId"))
        if method == LISTEN:
            self._listening[id_] = line
        elif method is not None and id_ is not None:
            self._unanswered[id_] = method

    def _forget(self, id_: Any) -> None:
        self._listening.pop(id_, None)
        self._heard.discard(id_)
        self._unanswered.pop(id_, None)

    def _connected(self) -> Connection:
        """The connection there is, or a new one that has been told what the old one knew."""
        with self._lock:
            if self._connection is not None:
                return self._connection
        connection = reach(self._data, self._project, self._environ)
        with self._lock:
            self._connection = connection
            past = [line for _, line in self._handshake] + list(self._listening.values())
            again = {id_ for id_, _ in self._handshake if id_ is not None}
        threading.Thread(target=self._receive, args=(connection, again), daemon=True).start()
        with suppress(OSError):
            for line in past:
                connection.socket.sendall(line)
        return connection

    def _receive(self, connection: Connection, again: set[Any]) -> None:
        """Hand on what the server says. ``again``: requests whose answers the client has had from another one."""
        with suppress(OSError):
            for line in connection.lines:
                if line.endswith(b"\n") and self._is_news(_object(line), again):
                    self._write(line)
        self._lost(connection)

    def _is_news(self, message: dict[str, Any], again: set[Any]) -> bool:
        """Whether the client is to see a line of the server."""
        id_ = _id(message)
        if message.get("method") == ACKNOWLEDGED:
            subscription = _inside(message, "params", "_meta", SUBSCRIPTION_ID)
            with self._lock:
                known = subscription in self._heard
                self._heard.add(subscription)
            return not known
        if "method" in message or id_ is None:
            return True
        if id_ in again:
            again.discard(id_)
            return False
        if _inside(message, "error", "code") == CONNECTION_CLOSED:
            return False
        with self._lock:
            self._forget(id_)
        return True

    def _lost(self, connection: Connection) -> None:
        """The server is gone: whoever waits for an answer gets one now."""
        with self._lock:
            if self._connection is not connection:
                return
            self._connection = None
            unanswered, self._unanswered = self._unanswered, {}
            self._handshake = [(id_, line) for id_, line in self._handshake if id_ not in unanswered]
        connection.socket.close()
        for id_, method in unanswered.items():
            self._write(_error(id_, SERVER_LOST, _LOST_CALL if method == "tools/call" else _LOST_REQUEST))

    def _write(self, line: bytes) -> None:
        with self._writing:
            rest = memoryview(line)
            try:
                while rest:
                    rest = rest[os.write(self._stdout, rest) :]
            except OSError:
                os._exit(0)  # the client has gone, and with it all we are here for


_LOST_CALL = (
    "the orchestrator restarted while this call was running; the run is recorded: look it up with query_traces"
)
_LOST_REQUEST = "the orchestrator restarted before it answered this request; send it again"


def _object(line: bytes) -> dict[str, Any]:
    """The message in a line; an empty one for what is not ours to understand."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _id(message: Mapping[str, Any]) -> Any:
    return _inside(message, "id")


def _inside(message: Any, *path: str) -> str | int | None:
    """The id or number at the end of a path of keys, whatever shape the message has."""
    for key in path:
        message = message.get(key) if isinstance(message, dict) else None
    return message if isinstance(message, str | int) else None


def _error(id_: Any, code: int, words: str) -> bytes:
    return _line({"jsonrpc": "2.0", "id": id_, "error": {"code": code, "message": words}})


def _line(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


# -- the command --------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """``orchestrator mcp``: pump until stdin ends. Returns the exit status."""
    options = _options(argv)
    if options is None:
        _say(USAGE)
        return 0 if argv in (["--help"], ["-h"]) else 2
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, _leave)
    os.set_blocking(1, True)  # a client may hand over a pipe that would refuse a long line
    environ = dict(os.environ)
    if file := options.get("--config") or environ.get("ORCHESTRATOR_CONFIG"):
        environ["ORCHESTRATOR_CONFIG"] = str(Path(file).resolve())  # the server starts in another directory
    project = Path(environ.get("CLAUDE_PROJECT_DIR") or Path.cwd()).resolve()
    shim = Shim(data_directory(options.get("--data-dir"), environ, project), project, environ)
    for line in sys.stdin.buffer:
        shim.forward(line if line.endswith(b"\n") else line + b"\n")
    return 0


def _options(argv: list[str]) -> dict[str, str] | None:
    """``--name value`` and ``--name=value``, the last winning. None if anything else is there."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if len(words) % 2 or not all(words) or not {"--config", "--data-dir"}.issuperset(words[::2]):
        return None
    return dict(zip(words[::2], words[1::2], strict=True))


def _say(text: str) -> None:
    sys.stderr.write(f"orchestrator mcp: {text}\n")  # stdout belongs to the protocol


def _leave(*_: object) -> None:
    os._exit(0)
