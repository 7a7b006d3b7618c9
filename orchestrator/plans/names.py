"""What may be called what, and the suggestion when a name is not known."""

import difflib
import keyword
import re
from collections.abc import Iterable

#: Names a template gives its own meaning to.
RESERVED = frozenset({"inputs", "steps", "run", "index", "loop", "self", "caller", "true", "false", "none"})

_STEP_ID = re.compile(r"[a-zA-Z_][a-zA-Z0-9_-]*")
_VARIABLE = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


def is_step_id(name: str) -> bool:
    return _STEP_ID.fullmatch(name) is not None


def is_variable(name: str) -> bool:
    """Whether ``name`` can be written as a variable, or after a dot, in a template."""
    return _VARIABLE.fullmatch(name) is not None and not keyword.iskeyword(name)


def suggestion(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known name, else the known names, else nothing."""
    names = sorted(known)
    if near := difflib.get_close_matches(name, names, n=1):
        return f"; did you mean '{near[0]}'?"
    if 0 < len(names) <= 20:
        return f"; known: {', '.join(names)}"
    return ""
