"""The keys of a plan file checked against their types, with messages for the author of the file."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from orchestrator.plans.inputs import InputSpec
from orchestrator.plans.model import ForEach, Limits, Options, PlanFile, Session, Step, Workspace
from orchestrator.plans.names import suggestion
from orchestrator.yaml_lines import KeyPath

M = TypeVar("M", bound=BaseModel)

_NESTED: Mapping[type[BaseModel], Mapping[str | int, type[BaseModel]]] = {
    PlanFile: {"inputs": InputSpec, "defaults": Options, "limits": Limits, "workspace": Workspace},
    Step: {"for_each": ForEach, "session": Session},
}

#: What other plan languages call our keys; too far from ours for a comparison of letters.
_ELSEWHERE = {
    "needs": "depends_on",
    "dependencies": "depends_on",
    "fan_out": "for_each",
    "matrix": "for_each",
    "nodes": "steps",
    "tasks": "steps",
    "parameters": "inputs",
    "args": "inputs",
    "working_dir": "cwd",
    "directory": "cwd",
    "output_format": "output_schema",
}


#: Removing a faulty key may leave its holder without a required one, and so on up: at most this often.
_DEPTH = 3


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong at ``path`` of the plan file.

    ``text_line`` is the line inside the string there, from 1. With ``file``, the fault is in that included
    file instead, on its line ``text_line``.
    """

    path: KeyPath
    text: str
    text_line: int | None = None
    file: str | None = None


def validated(model: type[M], data: Mapping[str, Any], fill: Mapping[str, Any]) -> tuple[M | None, list[Fault]]:
    """``data`` as ``model``, and what is wrong with it, by paths inside ``data``.

    So that one mistake does not hide the next, the faulty keys are left out and what is required is taken from
    ``fill``; None only if that does not help.
    """
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        faults = _faults(model, error)
    rest, wrong = copy.deepcopy(dict(data)), faults
    for _ in range(_DEPTH):
        for fault in sorted(wrong, key=lambda fault: _order(fault.path), reverse=True):
            _remove(rest, fault.path)
        try:
            return model.model_validate({**fill, **rest}), faults
        except ValidationError as error:
            wrong = _faults(model, error)
    return None, faults


def _faults(model: type[BaseModel], error: ValidationError) -> list[Fault]:
    found = error.errors(include_url=False, include_context=False)
    return [Fault(tuple(each["loc"]), _text(model, each)) for each in found]


def _text(model: type[BaseModel], error: Any) -> str:
    loc: KeyPath = tuple(error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{_where(loc[:-1])}unknown key '{loc[-1]}'{_key_suggestion(model, loc)}"
    if error["type"] == "missing":
        return f"{_where(loc[:-1])}'{loc[-1]}' is required"
    if error["type"] == "string_pattern_mismatch":
        return f"{_where(loc)}must be one word, and cannot be a template"
    text = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    text = text.replace("a valid dictionary", "a mapping").replace("a valid list", "a list")
    return f"{_where(loc)}{text}"


def _key_suggestion(model: type[BaseModel], loc: KeyPath) -> str:
    inner = model if len(loc) == 1 else _NESTED[model][loc[0]]
    known = {field.alias or name for name, field in inner.model_fields.items()}
    key = _ELSEWHERE.get(str(loc[-1]), str(loc[-1]))
    return suggestion(key, known)


def _where(loc: KeyPath) -> str:
    return f"{'.'.join(map(str, loc))}: " if loc else ""


def _order(path: KeyPath) -> tuple[tuple[int, str], ...]:
    """Later list items first when reversed, so that removing one does not move the others."""
    return tuple((part, "") if isinstance(part, int) else (-1, part) for part in path)


def _remove(data: dict[str, Any], path: KeyPath) -> None:
    """Remove what is at ``path``; if there is nothing (a required key is missing), what should have held it."""
    holder: Any = data
    try:
        for part in path[:-1]:
            holder = holder[part]
        del holder[path[-1]]
    except (KeyError, IndexError, TypeError):
        if len(path) > 1 and isinstance(holder, dict):
            _remove(data, path[:-1])
