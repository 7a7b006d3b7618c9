"""The CLIs that can do the work: one module per CLI, pure, satisfying ``orchestrator.conversation.Dialect``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.conversation import Dialect

    DIALECTS: dict[str, Dialect]

__all__ = ["DIALECTS"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: whoever only looks for the binary needs neither messages nor pydantic.
    if name != "DIALECTS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orchestrator.backends import claude  # noqa: PLC0415

    dialects: dict[str, Dialect] = {"claude": claude}
    globals()[name] = dialects
    return dialects
