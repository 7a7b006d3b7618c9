"""What the orchestrator itself adds to the record of a run, between the messages of its CLI."""

import json
from typing import Any

from orchestrator.events import EventType
from orchestrator.messages import parse_message
from orchestrator.runtime import LiveRun, Runtime


async def note(rt: Runtime, live: LiveRun, event: EventType, data: dict[str, Any]) -> None:
    """Put it among the messages of the run, and tell everyone. Raises StoreError."""
    live.messages += 1
    message = parse_message(json.dumps({"type": "orchestrator", "subtype": event, **data}))
    await rt.store.add_message(live.row.id, live.messages, "orchestrator", event, message.raw())
    live.said.publish(message, live.messages)
    rt.emit(event, live.row.id, **data)
