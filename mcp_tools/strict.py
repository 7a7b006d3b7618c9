"""Tools that refuse what they do not know: the SDK drops unknown arguments, and with them what was meant."""

import bisect
import difflib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, Self

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from mcp.server.mcpserver.utilities.func_metadata import FuncMetadata
from mcp_types import CallToolResult, TextContent, ToolAnnotations
from pydantic import ValidationError

#: Most a result's text may take in JSON, in bytes. The SDK's own client gives up on an event of more than 1 MiB.
MAX_TEXT_BYTES = 1_000_000
#: How much of the end of a longer text is kept, in bytes: the facts of the run, and its error if there is one.
TAIL_BYTES = 50_000
#: Longest text of an error, in characters: clients cut it far earlier.
MAX_ERROR_CHARS = 20_000


class _Arguments(FuncMetadata):
    """Arguments of which ``texts`` stay as they were given.

    The SDK reads a text as JSON wherever more than text is allowed: a search for ``null`` would find everything,
    and a word that is a list would be refused. Lists written as text are understood where a list is wanted.
    """

    texts: frozenset[str] = frozenset()

    def pre_parse_json(self, data: dict[str, Any]) -> dict[str, Any]:
        return super().pre_parse_json(data) | {name: value for name, value in data.items() if name in self.texts}


class StrictTool(Tool):
    """A tool whose schema allows no other arguments, and which says in plain words what is wrong with a call."""

    @classmethod
    def of(
        cls,
        function: Callable[..., Any],
        *,
        annotations: ToolAnnotations,
        structured: bool = False,
        meta: dict[str, Any] | None = None,
    ) -> Self:
        """The tool a function is; its docstring is the description. ``structured`` results are JSON, not text."""
        tool = cls.from_function(
            function,
            description=inspect.getdoc(function),
            annotations=annotations,
            meta=meta,
            structured_output=structured,
        )
        assert isinstance(tool, cls)
        arguments = tool.fn_metadata.arg_model
        arguments.model_config["extra"] = "forbid"
        arguments.model_rebuild(force=True)
        tool.parameters = _without_titles(arguments.model_json_schema(by_alias=True))
        texts = frozenset(name for name, rules in tool.parameters["properties"].items() if _takes_text(rules))
        known = {name: getattr(tool.fn_metadata, name) for name in FuncMetadata.model_fields}
        tool.fn_metadata = _Arguments(**known, texts=texts)
        return tool

    async def run(self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool = False) -> Any:
        """Run the tool. Raises ToolError."""
        try:
            return bounded(await super().run(arguments, context, convert_result))
        except ToolError as error:
            told = str(error)
            if isinstance(error.__cause__, ValidationError):
                told = (
                    f"{self.name} was not called: {explain(error.__cause__, list(self.parameters['properties']))}"
                )
            elif len(told) <= MAX_ERROR_CHARS:
                raise
            raise ToolError(without_middle(told)) from error.__cause__


def without_middle(error: str) -> str:
    """An error that repeats what was asked for, however long that was. Its last line is what callers go by."""
    half = MAX_ERROR_CHARS // 2
    return error if len(error) <= MAX_ERROR_CHARS else f"{error[:half]} […] {error[-half:]}"


def bounded(result: Any) -> Any:
    """A tool's result, too long texts without their middle. Structured results are pages, and have their limits."""
    if isinstance(result, CallToolResult) and result.structured_content is None:
        result.content = [
            TextContent(type="text", text=shortened(block.text)) if isinstance(block, TextContent) else block
            for block in result.content
        ]
    return result


def shortened(text: str) -> str:
    """The text, or if that is more than MAX_TEXT_BYTES its beginning, how to have the whole, and its end."""
    if len(text) <= MAX_TEXT_BYTES and _json_bytes(text) <= MAX_TEXT_BYTES:
        return text
    note = (
        f"\n[… {len(text):,} characters in all: the middle is left out here, not in the record. get_trace pages"
        " through a run, `orchestrator runs show RUN_ID` prints it; of several runs, wait for one at a time.]\n"
    )
    tail = text[-TAIL_BYTES:]
    tail = tail[len(tail) - _fitting(tail[::-1], TAIL_BYTES) :]
    head = text[:MAX_TEXT_BYTES]
    return head[: _fitting(head, MAX_TEXT_BYTES - TAIL_BYTES - _json_bytes(note))] + note + tail


def _fitting(text: str, room: int) -> int:
    """How many characters from the beginning take no more than ``room`` bytes in JSON."""
    return bisect.bisect_right(range(1, len(text) + 1), room, key=lambda end: _json_bytes(text[:end]))


def _json_bytes(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def explain(error: ValidationError, known: list[str]) -> str:
    """What is wrong with the arguments, without pydantic's vocabulary and without repeating the values."""
    problems = [_problem(problem, known) for problem in error.errors(include_url=False, include_input=False)]
    return f"{'; '.join(problems)}. Its arguments are: {', '.join(known) or 'none'}."


def _problem(problem: Mapping[str, Any], known: list[str]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{name} is missing"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, known, n=1)
        return f"there is no argument {name!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
    return f"{name}: {problem['msg']}"


def _takes_text(rules: Mapping[str, Any]) -> bool:
    return any(each.get("type") == "string" for each in (rules, *rules.get("anyOf", ())))


def _without_titles(schema: dict[str, Any]) -> dict[str, Any]:
    # Generated titles repeat the names; a model reads every word of a schema that is always loaded.
    properties = {
        name: {key: value for key, value in rules.items() if key != "title"}
        for name, rules in schema["properties"].items()
    }
    return {**{key: value for key, value in schema.items() if key != "title"}, "properties": properties}
