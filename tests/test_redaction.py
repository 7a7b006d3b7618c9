"""Secrets stay out of logs, rows, spans and errors: the redactor by itself, then over whole runs."""

import io
import json
import logging
import secrets
import string
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.delegation import delegate
from orchestrator.logs import ConsoleFormatter, JsonFormatter
from orchestrator.redaction import MARKER, Redactor, is_credential, secrets_of, secrets_of_servers
from orchestrator.runtime import Runtime
from orchestrator.store import open_store
from orchestrator.store.rows import Run
from orchestrator.task import Task
from orchestrator.testing import Fault, ModelServer, Reply, Request, Rule, ToolUse
from tests.conftest import write_agent
from tests.otlp import otlp_receiver

Open = Callable[..., AbstractAsyncContextManager[Runtime]]

# -- shapes of keys -----------------------------------------------------------------------------------------

ALNUM = string.ascii_letters + string.digits
PEM = (
    "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\n"
    + "\n".join(["MIIEpAIBAAKCAQEA7bq9Lw+/" * 2] * 3)
    + "\nAb==\n-----END RSA PRIVATE KEY-----"
)
KEYS = [
    "sk-ant-api03-AbCdEfGh_123-xyz",
    "sk-ant-oat01-" + "Ab9_" * 20,
    "orch-run-" + "x9Y_" * 10,
    "sk-proj-" + "a1B2" * 8 + "T3BlbkFJ" + "c3D4" * 8,
    "ghp_" + "a1B2" * 9,
    "ghs_" + "Z9y8" * 9,
    "github_pat_11ABCDEFG0" + "_abcdefghij" * 4,
    "glpat-" + "a1B2c3D4e5F6g7H8i9J0",
    "AKIAIOSFODNN7EXAMPLE",
    "ASIAIOSFODNN7EXAMPLE",
    "xoxb-123456789012-abcdefghijkl",
    "xapp-1-A0123456789-abcdef",
    "AIza" + "SyA1b2C" * 5,
    "sk_live_" + "a1B2" * 6,
    "rk_live_" + "a1B2" * 6,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
    PEM,
]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key[:12])
@pytest.mark.parametrize("around", ["{}", "the key {} was used", "'{}'", "K={}\n", "a: {}, b", "({})", "\n{}\n"])
def test_keys_are_known_by_their_shape(key: str, around: str) -> None:
    redact = Redactor()
    assert redact.text(around.format(key)) == around.format(MARKER)
    assert redact.data({"x": [{"y": around.format(key)}]}) == {"x": [{"y": around.format(MARKER)}]}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Authorization: Bearer abc.DEF-ghi_123~+/==", "Authorization: Bearer [redacted]"),
        ("authorization: bearer abc", "authorization: bearer [redacted]"),
        ("AUTHORIZATION=Basic dXNlcjpwYXNz", "AUTHORIZATION=Basic [redacted]"),
        ("{'Authorization': 'token 0123abcd', 'a': 1}", "{'Authorization': 'token [redacted]', 'a': 1}"),
        ("(b'authorization', b'Bearer 0123abcd')", "(b'authorization', b'Bearer [redacted]')"),
        ('{\\"authorization\\":\\"Bearer 0123abcd\\"}', '{\\"authorization\\":\\"Bearer [redacted]\\"}'),
        ("Authorization: 0123456789abcdef", "Authorization: [redacted]"),
        ("sent with Bearer 0123abcdef.", "sent with Bearer [redacted]"),
        ("Authorization%3A Bearer%200123abcdef", "Authorization%3A Bearer%20[redacted]"),
        ("x-api-key: 0123abcdef\nx: y", "x-api-key: [redacted]\nx: y"),
        ("X-Api-Key: 0123abcdef", "X-Api-Key: [redacted]"),
        ('"x-api-key":"0123abcdef"', '"x-api-key":"[redacted]"'),
    ],
)
def test_headers_lose_their_values(text: str, left: str) -> None:
    assert Redactor().text(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the bearer of bad news, a bearer token, bearer authentication",
        "Authorization: required. Set the authorization header; x-api-key: optional",
        "Authorization: Bearer ${ORCHESTRATOR_RUN_TOKEN}",
        'headers = {"Authorization": f"Bearer {token}", "x-api-key": key}',
        "sk-ant- is how keys begin",
        'if "-----BEGIN " in text: raise ValueError(text)',
        "task-runner risk-free desk-lamp ghp_short eyJ AKIA Akia_asia",
        "api_key = hashlib.sha256(salt).hexdigest()",
        "token = response.json()['access_token']",
        "0f8fad5b-d9cb-469f-a165-70867728950e toolu_01A09q90qw90lq917835lq9",
        "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    redact = Redactor(["another-secret"])
    assert redact.text(text) == text
    data = {"k": [text, 1, None, True, {"n": 1.5}]}
    assert redact.data(data) is data


def test_a_private_key_without_its_end_does_not_take_the_rest_along() -> None:
    code = 'if "-----BEGIN PRIVATE KEY-----" in text:\n    return "found"\n'
    assert Redactor().text(code) == 'if "[redacted]" in text:\n    return "found"\n'
    assert Redactor().text(PEM[:80]) == MARKER


def test_credential_headers_in_data_lose_values_of_any_shape() -> None:
    data = {"headers": {"x-api-key": "plain", "Authorization": "whatever", "Accept": "text/plain"}}
    redacted = {"headers": {"x-api-key": MARKER, "Authorization": MARKER, "Accept": "text/plain"}}
    assert Redactor().data(data) == redacted
    assert Redactor().data(redacted) is redacted
    kept = {"headers": {"Authorization": "Bearer ${TOKEN}"}}
    assert Redactor().data(kept) is kept


# -- values known to be secret ------------------------------------------------------------------------------

SECRETS = st.text(st.characters(exclude_categories=["Cs"]), min_size=8, max_size=40).filter(
    lambda value: len(value.strip()) >= 8 and value.strip() not in MARKER and MARKER not in value
)
# Words of which secrets, markers and keys are made, so that they meet, overlap and are cut.
PIECES = st.sampled_from(
    [
        *(
            "[",
            "]",
            "redacted",
            MARKER,
            " ",
            "\n",
            '"',
            "\\",
            "-",
            "eyJ",
            "sk-ant-",
            "Bearer ",
            "authorization: ",
            "a",
        ),
        *("AKIAIOSFODNN7EXAMPLE", "ghp_" + "a" * 30, "x-api-key: 1234abcd", "-----BEGIN PRIVATE KEY-----", "z" * 8),
    ]
)
MIXED = st.lists(st.one_of(PIECES, st.text(max_size=12)), max_size=8).map("".join)


@given(known=st.lists(SECRETS, min_size=1, max_size=4), before=MIXED, after=MIXED)
def test_known_values_never_survive(known: list[str], before: str, after: str) -> None:
    redact = Redactor(known)
    secret = known[0].strip()
    assert secret not in redact.text(before + secret + after).replace(MARKER, "")
    written = json.dumps(redact.data({"list": [before + secret + after], before + secret: None}))
    assert json.dumps(secret)[1:-1] not in written.replace(MARKER, "")


@given(known=st.lists(st.one_of(SECRETS, PIECES), max_size=4), text=MIXED)
def test_twice_is_as_good_as_once(known: list[str], text: str) -> None:
    redact = Redactor(known)
    once = redact.text(text + "".join(known) + text)
    assert redact.text(once) == once
    data = redact.data({text: [text + "".join(known)]})
    assert redact.data(data) == data


@given(secret=SECRETS.map(str.strip), text=st.text(string.ascii_lowercase + " ", max_size=60))
def test_text_is_left_as_it_is_around_a_secret(secret: str, text: str) -> None:
    if secret[:8] not in text and secret[-8:] not in text:
        assert Redactor([secret]).text(f"{text}|{secret}|{text}") == f"{text}|{MARKER}|{text}"


def test_a_secret_that_is_cut_off_is_recognised() -> None:
    secret = "correct-horse-battery"
    redact = Redactor([secret])
    assert redact.text("so far: correct-horse-b") == f"so far: {MARKER}"
    assert redact.text("orse-battery and so on") == f"{MARKER} and so on"
    assert redact.text("correct-horse") == MARKER
    assert redact.text("correct answer") == "correct answer"
    assert redact.data({"stderr": "orse-battery was refused"}) == {"stderr": f"{MARKER} was refused"}


@pytest.mark.parametrize("secret", ['pa"ss\\word', "line one\nline two", "pässwörd1", "a&b=c d/e?"])
def test_escaped_forms_are_found(secret: str) -> None:
    from urllib.parse import quote

    redact = Redactor([secret])
    for written in (json.dumps({"k": secret}), json.dumps({"k": secret}, ensure_ascii=False)):
        assert redact.text(written) == f'{{"k": "{MARKER}"}}'
        assert json.loads(redact.json(written)) == {"k": MARKER}
        assert redact.data({"nested": written}) == {"nested": f'{{"k": "{MARKER}"}}'}
    assert redact.text(f"https://host/?q={quote(secret, safe='')}&x") == f"https://host/?q={MARKER}&x"


@pytest.mark.parametrize("value", ["", "short", "1234567", "       x  ", "redacted", "[redacted"])
def test_short_values_and_parts_of_the_marker_are_no_secrets(value: str) -> None:
    text = f"{value} and {MARKER} and short words 1234567"
    assert Redactor([value]).text(text) == text


def test_the_longest_secret_goes_first() -> None:
    redact = Redactor(["password", "password-and-more"])
    redact.add_secret("password-and-more-still")
    assert redact.text("password-and-more-still password-and-more password") == f"{MARKER} {MARKER} {MARKER}"


def test_the_redactor_does_not_tell_its_secrets() -> None:
    assert "hunter2hunter2" not in repr(Redactor(["hunter2hunter2"]))


def test_no_depth_is_too_much() -> None:
    text = "[" * 50_000 + '"sk-ant-api03-AbCdEfGh"' + "]" * 50_000
    assert Redactor().json(text) == text.replace("sk-ant-api03-AbCdEfGh", MARKER)


def test_data_that_is_not_quite_json() -> None:
    data = {1: Path("/srv/sk-ant-api03-AbCdEfGh"), "\ud800": ("sk-ant-api03-AbCdEfGh", "\ud800")}
    assert Redactor().data(data) == {"1": f"/srv/{MARKER}", "\ud800": [MARKER, "\ud800"]}


# -- which values are secret --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("ANTHROPIC_API_KEY", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "apiKey", "Authorization", "DB_PASSWORD"),
        *(
            "ANTHROPIC_AUTH_TOKEN",
            "client_secret",
            "OAUTH",
            "GOOGLE_CREDENTIALS",
            "PGPASSWORD",
            "x-api-key",
            "KEY2",
        ),
    ],
)
def test_names_of_credentials(name: str) -> None:
    assert is_credential(name)


@pytest.mark.parametrize(
    "name",
    [
        "PATH",
        "GIT_AUTHOR_NAME",
        "KEYBOARD",
        "TOKENIZERS_PARALLELISM",
        "SSH_AUTH_SOCK",
        "KEY_FILE",
        "XAUTHORITY",
        "",
    ],
)
def test_names_of_other_things(name: str) -> None:
    assert not is_credential(name)


def test_secrets_among_variables_and_headers() -> None:
    variables = {
        "API_KEY": "k-value",
        "HOME": "/home/me",
        "AUTHORIZATION": "Bearer the-token",
        "DATABASE_URL": "postgres://me:pass-word@host/db",
        "HTTPS_PROXY": "http://:only-password@proxy:3128",
        "PLAIN_URL": "http://host:80/a@b",
        "A_TOKEN": "${FROM_ELSEWHERE}",
        "PORT_KEY": 5,
    }
    assert set(secrets_of(variables)) == {
        "k-value", "Bearer the-token", "the-token", "pass-word", "only-password",
    }  # fmt: skip
    servers = {
        "a": {"headers": {"X-Service-Token": "t-value", "Accept": "json"}},
        "b": {"env": {"B_SECRET": "s-value"}},
        "c": "name",
        "d": {"headers": None},
    }
    assert set(secrets_of_servers(servers)) == {"t-value", "s-value"}


# -- logs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def captured() -> Iterator[Callable[[logging.Formatter], io.StringIO]]:
    """Everything the package logs from DEBUG on, in the form of the formatter given."""
    loggers = [logging.getLogger(name) for name in ("orchestrator", "mcp_tools", "opentelemetry")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]

    def capture(formatter: logging.Formatter) -> io.StringIO:
        out = io.StringIO()
        handler = logging.StreamHandler(out)
        handler.setFormatter(formatter)
        for logger in loggers:
            logger.addHandler(handler)
            logger.setLevel(logging.DEBUG)
        return out

    yield capture
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.mark.parametrize("form", [ConsoleFormatter, JsonFormatter])
def test_logs_hide_known_values(
    captured: Callable[[logging.Formatter], io.StringIO], form: type[ConsoleFormatter | JsonFormatter]
) -> None:
    redact = Redactor(['tell"nobody'])
    out = captured(form(redact))
    log = logging.getLogger("orchestrator.test")
    log.debug("with %s", 'tell"nobody')
    redact.add_secret("learned later")
    try:
        raise ValueError('tell"nobody: learned later')
    except ValueError:
        log.exception("failed: %r", ["learned later"])
    said = out.getvalue()
    assert f"with {MARKER}" in said
    assert f"ValueError: {MARKER}: {MARKER}" in said
    assert "nobody" not in said
    assert "learned" not in said


# -- the store ----------------------------------------------------------------------------------------------


def everything_in(folder: Path) -> bytes:
    """The bytes of every file below: databases, write-ahead logs, whatever else was left."""
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


async def test_no_secret_reaches_the_file(tmp_path: Path) -> None:
    secret, key = secrets.token_hex(20), "sk-ant-api03-" + secrets.token_hex(10)
    said = f"{secret} and {key}"
    folder = tmp_path / "store"
    async with open_store(folder / "runs.db", redact=Redactor([secret])) as store:
        row = Run(
            id="a" * 16, trace_id="b" * 32, root_id="a" * 16, depth=1, kind="agent", name="helper", prompt=said,
            text=said, structured={"x": [said]}, has_structured=True, error={"message": said}, agent={"p": said},
            options={"o": said}, caller={"c": said}, project="/", cwd="/", created_us=1,
            instance_id=store.instance_id,
        )  # fmt: skip
        await store.create_run(row)
        await store.note_progress(row.id, text=f"so far {secret[:12]}")
        await store.update_run(row.id, text=said, error={"message": said})
        await store.add_message(row.id, 1, "user", None, {"a": [said], said: {"authorization": "x y z"}})
        kept = await store.run(row.id)
        row.ended_us = 2
        await store.finish_run(row)
        assert row.prompt == said  # the row in memory is the caller's
        [message] = await store.messages(row.id)
        left = everything_in(folder)
    for there in (left, everything_in(folder)):
        assert MARKER.encode() in there
        assert secret[:12].encode() not in there
        assert key.encode() not in there
    ended = f"{MARKER} and {MARKER}"
    assert (kept.prompt, kept.structured, kept.options) == (ended, {"x": [ended]}, {"o": ended})
    assert message.body == {"a": [ended], ended: {"authorization": MARKER}}


# -- whole runs ---------------------------------------------------------------------------------------------


class Planted:
    """Random values put where secrets come from. None has the shape of a key."""

    def __init__(self) -> None:
        self.api_key, self.passed, self.header, self.bearer = (secrets.token_hex(16) for _ in range(4))

    def values(self) -> list[str]:
        return [self.api_key, self.passed, self.header, self.bearer]

    def said(self) -> str:
        return " ".join([*self.values(), "ghp_" + "a1B2" * 9])

    def assert_absent(self, where: str, text: str) -> None:
        for name, value in vars(self).items():
            assert value not in text, f"{name} in {where}"
            assert value[:16] not in text, f"part of {name} in {where}"
        assert "ghp_a1B2" not in text, f"a key in {where}"

    def environ(self, **more: str) -> dict[str, str]:
        return {"PASSED_TOKEN": self.passed, **more}

    def write_agent(self, project: Path) -> dict[str, Any]:
        headers = {"X-Service-Token": self.header, "Authorization": f"Bearer {self.bearer}"}
        servers = {"svc": {"type": "http", "url": "http://127.0.0.1:9/mcp", "headers": headers}}
        write_agent(project, "spy", tools="Bash(env)", mcpServers=json.dumps(servers))
        return servers


def settings(planted: Planted) -> dict[str, Any]:
    return {
        "claude__env__ANTHROPIC_API_KEY": planted.api_key,
        "claude__pass_env": ["PASSED_*"],
        "telemetry__content": True,
    }


def spans_text(spans: list[Any]) -> str:
    return "\n".join(f"{span.name} {span.attributes} {span.status_message}" for span in spans)


async def test_no_secret_survives_a_whole_run(
    runtime: Open,
    model: ModelServer,
    project: Path,
    tmp_path: Path,
    captured: Callable[[logging.Formatter], io.StringIO],
) -> None:
    planted = Planted()
    servers = planted.write_agent(project)
    outputs: list[str] = []

    def answer(request: Request) -> Reply:
        outputs.append(request.all_tool_results[-1].text)
        return Reply(f"it said {planted.said()}")

    model.rules = [Rule(ToolUse("Bash", {"command": "env"}), when={"tool_result": False}), Rule(answer)]
    logs = captured(ConsoleFormatter())
    async with otlp_receiver() as receiver:
        environ = planted.environ(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint)
        with anyio.fail_after(60):
            async with runtime(env=environ, **settings(planted)) as rt:
                rt.store.redact.add_secrets(secrets_of_servers(servers))
                logging.getLogger("orchestrator.test").debug("heard: %s", planted.said())
                outcome = await delegate(rt, Task(agent="spy", prompt=f"use {planted.said()}"))
                planted.assert_absent(
                    "the store while it is open", everything_in(tmp_path / "data").decode("latin-1")
                )
                run, messages = await rt.store.run(outcome.run_id), await rt.store.messages(outcome.run_id)
    assert outcome.ok, outcome.error
    # The agent itself had them all: its work is not hindered.
    assert all(value in outputs[0] for value in planted.values())
    assert planted.said() in str(model.journal[0].body)
    planted.assert_absent("the store", everything_in(tmp_path / "data").decode("latin-1"))
    planted.assert_absent("the logs", logs.getvalue())
    planted.assert_absent("the spans", spans_text(receiver.spans))
    assert receiver.named("invoke_agent spy")
    assert outcome.run_id in logs.getvalue()
    assert f"heard: {MARKER}" in logs.getvalue()
    assert run.prompt is not None
    assert run.prompt.count(MARKER) == 5
    assert any("PASSED_TOKEN=[redacted]" in json.dumps(message.body) for message in messages)


async def test_no_secret_survives_a_run_that_fails(
    runtime: Open, model: ModelServer, project: Path, tmp_path: Path,
    captured: Callable[[logging.Formatter], io.StringIO],
) -> None:  # fmt: skip
    planted = Planted()
    servers = planted.write_agent(project)
    fault = Fault(status=401, error_type="authentication_error", message=f"not accepted: {planted.said()}")
    model.rules = [Rule(Reply(fault=fault))]
    logs = captured(JsonFormatter())
    async with otlp_receiver() as receiver:
        environ = planted.environ(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint)
        with anyio.fail_after(60):
            async with runtime(env=environ, **settings(planted)) as rt:
                rt.store.redact.add_secrets(secrets_of_servers(servers))
                outcome = await delegate(rt, Task(agent="spy", prompt="go"))
                run = await rt.store.run(outcome.run_id)
    assert outcome.status == "failed"
    assert MARKER in json.dumps(run.error)
    planted.assert_absent("the store", everything_in(tmp_path / "data").decode("latin-1"))
    planted.assert_absent("the logs", logs.getvalue())
    # The CLI sends its own spans itself: what it puts on them does not pass through here.
    ours = [span for span in receiver.spans if span.service == "orchestrator"]
    assert MARKER in spans_text(ours)
    planted.assert_absent("the spans", spans_text(ours))


async def test_no_secret_is_in_what_is_told_of_a_runs_end(runtime: Open, model: ModelServer) -> None:
    planted = Planted()
    fault = Fault(status=401, error_type="authentication_error", message=f"not accepted: {planted.said()}")
    model.rules = [Rule(Reply(fault=fault))]
    with anyio.fail_after(60):
        async with runtime(env=planted.environ(), **settings(planted)) as rt:
            rt.store.redact.add_secrets(planted.values())
            with rt.events.watch() as watcher:
                outcome = await delegate(rt, Task(agent="helper", prompt="go"))
                run = await rt.store.run(outcome.run_id)
                told = [event.data for event in watcher.rest()]
    assert outcome.error == run.error
    planted.assert_absent("the outcome", json.dumps(outcome.error))
    planted.assert_absent("the events", json.dumps(told))
