"""Where runs may work. Decisions are pure and about paths without links; ``resolved`` is what follows the links.

A path is judged by where it leads, never by how it is written: ``project/link`` and ``project/../elsewhere`` begin
with an allowed directory and are outside of it.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from orchestrator.errors import ReachError


def asked_by_model(*, caller: bool, parent_kind: str | None, plan_by_model: bool = False) -> bool:
    """Whether a model chose what a task says, and not a person.

    ``caller``: the task came over MCP. ``parent_kind`` is the kind of the run that delegates, if one does: an agent
    is a model, a plan is the word of whoever started it, which is a model if ``plan_by_model``.
    """
    return caller or (plan_by_model if parent_kind == "plan" else parent_kind is not None)


def allowed_dirs(
    *,
    configured: Iterable[Path] | None,
    project_dir: Path,
    project: Path,
    parent_cwd: Path | None,
    workspaces: Path,
    by_model: bool,
) -> tuple[Path, ...] | None:
    """The directories a task may work in, with all that is below them; None: any.

    ``configured`` is ``limits.allowed_dirs``, which binds everyone where it is set: ``project``, which a client may
    claim, adds nothing to it. ``workspaces`` is where the copies made for plans are kept. All must be resolved.
    """
    if configured is not None:
        return (project_dir, *configured, workspaces)
    if not by_model:
        return None
    return (project, *(() if parent_cwd is None else (parent_cwd,)), workspaces)


def check_reach(dirs: Iterable[Path], allowed: Iterable[Path] | None) -> None:
    """Raises ReachError for the first of ``dirs`` the task may not work in. All paths must be resolved."""
    if allowed is None:
        return
    known = tuple(dict.fromkeys(allowed))
    for path in dirs:
        if not any(path.is_relative_to(each) for each in known):
            raise ReachError(
                f"{path} is outside the directories this task may work in: {', '.join(map(str, known))}",
                details={"path": str(path), "allowed": [str(each) for each in known]},
            )


def resolved(path: Path, base: Path) -> Path:
    """Where ``path``, seen from ``base``, leads: absolute, every link and ``..`` followed.

    What does not exist yet is kept as written. Raises ReachError for what leads nowhere: links in a circle, a NUL
    character, a name longer than the system allows.
    """
    try:
        found = (base / path).resolve()
        circle = found.is_symlink()  # a link that is left; before Python 3.13 resolve() raises RuntimeError instead
    except PermissionError:
        return found  # who may not look inside may not work inside either: the CLI will not start there
    except (OSError, RuntimeError, ValueError) as error:
        raise _nowhere(path, str(error)) from None
    if circle:
        raise _nowhere(path, "its links lead in a circle")
    return found


def _nowhere(path: Path, reason: str) -> ReachError:
    return ReachError(f"{str(path)!r:.200} leads nowhere: {reason}", advice="Name a directory that exists.")


def check_unmoved(path: Path) -> None:
    """Whether a path that was resolved still leads to itself: a run may wait, and a link be put there meanwhile.

    Raises ReachError.
    """
    if os.path.realpath(path) == str(path) and not path.is_symlink():
        return  # a quarter of the time of what follows, which most runs would spend twice for nothing
    if (now := resolved(path, path)) != path:
        raise ReachError(
            f"{path} was a directory when the task was accepted and now leads to {now}",
            advice="Look who replaced it, and start the task again.",
            details={"path": str(path), "leads_to": str(now)},
        )
