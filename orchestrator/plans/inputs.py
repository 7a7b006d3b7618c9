"""The inputs of a plan: what a plan asks for, and the values of one run checked against it."""

import json
import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from orchestrator.errors import PlanError
from orchestrator.plans.names import suggestion

InputType = Literal["string", "integer", "number", "boolean", "path", "array", "object"]

_PYTHON: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "path": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class InputSpec(BaseModel):
    """One entry of ``inputs``. It must be given unless it has a ``default`` or says ``required: false``.

    An optional input without a default is ``null`` in templates.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: InputType
    description: str = ""
    required: bool | None = None
    default: Any = None
    enum: list[Any] | None = None

    @property
    def must_be_given(self) -> bool:
        return not self.has_default if self.required is None else self.required

    @property
    def has_default(self) -> bool:
        return "default" in self.model_fields_set

    def complaint(self, value: Any) -> str | None:
        """What is wrong with ``value`` for this input, or None."""
        if not _is(self.type, value):
            return f"must be of type {self.type}, not {_shown(value)}"
        if self.enum is not None and value not in self.enum:
            return f"must be one of {', '.join(map(_shown, self.enum))}, not {_shown(value)}"
        return None

    def faults(self) -> dict[str, str]:
        """What contradicts itself in the declaration: key to text."""
        found: dict[str, str] = {}
        if self.required and self.has_default:
            found["default"] = "a required input has no use for a default: remove one of the two"
        elif self.default is not None and (complaint := self.complaint(self.default)):
            found["default"] = f"the default {complaint}"
        wrong = [value for value in self.enum or () if not _is(self.type, value)]
        if wrong:
            found["enum"] = f"every value must be of type {self.type}, not {_shown(wrong[0])}"
        return found


def bind_inputs(
    specs: Mapping[str, InputSpec],
    values: Mapping[str, Any],
    *,
    base: Path | None = None,
    default_base: Path | None = None,
) -> dict[str, Any]:
    """The value of every declared input, in declared order.

    A string given for another type is read as the command line means it: ``5``, ``true``, or JSON for arrays
    and objects. A relative path that is given is joined to ``base``, one that is a default to ``default_base``:
    who types a path means his directory, who writes a plan means the plan's. Raises PlanError with every problem.
    """
    problems = [f"unknown input '{name}'{suggestion(name, specs)}" for name in values if name not in specs]
    bound: dict[str, Any] = {}
    for name, spec in specs.items():
        if values.get(name) is not None:
            bound[name], complaint = _bind_one(spec, values[name], base)
        elif spec.must_be_given:
            complaint = f"is required: give {name}=VALUE ({_described(spec)})"
        else:
            bound[name], complaint = _default(spec, default_base), None
        if complaint:
            problems.append(f"input '{name}' {complaint}")
    if problems:
        raise PlanError(
            "; ".join(problems), details={"problems": problems}, advice="Correct the inputs given to the plan."
        )
    return bound


def _default(spec: InputSpec, base: Path | None) -> Any:
    if spec.type == "path" and base is not None and spec.default is not None:
        return os.path.normpath(base / spec.default)
    return spec.default


def _bind_one(spec: InputSpec, value: Any, base: Path | None) -> tuple[Any, str | None]:
    value = _from_text(spec.type, value) if isinstance(value, str) else value
    complaint = spec.complaint(value)
    if spec.type == "path" and base is not None and complaint is None:
        value = os.path.normpath(base / Path(value).expanduser())
    return value, complaint


def _from_text(kind: InputType, text: str) -> Any:
    """``text`` as a value of ``kind``; unchanged where it is none, for the check that follows to name."""
    if kind in ("string", "path"):
        return text
    if kind == "boolean":
        word = text.strip().lower()
        return True if word in _TRUE else False if word in _FALSE else text
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _is(kind: InputType, value: Any) -> bool:
    # To Python, True is an int.
    return isinstance(value, _PYTHON[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _described(spec: InputSpec) -> str:
    return f"{spec.type}: {spec.description}" if spec.description else spec.type
