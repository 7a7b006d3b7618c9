"""Test a plan without a model: a scripted server that speaks the Anthropic Messages API on loopback.

And what is above the CLI without a CLI: conversations by a script. docs/testing.md is the guide; the names below
are the whole public surface.
"""

from orchestrator.testing.fake_conversation import FakeConversation, FakeProcesses
from orchestrator.testing.model_server import ModelServer, running_model_server
from orchestrator.testing.request import Request, ToolResult
from orchestrator.testing.scenario import (
    Fault,
    Reply,
    Rule,
    Scenario,
    Text,
    Thinking,
    ToolUse,
    Usage,
    When,
)
from orchestrator.testing.scenario_file import load_scenario

__all__ = [
    "FakeConversation",
    "FakeProcesses",
    "Fault",
    "ModelServer",
    "Reply",
    "Request",
    "Rule",
    "Scenario",
    "Text",
    "Thinking",
    "ToolResult",
    "ToolUse",
    "Usage",
    "When",
    "load_scenario",
    "running_model_server",
]
