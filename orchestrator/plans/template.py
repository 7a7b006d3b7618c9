"""Templates of a plan: Jinja2 in its sandbox, with what they refer to readable before anything runs.

Undefined names are errors. Nothing can be included or imported, nothing can be changed, and nothing is random:
the same data always renders the same text. What a template inserts is data and is never rendered again.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, Undefined, UndefinedError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from orchestrator.errors import PlanError
from orchestrator.plans.names import suggestion


@dataclass(frozen=True, slots=True)
class Reference:
    """``root.name.attribute`` in a template, as far as it is written out; ``line`` counts from 1 in the text."""

    root: str
    name: str | None
    attribute: str | None
    line: int


class Template:
    """One template: ``render`` gives text; ``evaluate`` the value itself where the text is one ``{{ expr }}``.

    Raises PlanError with ``details["line"]`` (1-based, in the text) if the text is not a template.
    """

    def __init__(self, text: str) -> None:
        try:
            tree = _ENVIRONMENT.parse(text)
            _refuse_unknown(tree)
            self.unbound: Mapping[str, int] = _unbound(tree)
            self._template = _ENVIRONMENT.from_string(text)
            self._expression = _expression(text, tree)
        except TemplateSyntaxError as error:
            raise PlanError(f"template: {error.message}", details={"line": error.lineno}) from None
        except RecursionError:
            raise PlanError("template: it is nested too deeply", details={"line": 1}) from None
        self.text = text
        self.references = tuple(_references(tree))

    @property
    def is_expression(self) -> bool:
        """Whether the whole text is one ``{{ expression }}``, so that ``evaluate`` keeps the value's type."""
        return self._expression is not None

    def render(self, data: Mapping[str, Any]) -> str:
        """The text with ``data`` inserted. Raises PlanError if a name is undefined or an expression fails."""
        try:
            return self._template.render(data)
        except Exception as error:
            raise _failure(error) from error

    def evaluate(self, data: Mapping[str, Any]) -> Any:
        """The value of a whole-text expression, the rendered text otherwise. Raises PlanError as ``render``."""
        if self._expression is None:
            return self.render(data)
        try:
            return _plain(self._expression(data))
        except Exception as error:
            raise _failure(error) from error


@lru_cache(maxsize=1024)
def template(text: str) -> Template:
    """``Template(text)``, compiled once for the thousand items of a fan-out."""
    return Template(text)


class _Environment(ImmutableSandboxedEnvironment):
    def getattr(self, obj: Any, attribute: str) -> Any:
        # An agent's answer may well have a key `items`; Jinja2 would find the dict's method first.
        if isinstance(obj, Mapping) and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)


def _as_text(value: Any) -> Any:
    """How ``{{ value }}`` is written: data as JSON, the notation agents know, instead of Python's repr."""
    if isinstance(value, str | int | float | Undefined) and not isinstance(value, bool):
        return value
    return _json(value)


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, default=_not_json)


def _not_json(value: Any) -> Any:
    if isinstance(value, Undefined):
        return str(value)  # raises UndefinedError, which names what is missing
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not data")


def _lines(value: Any) -> list[str]:
    """The non-empty lines of a text, stripped: ``{{ steps.find.text | lines }}``."""
    return [line.strip() for line in str(value).splitlines() if line.strip()]


def _slug(value: Any) -> str:
    """Lower-case letters, digits and hyphens only: safe in file and branch names."""
    return re.sub(r"[^a-z0-9]+", "-", str(value).lower()).strip("-")


def _environment() -> _Environment:
    environment = _Environment(
        undefined=StrictUndefined,
        finalize=_as_text,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals = {name: environment.globals[name] for name in ("range", "dict", "namespace")}
    environment.filters |= {"json": _json, "lines": _lines, "slug": _slug}
    # `random` would make a resumed run differ; `pprint`, `tojson` and `xmlattr` write for other readers.
    for name in ("random", "pprint", "tojson", "xmlattr"):
        del environment.filters[name]
    return environment


_ENVIRONMENT = _environment()


def _refuse_unknown(tree: nodes.Template) -> None:
    """Name what does not exist here; Jinja2 leaves some of it to the moment of rendering."""
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise TemplateSyntaxError("a plan's template cannot include or import another", node.lineno)
    for used in tree.find_all(nodes.Filter):
        _require("filter", used.name, _ENVIRONMENT.filters, used.lineno)
    for tested in tree.find_all(nodes.Test):
        _require("test", tested.name, _ENVIRONMENT.tests, tested.lineno)


def _require(kind: str, name: str, known: Iterable[str], line: int) -> None:
    if name not in known:
        raise TemplateSyntaxError(f"there is no {kind} '{name}'{suggestion(name, known)}", line)


def _unbound(tree: nodes.Template) -> dict[str, int]:
    """Names the template takes from its data, each with the line of its first use."""
    names = meta.find_undeclared_variables(tree) - set(_ENVIRONMENT.globals)
    lines: dict[str, int] = {}
    for node in tree.find_all(nodes.Name):
        if node.name in names:
            lines.setdefault(node.name, node.lineno)
    return lines


def _references(tree: nodes.Node) -> Iterator[Reference]:
    """Every ``inputs…`` and ``steps…`` in the tree, the longest written form of each only."""
    for node in tree.iter_child_nodes():
        chain = _chain(node)
        if chain and chain[0] in ("inputs", "steps"):
            root, name, attribute = (*chain, None, None)[:3]
            yield Reference(str(root), name, attribute, node.lineno)
            yield from _subscripts(node)
        else:
            yield from _references(node)


def _chain(node: nodes.Node) -> tuple[str | None, ...]:
    """``("steps", "plan", "output")`` for ``steps.plan.output`` or ``steps['plan'].output``; () for the rest.

    A subscript that is computed is None: what it names cannot be known before it runs.
    """
    if isinstance(node, nodes.Name):
        return (node.name,)
    if isinstance(node, nodes.Getattr) and (above := _chain(node.node)):
        return (*above, node.attr)
    if isinstance(node, nodes.Getitem) and (above := _chain(node.node)):
        written = node.arg.value if isinstance(node.arg, nodes.Const) else None
        return (*above, written if isinstance(written, str) else None)
    return ()


def _subscripts(node: nodes.Node) -> Iterator[Reference]:
    """References inside the computed subscripts of a chain: ``inputs.names[steps.pick.output.index]``."""
    while isinstance(node, nodes.Getattr | nodes.Getitem):
        if isinstance(node, nodes.Getitem):
            yield from _references(nodes.Tuple([node.arg], "load"))
        node = node.node


def _expression(text: str, tree: nodes.Template) -> Callable[[Mapping[str, Any]], Any] | None:
    """The compiled expression if the text is nothing but ``{{ expression }}``."""
    source = text.strip()
    if not (source.startswith("{{") and source.endswith("}}") and _is_one_output(tree)):
        return None
    inner = source[2:-2]
    inner = inner[1:] if inner[0] in "-+" else inner  # `{{-` is how Jinja2 strips white space, not a minus
    inner = inner[:-1] if inner[-1] in "-+" else inner
    return _ENVIRONMENT.compile_expression(inner, undefined_to_none=False)


def _is_one_output(tree: nodes.Template) -> bool:
    """Whether the tree is one expression, apart from white space around it."""
    if len(tree.body) != 1 or not isinstance(tree.body[0], nodes.Output):
        return False
    parts = [n for n in tree.body[0].nodes if not (isinstance(n, nodes.TemplateData) and not n.data.strip())]
    return len(parts) == 1 and not isinstance(parts[0], nodes.TemplateData)


def _plain(value: Any) -> Any:
    """A copy that is data all through: the generators of filters become lists; undefined is an error."""
    if isinstance(value, Undefined):
        str(value)  # raises UndefinedError, which names what is missing
        raise UndefinedError("the expression has no value: give its `if` an `else`")
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Iterable):
        return [_plain(inner) for inner in value]
    raise TypeError(f"{type(value).__name__} is not data")


def _failure(error: Exception) -> PlanError:
    return PlanError(f"the template failed: {error}", advice="Correct the expression in the plan.")
