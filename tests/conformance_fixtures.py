"""Tools, resources and prompts that scenarios of the MCP conformance suite ask for by name."""

import base64
import json
import struct
import warnings
import zlib
from typing import Annotated, Any

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.prompts.base import UserMessage
from mcp.shared.exceptions import MCPError
from mcp_types import (
    MISSING_REQUIRED_CLIENT_CAPABILITY,
    AudioContent,
    Completion,
    CreateMessageRequest,
    CreateMessageRequestParams,
    CreateMessageResult,
    EmbeddedResource,
    GetPromptResult,
    ImageContent,
    InputRequests,
    InputRequiredResult,
    ListRootsRequest,
    ListRootsResult,
    Prompt,
    SamplingMessage,
    TextContent,
    TextResourceContents,
)
from pydantic import Field

from tests.conformance_jobs import answered, form


def _png() -> bytes:
    """One red pixel."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0\xff\0\0")) + chunk(b"IEND", b"")


def _wav() -> bytes:
    """Two bytes of silence."""
    form_chunk = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16)
    body = b"WAVE" + form_chunk + b"data" + struct.pack("<I", 2) + b"\0\0"
    return b"RIFF" + struct.pack("<I", len(body)) + body


RICH_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "$defs": {"address": {"$anchor": "address", "type": "object", "properties": {"city": {"type": "string"}}}},
    "properties": {"home": {"$ref": "#address"}, "name": {"type": "string"}, "phone": {"type": "string"}},
    "allOf": [{"anyOf": [{"required": ["name"]}, {"required": ["phone"]}]}],
    "if": {"required": ["phone"]},
    "then": {"properties": {"phone": {"minLength": 3}}},
    "else": {"required": ["name"]},
    "additionalProperties": False,
}

PNG = _png()
IMAGE = ImageContent(type="image", data=base64.b64encode(PNG).decode(), mime_type="image/png")
AUDIO = AudioContent(type="audio", data=base64.b64encode(_wav()).decode(), mime_type="audio/wav")


def _embedded(uri: str, words: str, mime_type: str = "text/plain") -> EmbeddedResource:
    return EmbeddedResource(
        type="resource", resource=TextResourceContents(uri=uri, mime_type=mime_type, text=words)
    )


def _sampling(prompt: str, max_tokens: int) -> CreateMessageRequest:
    message = SamplingMessage(role="user", content=TextContent(type="text", text=prompt))
    return CreateMessageRequest(params=CreateMessageRequestParams(messages=[message], max_tokens=max_tokens))


def _name_form() -> Any:
    return form("What is your name?", name="string")


def add_fixtures(server: MCPServer) -> None:
    """Everything but the tasks."""
    _add_contents(server)
    _add_behaviours(server)
    _add_questions(server)
    _add_resources(server)
    _add_prompts(server)
    _show_prompts(server)


def _add_contents(server: MCPServer) -> None:
    @server.tool(structured_output=False)
    async def test_simple_text() -> str:
        """Answers with text."""
        return "This is a simple text response for testing."

    @server.tool(structured_output=False)
    async def test_image_content() -> ImageContent:
        """Answers with an image."""
        return IMAGE

    @server.tool(structured_output=False)
    async def test_audio_content() -> AudioContent:
        """Answers with sound."""
        return AUDIO

    @server.tool(structured_output=False)
    async def test_embedded_resource() -> EmbeddedResource:
        """Answers with a resource."""
        return _embedded("test://embedded-resource", "This is an embedded resource content.")

    @server.tool(structured_output=False)
    async def test_multiple_content_types() -> list[TextContent | ImageContent | EmbeddedResource]:
        """Answers with contents of three types."""
        data = json.dumps({"test": "data", "value": 123})
        words = TextContent(type="text", text="Multiple content types test:")
        return [words, IMAGE, _embedded("test://mixed-content-resource", data, "application/json")]


def _add_behaviours(server: MCPServer) -> None:  # noqa: C901  # one small tool after the other
    @server.tool(structured_output=False)
    async def test_error_handling() -> str:
        """Always fails."""
        raise ToolError("This tool intentionally returns an error for testing")

    @server.tool(structured_output=False)
    async def test_tool_with_progress(ctx: Context) -> str:
        """Reports progress."""
        for progress in (0, 50, 100):
            await ctx.report_progress(progress, 100)
        return "done"

    @server.tool(structured_output=False)
    async def test_streaming_elicitation(ctx: Context) -> str:
        """Streams before it answers."""
        await ctx.report_progress(1, 2)
        return "streamed"

    @server.tool(structured_output=False)
    async def test_logging_tool(ctx: Context) -> str:
        """Says something to clients that want to hear it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and still part of the protocol
            await ctx.session.send_log_message("info", "a message")
        return "logged"

    @server.tool(structured_output=False)
    async def test_missing_capability(ctx: Context) -> str:
        """Cannot work without sampling."""
        capabilities = ctx.session.client_capabilities
        if capabilities is None or capabilities.sampling is None:
            raise MCPError(
                code=MISSING_REQUIRED_CLIENT_CAPABILITY,
                message="this tool needs the client's sampling capability",
                data={"requiredCapabilities": {"sampling": {}}},
            )
        return "sampling is there"

    @server.tool(structured_output=False)
    async def test_trigger_tool_change(ctx: Context) -> str:
        """Adds a tool, and takes it away again."""

        async def test_passing() -> str:
            """Is there for a moment."""
            return "here"

        server.add_tool(test_passing)
        server.remove_tool("test_passing")
        await ctx.notify_tools_changed()
        return "changed"

    @server.tool(structured_output=False)
    async def test_trigger_prompt_change(ctx: Context) -> str:
        """Says that the prompts have changed."""
        await ctx.notify_prompts_changed()
        return "changed"

    @server.tool(structured_output=False)
    async def test_headers(
        region: Annotated[str, Field(json_schema_extra={"x-mcp-header": "Region"})],
    ) -> str:
        """Has an argument that is mirrored into a header."""
        return region

    async def json_schema_2020_12_tool() -> str:
        """Has a schema with much in it."""
        return "called"

    server.add_tool(json_schema_2020_12_tool, structured_output=False)
    tool = server._tool_manager.get_tool("json_schema_2020_12_tool")
    assert tool is not None
    tool.parameters = RICH_SCHEMA

    @server.completion()
    async def complete(ref: Any, argument: Any, context: Any) -> Completion:
        words = [word for word in ("paris", "park", "party") if word.startswith(argument.value)]
        return Completion(values=words, total=len(words), has_more=False)


def _add_questions(server: MCPServer) -> None:  # noqa: C901  # one small tool after the other
    @server.tool(structured_output=False)
    async def test_input_required_result_elicitation(ctx: Context) -> str | InputRequiredResult:
        """Asks the user."""
        name = answered(ctx, "user_name", "name")
        return f"Hello, {name}!" if name else InputRequiredResult(input_requests={"user_name": _name_form()})

    @server.tool(structured_output=False)
    async def test_input_required_result_sampling(ctx: Context) -> str | InputRequiredResult:
        """Asks the client's model."""
        said = (ctx.input_responses or {}).get("capital_question")
        if isinstance(said, CreateMessageResult) and isinstance(said.content, TextContent):
            return said.content.text
        question = _sampling("What is the capital of France?", 100)
        return InputRequiredResult(input_requests={"capital_question": question})

    @server.tool(structured_output=False)
    async def test_input_required_result_list_roots(ctx: Context) -> str | InputRequiredResult:
        """Asks for the client's roots."""
        listed = (ctx.input_responses or {}).get("client_roots")
        if isinstance(listed, ListRootsResult):
            return ", ".join(str(root.uri) for root in listed.roots)
        return InputRequiredResult(input_requests={"client_roots": ListRootsRequest()})

    async def confirmed(ctx: Context) -> str | InputRequiredResult:
        """Asks, and keeps its state with the client."""
        if ctx.request_state == "waits for ok" and answered(ctx, "confirm", "ok") is not None:
            return "state-ok"
        question = form("Please confirm", ok="boolean")
        return InputRequiredResult(input_requests={"confirm": question}, request_state="waits for ok")

    server.add_tool(confirmed, name="test_input_required_result_request_state", structured_output=False)
    server.add_tool(confirmed, name="test_input_required_result_tampered_state", structured_output=False)

    @server.tool(structured_output=False)
    async def test_input_required_result_multiple_inputs(ctx: Context) -> str | InputRequiredResult:
        """Asks three things at once."""
        asked: InputRequests = {
            "user_name": _name_form(),
            "greeting": _sampling("Generate a greeting", 50),
            "client_roots": ListRootsRequest(),
        }
        if asked.keys() <= (ctx.input_responses or {}).keys():
            return "all answered"
        return InputRequiredResult(input_requests=asked, request_state="waits for three")

    @server.tool(structured_output=False)
    async def test_input_required_result_multi_round(ctx: Context) -> str | InputRequiredResult:
        """Asks one thing after the other."""
        if (name := answered(ctx, "step1", "name")) is not None:
            question = form("Step 2: What is your favorite color?", color="string")
            return InputRequiredResult(input_requests={"step2": question}, request_state=f"name: {name}")
        if (color := answered(ctx, "step2", "color")) is not None:
            return f"{ctx.request_state}, color: {color}"
        question = form("Step 1: What is your name?", name="string")
        return InputRequiredResult(input_requests={"step1": question}, request_state="nothing yet")

    @server.tool(structured_output=False)
    async def test_input_required_result_capabilities(ctx: Context) -> str | InputRequiredResult:
        """Asks only what the client can answer."""
        if ctx.input_responses:
            return "answered"
        capabilities = ctx.session.client_capabilities
        asked: InputRequests = {}
        if capabilities is not None and capabilities.elicitation is not None:
            asked["user_name"] = _name_form()
        if capabilities is not None and capabilities.sampling is not None:
            asked["greeting"] = _sampling("Generate a greeting", 50)
        return InputRequiredResult(input_requests=asked) if asked else "there is nobody to ask"


def _add_resources(server: MCPServer) -> None:
    @server.resource("test://static-text", mime_type="text/plain")
    async def static_text() -> str:
        """A text."""
        return "This is the content of the static text resource."

    @server.resource("test://static-binary", mime_type="image/png")
    async def static_binary() -> bytes:
        """An image."""
        return PNG

    @server.resource("test://template/{id}/data", mime_type="application/json")
    async def template(id: str) -> str:  # noqa: A002  # the suite's name for it
        """Data of an id."""
        return json.dumps({"id": id, "templateTest": True, "data": f"Data for ID: {id}"})


def _add_prompts(server: MCPServer) -> None:
    @server.prompt()
    def test_simple_prompt() -> str:
        """Takes nothing."""
        return "This is a simple prompt for testing."

    @server.prompt()
    def test_prompt_with_arguments(arg1: str, arg2: str) -> str:
        """Takes two words."""
        return f"Prompt with arguments: arg1='{arg1}', arg2='{arg2}'"

    @server.prompt()
    def test_prompt_with_embedded_resource(
        resourceUri: str,  # noqa: N803  # the suite's name for it
    ) -> list[UserMessage]:
        """Embeds a resource."""
        resource = _embedded(resourceUri, "Embedded resource content for testing.")
        return [UserMessage(resource), UserMessage("Please process the embedded resource above.")]

    @server.prompt()
    def test_prompt_with_image() -> list[UserMessage]:
        """Shows an image."""
        return [UserMessage(IMAGE), UserMessage("Please analyze the image above.")]

    @server.prompt()
    def test_input_required_result_prompt(ctx: Context) -> list[UserMessage] | InputRequiredResult:
        """Asks the user for its context."""
        context = answered(ctx, "user_context", "context")
        if context is None:
            question = form("What context should the prompt use?", context="string")
            return InputRequiredResult(input_requests={"user_context": question})
        return [UserMessage(f"Context: {context}")]


def _show_prompts(server: MCPServer) -> None:
    """The server makes its prompts of the agents there are; those added to it are shown beside these."""
    list_of_agents, get_of_agent = server.list_prompts, server.get_prompt

    async def list_prompts() -> list[Prompt]:
        return [*await list_of_agents(), *await MCPServer.list_prompts(server)]

    async def get_prompt(
        name: str, arguments: dict[str, Any] | None = None, context: Context | None = None
    ) -> GetPromptResult | InputRequiredResult:
        if server._prompt_manager.get_prompt(name) is None:
            return await get_of_agent(name, arguments, context)
        return await MCPServer.get_prompt(server, name, arguments, context)

    server.list_prompts, server.get_prompt = list_prompts, get_prompt  # type: ignore[method-assign]
