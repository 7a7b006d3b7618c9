"""Tools that refuse what they do not know: the SDK drops unknown arguments, and with them what was meant."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Self

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from mcp_types import ToolAnnotations
from pydantic import ValidationError


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
        return tool

    async def run(self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool = False) -> Any:
        """Run the tool. Raises ToolError."""
        try:
            return await super().run(arguments, context, convert_result)
        except ToolError as error:
            if not isinstance(error.__cause__, ValidationError):
                raise
            told = explain(error.__cause__, list(self.parameters["properties"]))
            raise ToolError(f"{self.name} was not called: {told}") from error.__cause__


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


def _without_titles(schema: dict[str, Any]) -> dict[str, Any]:
    # Generated titles repeat the names; a model reads every word of a schema that is always loaded.
    properties = {
        name: {key: value for key, value in rules.items() if key != "title"}
        for name, rules in schema["properties"].items()
    }
    return {**{key: value for key, value in schema.items() if key != "title"}, "properties": properties}
