"""Schemas without what says nothing: a client reads every word of every tool's."""

from typing import Any

from mcp_tools.strict import StrictTool


def slimmed(tool: StrictTool) -> StrictTool:
    """The tool with its schemas shortened. What they mean stays the same, but that optional arguments may be null:
    leaving them out is the same, and the tool still takes null.
    """
    tool.parameters = slim_input(tool.parameters)
    # Not by way of tool.output_schema, which remembers what it was first.
    if (told := tool.fn_metadata.output_schema) is not None:
        tool.fn_metadata.output_schema = _untitled(told)
    return tool


def slim_input(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of arguments without generated titles and without null as a default."""
    plain: dict[str, Any] = _untitled(schema)
    return plain | {"properties": {name: _not_null(rules) for name, rules in plain["properties"].items()}}


def _not_null(rules: dict[str, Any]) -> dict[str, Any]:
    if "default" not in rules or rules["default"] is not None:
        return rules
    kept = {key: value for key, value in rules.items() if key not in ("default", "anyOf")}
    others = [each for each in rules.get("anyOf", ()) if each != {"type": "null"}]
    return others[0] | kept if len(others) == 1 else kept | ({"anyOf": others} if others else {})


def _untitled(schema: Any) -> Any:
    """Generated titles repeat the names of what they stand at. A property may be called title: it is no title."""
    if isinstance(schema, list):
        return [_untitled(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    named = ("properties", "$defs")
    return {
        key: {name: _untitled(each) for name, each in value.items()} if key in named else _untitled(value)
        for key, value in schema.items()
        if key != "title"
    }
