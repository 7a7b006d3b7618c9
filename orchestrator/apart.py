"""``python -m orchestrator.apart ARGUMENTS``: the command ``orchestrator ARGUMENTS``, as nobody's child.

The shim starts the server so. The shim may live below an agent, and whatever an agent started is ended with it:
what descends from it, and what is in its control group. A server works for everybody, and must be neither.
"""

import os

from orchestrator.cgroups import leave_our_groups


def detach() -> None:
    """Go on in a process without a parent, in a session of its own, outside of the groups that end with an agent.

    The process that calls this ends with status 0. To be called before there are threads.
    """
    # The group first: one that is in an agent's group and has lost its parent is taken for an orphan.
    leave_our_groups()
    if os.fork():
        os._exit(0)
    os.setsid()


if __name__ == "__main__":
    detach()
    from orchestrator.__main__ import main

    main()
