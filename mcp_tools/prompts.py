"""A prompt for each agent: typed by a person, it has the model hand what follows to that agent.

Without arguments: clients split what is typed after the name at its blanks, and the first word would be the task.
"""

import difflib

from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS, GetPromptResult, Prompt, PromptMessage, TextContent

from mcp_tools.results import DESCRIPTION_CHARS, compact, cut
from orchestrator.agents import Agent, Catalog

_NAME_CHARS = 100


def list_prompts(catalog: Catalog) -> list[Prompt]:
    """The prompts there are now."""
    return [Prompt(name=agent.id, description=_description(agent)) for agent in catalog.agents()]


def get_prompt(catalog: Catalog, name: str) -> GetPromptResult:
    """The prompt of an agent. Raises MCPError."""
    agents = {agent.id: agent for agent in catalog.agents()}
    if name not in agents:
        near = difflib.get_close_matches(name, agents)
        meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise MCPError(INVALID_PARAMS, f"there is no prompt {cut(name, _NAME_CHARS)!r}{meant}")
    said = TextContent(type="text", text=_text(name))
    return GetPromptResult(
        description=_description(agents[name]), messages=[PromptMessage(role="user", content=said)]
    )


def _description(agent: Agent) -> str:
    return cut(agent.description, DESCRIPTION_CHARS) or f"Hand a task to the agent {agent.id}."


def _text(name: str) -> str:
    return (
        f"Hand the task that comes with this message to the agent {name}: call the orchestrator's tool delegate "
        f"with agent {compact(name)} and the whole task as prompt. The agent knows nothing of our conversation, so "
        "put into the prompt whatever of it the task needs. Do not do the task yourself. Then tell me what the "
        "agent answered. If no task came with this message, ask me for it first."
    )
