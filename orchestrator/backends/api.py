"""A conversation over the Messages API: one streamed request for each prompt, told in the CLI's own messages.

Whoever takes in a turn of the CLI takes in this one: init, the provider's events, a message for each content block,
a result. Only failures come otherwise: they are raised, with the class and the waiting time the provider gave them.

Nothing is requested twice. The SDK's retries are off, because its caller is itself what is done after a failure.
"""

import importlib
import importlib.util
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import TaskGroup

from orchestrator.backends.api_errors import error_of_ending, error_of_request, may_have_cost
from orchestrator.backends.api_fallback import KEY_ENV, api_model, lacking_on_api
from orchestrator.backends.api_http import custom_headers, http_client
from orchestrator.backends.api_messages import Telling
from orchestrator.config import FallbackConfig
from orchestrator.conversation import Conversation, Spec, Turn
from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.groups import unwrapped
from orchestrator.messages import Message, parse_message

if TYPE_CHECKING:
    import anthropic

API_URL = "https://api.anthropic.com"


def installed() -> bool:
    """Whether the SDK is there (the extra ``api``). Does not load it."""
    return importlib.util.find_spec("anthropic") is not None


def open_fallback(spec: Spec, settings: FallbackConfig) -> AbstractAsyncContextManager[Conversation]:
    """The conversation that stands in for the CLI's, with the key and the address the CLI would have had.

    Raises what ``connect_api`` raises, on entering.
    """
    return connect_api(
        spec,
        base_url=spec.env.get("ANTHROPIC_BASE_URL") or API_URL,
        api_key=spec.env.get(KEY_ENV, ""),
        models=settings.models,
        max_tokens=settings.max_tokens,
        timeout_s=settings.timeout_s,
    )


@asynccontextmanager
async def connect_api(
    spec: Spec, *, base_url: str, api_key: str, models: Mapping[str, str], max_tokens: int, timeout_s: float
) -> AsyncIterator["ApiConversation"]:
    """Open a conversation over the Messages API. Leaving the context ends the request under way.

    ``models`` maps names of models to the API's ids, ``max_tokens`` bounds one answer, and ``timeout_s`` (seconds)
    how long the provider may be silent. Proxies and certificates are those of ``spec.env``.

    Raises ConfigError for what the API path does not have, for a key that is none, and without the extra ``api``.
    """
    if (lacking := lacking_on_api(spec, models)) is not None:
        raise ConfigError(f"the Messages API cannot stand in for the CLI: {lacking}")
    if not api_key or not all("!" <= character <= "~" for character in api_key):
        # Said here, because the HTTP client would name the whole key in its complaint.
        raise ConfigError(f"{KEY_ENV} is empty or has characters no key has")
    if not installed():
        raise ConfigError("the Messages API needs an extra", advice="pip install 'orchestrator-mcp[api]'")
    # In a thread: loading it takes a second, and other runs are at work.
    sdk = await anyio.to_thread.run_sync(_load_sdk)
    client = sdk.AsyncAnthropic(
        api_key=api_key,
        base_url=base_url,
        max_retries=0,
        open_telemetry=False,  # the run is the span
        http_client=http_client(spec.env, base_url, timeout_s),
    )
    # The SDK takes such headers from our own environment, an Authorization among them, and nothing turns that off.
    client._custom_headers = custom_headers(spec.env)  # noqa: SLF001
    try:
        fixed = _parameters(spec, sdk, max_tokens)
        with unwrapped():
            async with anyio.create_task_group() as tg:
                yield ApiConversation(spec, client, tg, models, fixed)
                tg.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await client.close()


class ApiConversation:
    """One conversation; its history is kept here and goes along with each prompt."""

    def __init__(
        self,
        spec: Spec,
        client: "anthropic.AsyncAnthropic",
        tg: TaskGroup,
        models: Mapping[str, str],
        fixed: Mapping[str, Any],
    ) -> None:
        self._spec = spec
        self._client = client
        self._tg = tg
        self._models = models
        self._model = spec.model
        self._fixed = fixed
        self._history: list[dict[str, Any]] = []
        self._pending: deque[Message] = deque()
        self._news = anyio.Event()
        self._error: OrchestratorError | None = None
        self._scope = anyio.CancelScope()
        self._results = 0

    def __repr__(self) -> str:
        return f"<ApiConversation {self._model} results={self._results}>"

    @property
    def stderr_tail(self) -> str:
        return ""

    async def prepare(self, turn: Turn) -> None:
        """Nothing has to be told before the prompt."""

    async def send(self, turn: Turn) -> None:
        """Start the request. What else a turn brings is for tools, which there are none of.

        Raises ConfigError for a model whose id is not known.
        """
        self._model = turn.model or self._model
        if (model := api_model(self._model, self._models)) is None:
            raise ConfigError(f"fallback.models has no entry {self._model!r}, and it is not a model id of the API")
        self._error, self._scope = None, anyio.CancelScope()
        self._tg.start_soon(self._converse, turn.prompt, Telling(self._spec, turn, model), self._scope)

    async def answer(self, request_id: str, response: Mapping[str, Any]) -> None:
        """The API asks nothing."""

    async def interrupt(self) -> None:
        self._scope.cancel()

    async def receive(self) -> Message:
        """As the protocol has it, but for a failed request its error is raised; see ``backends.api_errors``."""
        while not self._pending:
            if self._error is not None:
                raise self._error
            await self._news.wait()
        return self._pending.popleft()

    async def _converse(self, prompt: str, telling: Telling, scope: anyio.CancelScope) -> None:
        asked = [*self._history, {"role": "user", "content": prompt}]
        try:
            with scope:
                await self._ask(telling, asked)
                self._history = [*asked, {"role": "assistant", "content": telling.blocks}]
        except OrchestratorError as error:
            self._error = error
            self._put(telling.cut())
        else:
            interrupted = scope.cancelled_caught
            self._put([*telling.begin(), *telling.cut(), telling.result(self._results, interrupted=interrupted)])
            self._results += 1

    async def _ask(self, telling: Telling, messages: list[dict[str, Any]]) -> None:
        request: dict[str, Any] = {**self._fixed, "model": telling.model, "messages": messages}
        try:
            async with self._client.messages.stream(**request) as stream:
                async for event in stream:
                    if event.type == "message_start":
                        telling.answer = stream.current_message_snapshot  # the SDK goes on filling it
                    self._put(telling.messages_of(event))
        except Exception as problem:
            if may_have_cost(problem):
                self._put(telling.begin())
            raise error_of_request(problem, now=time.time()) from problem
        if (error := error_of_ending(telling.stop_reason, telling.text)) is not None:
            raise error

    def _put(self, messages: list[dict[str, Any]]) -> None:
        """Make messages, or the error just set, known to who waits for them."""
        self._pending.extend(parse_message(json.dumps(message)) for message in messages)
        news, self._news = self._news, anyio.Event()
        news.set()


def _load_sdk() -> Any:
    sdk = importlib.import_module("anthropic")
    importlib.import_module("anthropic.resources.messages")
    return sdk


def _parameters(spec: Spec, sdk: Any, max_tokens: int) -> dict[str, Any]:
    """What all requests of a conversation share. Raises ConfigError for a schema the SDK cannot say."""
    system = "\n\n".join(filter(None, (spec.system_prompt, spec.append_system_prompt)))
    output: dict[str, Any] = {"effort": spec.effort} if spec.effort else {}
    if spec.output_schema is not None:
        try:
            output["format"] = {"type": "json_schema", "schema": sdk.transform_schema(dict(spec.output_schema))}
        except (ValueError, TypeError, AssertionError) as error:
            raise ConfigError(f"the API cannot be held to the output schema: {error}") from error
    given = {"system": system, "output_config": output}
    return {"max_tokens": max_tokens, **{name: value for name, value in given.items() if value}}
