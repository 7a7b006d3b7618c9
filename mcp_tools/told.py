"""What reaches the model of an error."""

from collections.abc import Iterator
from contextlib import contextmanager

from mcp.server.mcpserver.exceptions import ToolError

from mcp_tools import results
from orchestrator.errors import OrchestratorError


@contextmanager
def told_to_the_model() -> Iterator[None]:
    """Only ToolError reaches the model with its words; of any other exception it would read the tool's name."""
    try:
        yield
    except OrchestratorError as error:
        raise ToolError(results.refusal(error)) from error
