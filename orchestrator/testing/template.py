"""``{{ … }}`` in replies: checked when a scenario is loaded, filled in when a request is answered."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, nodes
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import SandboxedEnvironment

from orchestrator.errors import ScenarioError
from orchestrator.testing.request import Request
from orchestrator.testing.scenario import Block, Choice, Reply, Text, Thinking

VARIABLES = ("match", "last_user_text", "tool_results", "model", "n")

_environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


def check(text: str) -> set[str]:
    """The named groups a template uses.

    Raises:
        ValueError: it does not compile, or uses a variable there is not.
    """
    try:
        tree = _environment.parse(text)
    except TemplateError as error:
        raise ValueError(f"template does not compile: {error}") from None
    for name in sorted(find_undeclared_variables(tree) - set(VARIABLES)):
        close = difflib.get_close_matches(name, VARIABLES, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(VARIABLES)}"
        raise ValueError(f"template uses an unknown variable {name!r}{hint}")
    return {node.attr for node in tree.find_all(nodes.Getattr) if _is_match(node.node)}


def render(choice: Choice, reply: Reply, request: Request) -> Reply:
    """``reply`` with its templates filled in from the request.

    Raises:
        ScenarioError: a template uses something the request does not have.
    """
    values = {
        "match": SimpleNamespace(**choice.groups),  # a mapping's own methods would hide a group named "items"
        "last_user_text": request.last_user_text,
        "tool_results": "\n".join(result.text for result in request.tool_results),
        "model": request.model,
        "n": choice.n,
    }

    def fill(text: str) -> str:
        return _compiled(text).render(values) if "{" in text else text

    try:
        return replace(reply, content=[_render_block(block, fill) for block in reply.blocks])
    except Exception as error:  # an expression may fail in any way Python code can
        raise ScenarioError(f"a template of the reply cannot be filled in: {error}") from error


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """``value``, plain data, with ``change`` applied to each string in it that is not a key."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_strings(item, change) for item in value]
    return value


def _render_block(block: Block, fill: Callable[[str], str]) -> Block:
    if isinstance(block, Text | Thinking):
        return replace(block, text=fill(block.text))
    return replace(block, input=map_strings(block.input, fill))


@lru_cache(maxsize=256)
def _compiled(text: str) -> Template:
    return _environment.from_string(text)


def _is_match(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == "match"
