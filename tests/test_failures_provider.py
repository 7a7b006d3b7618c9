"""Every way a provider is known to fail, beside those of test_faults: the right error, soon, and a runtime as good
as new after it."""

import json
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import ByteStream
from anyio.streams.tls import TLSListener

from orchestrator.config import Config
from orchestrator.delegation import delegate
from orchestrator.runtime import open_runtime
from orchestrator.task import Task
from orchestrator.testing import Fault, ModelServer, Reply, Rule, Text, ToolUse
from tests.failures import (
    OpenRuntime,
    Verdict,
    all_at_once,
    error_of,
    faulty,
    nothing_is_left_of,
    nothing_outlives_the_test,  # noqa: F401  # an autouse fixture
    runs_well,
    says,
    verdict,
    write_cli,
)


def refusal(status: int, kind: str, message: str, code: str) -> Reply:
    """The provider's error body with the code it gives some refusals beside their type."""
    error = {"type": kind, "message": message, "details": {"error_code": code}}
    body = json.dumps({"type": "error", "error": error})
    return Reply(fault=Fault(status=status, body=body, content_type="application/json"))


INVALID: Verdict = ("failed", "invalid_request", False, "request")
PERMISSION: Verdict = ("failed", "permission", False, "account")
AUTHENTICATION: Verdict = ("failed", "authentication", False, "account")
BILLING: Verdict = ("failed", "billing", False, "account")
RATE_LIMIT: Verdict = ("failed", "rate_limit", True, "account")
SERVER: Verdict = ("failed", "server_error", True, "provider")
CONNECTION: Verdict = ("failed", "connection", True, "provider")
STALLED: Verdict = ("failed", "stalled", True, "provider")

#: Answers with a status: what the model says, the verdict, what was said before it.
REFUSED: Mapping[str, tuple[Reply, Verdict, str]] = {
    "a malformed request": (faulty(status=400, message="messages.0: bad"), INVALID, ""),
    "no credit, by status": (faulty(status=402), BILLING, ""),
    "too long a prompt": (
        faulty(status=400, message="prompt is too long: 210000 tokens > 200000 maximum"), INVALID, ""),
    "too long with the answer": (
        faulty(status=400, message="input length and `max_tokens` exceed context limit: 199000 + 32000 > 200000"),
        INVALID, ""),
    "too large a request": (faulty(status=413), INVALID, ""),
    "verification": (refusal(403, "permission_error", "Verify first.", "verification_required"), PERMISSION, ""),
    "a revoked login": (faulty(status=403, message="OAuth token has been revoked"), AUTHENTICATION, ""),
    "keys switched off": (
        faulty(status=403, message="API key authentication is disabled for this organization"), AUTHENTICATION, ""),
    "a limit that says not to retry": (
        faulty(status=429, headers={"x-should-retry": "false"}), RATE_LIMIT, ""),
    "a cap on spending": (
        faulty(status=429, error_type="billing_error", headers={"x-should-retry": "false"}), BILLING, ""),
    "a limit with headers nobody reads": (
        faulty(status=429, headers={"anthropic-ratelimit-unified-status": "rejected"}), RATE_LIMIT, ""),
    "a gateway in trouble": (faulty(status=502, body="<html>Bad gateway</html>"), SERVER, ""),
    "a gateway that waited in vain": (faulty(status=504), SERVER, ""),
}  # fmt: skip

#: Answers that begin well, or seem to.
BROKEN: Mapping[str, tuple[Reply, Verdict, str]] = {
    "garbled": (faulty(malformed_at=4), CONNECTION, "Half an"),
    "overload, told late": (
        faulty(error_at=4, error_type="overloaded_error"), ("failed", "overloaded", True, "provider"), "Half an"),
    "another service": (faulty(body='{"hello": 1}', content_type="application/json"), CONNECTION, ""),
    "an empty stream": (faulty(body="", content_type="text/event-stream"), CONNECTION, ""),
    "events of another kind": (
        faulty(body='event: x\ndata: {"type": "x"}\n\n', content_type="text/event-stream"), CONNECTION, ""),
    "a full context window": (
        Reply("Some.", stop_reason="model_context_window_exceeded"), INVALID, "Some.\n\nSome.\n\nSome.\n\nSome."),
}  # fmt: skip


@pytest.mark.parametrize("rows", [REFUSED, BROKEN], ids=["refused", "broken"])
async def test_the_right_error(
    runtime: OpenRuntime, model: ModelServer, rows: Mapping[str, tuple[Reply, Verdict, str]]
) -> None:
    model.rules = [says(name, reply) for name, (reply, _, _) in rows.items()]
    async with runtime(claude__max_retries=0) as rt:
        with anyio.fail_after(60):
            outcomes = await all_at_once(rt, rows)
        assert {name: (verdict(o), o.text) for name, o in outcomes.items()} == {
            name: (expected, text) for name, (_, expected, text) in rows.items()
        }
        assert not model.unmatched
        for outcome in outcomes.values():
            await nothing_is_left_of(outcome)
        await runs_well(rt, model)


#: Oddities of an answer that are none of a run: what the model says, and the text in the end.
ODD: Mapping[str, tuple[list[Any], str]] = {
    "empty": ([Reply([])], ""),
    "paused": ([Reply("I wait.", stop_reason="pause_turn")], "I wait."),
    "broken arguments": ([ToolUse("Read", '{"file_path": '), "Sorry."], "Sorry."),
    "unknown tool": ([ToolUse("Frobnicate", {}), "Sorry."], "Sorry."),
    "ten megabytes": ([Reply(Text("0123456789", repeat=1_000_000), chunks=100)], "0123456789" * 1_000_000),
}


async def test_odd_answers_are_answers(runtime: OpenRuntime, model: ModelServer) -> None:
    model.rules = [says(name, *replies) for name, (replies, _) in ODD.items()]
    async with runtime() as rt:
        with anyio.fail_after(60):
            outcomes = await all_at_once(rt, ODD)
    assert {name: (o.status, o.text) for name, o in outcomes.items()} == {
        name: ("succeeded", text) for name, (_, text) in ODD.items()
    }
    told = [result for request in model.journal for result in request.tool_results]
    assert [result.is_error for result in told] == [True, True]
    assert not model.unmatched


async def test_an_answer_in_two_parts_is_whole(runtime: OpenRuntime, model: ModelServer) -> None:
    """The model ran into its limit of tokens and was asked to go on: what it had said before counts."""
    model.rules = [Rule([Reply("The first half,", stop_reason="max_tokens"), " and the second."])]
    async with runtime() as rt:
        with anyio.fail_after(60):
            outcome = await delegate(rt, Task(agent="helper", prompt="x"))
    assert outcome.status == "succeeded"
    assert "The first half," in outcome.text
    assert "and the second." in outcome.text


async def test_five_megabytes_of_a_command(runtime: OpenRuntime, model: ModelServer) -> None:
    command = ToolUse("Bash", {"command": "seq 1 800000"})
    model.rules = [
        Rule(Reply(["Counting.", command]), when={"tool_result": False}),
        Rule("Counted.", when={"tool_result": True}),
    ]
    async with runtime() as rt:
        with anyio.fail_after(60):
            outcome = await delegate(rt, Task(agent="worker", prompt="count", allowed_tools=("Bash(seq *)",)))
    assert (outcome.status, outcome.text) == ("succeeded", "Counted.")
    [result] = model.journal[-1].tool_results
    assert not result.is_error
    assert len(result.text) < 100_000  # the CLI keeps the rest in a file


async def test_the_fallback_model_answers_for_one_that_is_overloaded(
    runtime: OpenRuntime, model: ModelServer
) -> None:
    model.rules = [
        Rule(faulty(status=529), when={"model": "opus"}),
        Rule("Instead of it.", when={"model": "sonnet"}),
    ]
    async with runtime(claude__max_retries=3) as rt:
        with anyio.fail_after(60):
            task = Task(agent="helper", prompt="x", fallback_model="claude-sonnet-5-5")
            outcome = await delegate(rt, task)
    assert (outcome.status, outcome.text, outcome.model) == ("succeeded", "Instead of it.", "claude-sonnet-5-5")


async def test_a_schema_the_model_never_meets(runtime: OpenRuntime, model: ModelServer) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    model.rules = [Rule(ToolUse("StructuredOutput", {"n": "seven"}))]
    async with runtime() as rt:
        with anyio.fail_after(60):
            outcome = await delegate(rt, Task(agent="helper", prompt="x", output_schema=schema))
        assert verdict(outcome) == ("failed", "structured_output", True, "request")
        assert not outcome.has_structured
        await runs_well(rt, model)


# --- The CLI's own names for what went wrong

#: Fields of a result → the verdict. Where a name is given it says more than the status.
NAMED: Mapping[str, tuple[dict[str, Any], Verdict]] = {
    "an old CLI": (
        {"api_error": "claude_code_version_too_old", "api_error_status": 400},
        ("failed", "cli_not_found", False, "host")),
    "a key nobody takes": ({"api_error": "org_disabled_credential", "api_error_status": 403}, AUTHENTICATION),
    "a gateway's login": ({"api_error": "gateway_session_expired", "api_error_status": 401}, AUTHENTICATION),
    "a model that costs extra": (
        {"api_error": "model_requires_usage_credits", "api_error_status": 429}, BILLING),
    "no other model": (
        {"api_error": "no_allowed_fallback", "api_error_status": 400},
        ("failed", "model_not_found", False, "agent")),
    "a blocked network": (
        {"api_error": "network_edge_blocked", "api_error_status": 403}, ("failed", "connection", False, "host")),
    "a broken certificate": (
        {"api_error": "tls_cert_signature_failure"}, ("failed", "connection", False, "host")),
    "a laptop that slept": ({"api_error": "computer_slept"}, CONNECTION),
    "an answer of nothing": ({"api_error": "empty_completion"}, SERVER),
    "tools called badly": (
        {"api_error": "malformed_tool_use_exhausted"}, ("failed", "backend", True, "request")),
    "a name not known yet": ({"api_error": "brand_new", "api_error_status": 529},
                             ("failed", "overloaded", True, "provider")),
    "nothing known": ({}, ("failed", "backend", False, "request")),
}  # fmt: skip

NAMING_CLI = """
fields = json.loads(hear('user')['message']['content'])
begin(); result('no words that tell', is_error=True, terminal_reason='api_error', **fields)
"""


async def test_the_clis_own_names(runtime: OpenRuntime, tmp_path: Path) -> None:
    async with runtime(claude__path=str(write_cli(tmp_path / "claude", NAMING_CLI))) as rt:
        with anyio.fail_after(60):
            outcomes = await all_at_once(rt, [json.dumps(fields) for fields, _ in NAMED.values()])
    assert {name: verdict(outcomes[json.dumps(fields)]) for name, (fields, _) in NAMED.items()} == {
        name: expected for name, (_, expected) in NAMED.items()
    }


# --- Time


async def test_a_head_that_does_not_come(runtime: OpenRuntime, model: ModelServer) -> None:
    model.rules = [Rule(Reply("Too late.", delay_s=60))]
    async with runtime(claude__max_retries=0, claude__request_timeout_s=1) as rt:
        with anyio.fail_after(60):
            outcome = await delegate(rt, Task(agent="helper", prompt="x"))
        assert verdict(outcome) == STALLED
        await nothing_is_left_of(outcome)
        await runs_well(rt, model)


async def test_how_long_to_wait_after_retries(runtime: OpenRuntime, model: ModelServer) -> None:
    """The CLI tells the pause it makes. One longer than its own is what the provider asked for."""
    rows = {"asked": faulty(status=429, headers={"retry-after": 2}), "not asked": faulty(status=429)}
    model.rules = [says(name, reply) for name, reply in rows.items()]
    async with runtime(claude__max_retries=1, limits__park=False) as rt:
        with anyio.fail_after(60):
            outcomes = await all_at_once(rt, rows)
    assert [verdict(outcome) for outcome in outcomes.values()] == [RATE_LIMIT, RATE_LIMIT]
    assert 2 <= error_of(outcomes["asked"])["retry_after"] <= 3
    assert "retry_after" not in error_of(outcomes["not asked"])


# --- Logins


@pytest.fixture
def under(make_config: Callable[..., Config], environ: dict[str, str]) -> Callable[..., Any]:
    """Opens runtimes whose CLI has these credentials, and no others."""

    def open_one(**credentials: str) -> Any:
        config = make_config(claude__max_retries=3, limits__park=False)
        variables = {k: v for k, v in config.claude.env.items() if k != "ANTHROPIC_API_KEY"} | credentials
        claude = config.claude.model_copy(update={"env": variables})
        return open_runtime(config.model_copy(update={"claude": claude}), environ=environ)

    return open_one


async def test_a_login_without_credentials(under: Callable[..., Any], model: ModelServer) -> None:
    async with under() as rt:
        with anyio.fail_after(60):
            outcome = await delegate(rt, Task(agent="helper", prompt="x"))
    assert verdict(outcome) == AUTHENTICATION
    assert "auth login" in error_of(outcome)["advice"]
    assert not model.journal
    assert outcome.cost_usd == 0


OAUTH = {"CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-test-loopback"}


async def test_a_usage_window_that_is_used_up(under: Callable[..., Any], model: ModelServer) -> None:
    """A subscription's limit names the time it ends at, and waiting is until then."""
    ends_at = int(time.time()) + 3600
    headers: dict[str, str | int | float] = {
        "anthropic-ratelimit-unified-status": "rejected",
        "anthropic-ratelimit-unified-reset": ends_at,
        "anthropic-ratelimit-unified-representative-claim": "five_hour",
        "anthropic-ratelimit-unified-5h-utilization": "1.0",
        "retry-after": 3600,
    }
    model.rules = [Rule(faulty(status=429, headers=headers))]
    async with under(**OAUTH) as rt:
        with anyio.fail_after(60):
            outcome = await delegate(rt, Task(agent="helper", prompt="x"))
        assert verdict(outcome) == RATE_LIMIT
        assert "5-hour limit" in error_of(outcome)["message"]
        assert len(model.journal) == 1
        assert 3500 < error_of(outcome).get("retry_after", 0) <= 3600
        with anyio.fail_after(60):
            after = await delegate(rt, Task(agent="helper", prompt="y"))
        assert verdict(after) == RATE_LIMIT, "it is the account's limit, so it is every run's"
        assert len(model.journal) == 1


async def test_refused_logins_end_at_once(under: Callable[..., Any], model: ModelServer) -> None:
    """The CLI by itself tries a refused login again for minutes; credit and verification it does not."""
    rows = {
        "a refused token": (faulty(status=401), AUTHENTICATION),
        "a revoked token": (faulty(status=403, message="OAuth token has been revoked"), AUTHENTICATION),
        "no credit": (faulty(status=400, message="Your credit balance is too low"), BILLING),
        "verification": (refusal(403, "permission_error", "Verify.", "verification_required"), PERMISSION),
        "not a usage limit": (faulty(status=429, headers={"retry-after": 90}), RATE_LIMIT),
    }
    model.rules = [says(name, reply) for name, (reply, _) in rows.items()]
    async with under(**OAUTH) as rt:
        with anyio.fail_after(60):
            outcomes = await all_at_once(rt, rows)
        assert {name: verdict(o) for name, o in outcomes.items()} == {n: v for n, (_, v) in rows.items()}
        await runs_well(rt, model)


# --- TLS


@asynccontextmanager
async def untrusted_server(folder: Path) -> AsyncIterator[str]:
    """The address of a TLS server whose certificate nobody has signed but itself."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject]
    await anyio.run_process([*command, "-keyout", str(key), "-out", str(certificate)], stderr=subprocess.DEVNULL)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def hang_up(stream: ByteStream) -> None:
        await stream.aclose()

    plain = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = plain.listeners[0].extra(anyio.abc.SocketAttribute.local_port)
    async with TLSListener(plain, context, standard_compatible=False) as listener, anyio.create_task_group() as tg:
        tg.start_soon(listener.serve, hang_up)
        yield f"https://127.0.0.1:{port}"
        tg.cancel_scope.cancel()


async def test_a_certificate_nobody_signed(runtime: OpenRuntime, tmp_path: Path) -> None:
    async with untrusted_server(tmp_path) as url, runtime(claude__base_url=url) as rt:
        with anyio.fail_after(60):
            outcome = await delegate(rt, Task(agent="helper", prompt="x"))
    assert verdict(outcome) == ("failed", "connection", False, "host")
    assert "NODE_EXTRA_CA_CERTS" in error_of(outcome)["advice"]
    assert outcome.cost_usd == 0
