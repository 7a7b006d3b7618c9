"""Workspaces: a plan's own copy of a directory, as a git repository in which nothing leads back to the original.

Agents commit, switch branches and clean up in it. A git directory can lead elsewhere in many ways (worktrees,
submodules, links, ``core.worktree``), so git itself is asked, in the copy, what it would work on; what is not
wholly inside the copy goes, and the copy begins a history of its own.
"""

import logging
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread

from orchestrator.errors import PlanError
from orchestrator.plans import Plan
from orchestrator.plans.template import template

log = logging.getLogger(__name__)

#: How long one git command may take. A tree too large for it goes without a first commit.
GIT_SECONDS = 60.0

_GIT_SETTINGS = {
    "user.name": "orchestrator",
    "user.email": "orchestrator@localhost",
    # Git before 2.32 does not know GIT_CONFIG_GLOBAL, and reads the user's settings.
    "commit.gpgsign": "false",
    "core.hooksPath": os.devnull,
    "init.templateDir": "",
    "init.defaultBranch": "main",
    "gc.auto": "0",  # it would go on in the background, among the agents
}
#: What git writes in a git directory; each may be a link, as git-new-workdir makes them.
_WRITTEN = ("HEAD", "config", "index", "logs", "objects", "packed-refs", "refs")


@dataclass(frozen=True, slots=True)
class WorkspaceCopy:
    """A copy to be made: ``target``, which must not exist yet, from ``source``. All are absolute, without links.

    ``data_path`` is the data directory; where it is inside the source, it is left out.
    """

    source: Path
    target: Path
    data_path: Path


def workspace_copy(plan: Plan, inputs: Mapping[str, Any], run_id: str, data_path: Path) -> WorkspaceCopy | None:
    """The copy a run of the plan works in, to be made by ``make_copy``; None if the plan asks for none.

    Raises PlanError if the source is not a directory, or is where the copies are kept.
    """
    if plan.workspace is None:
        return None
    written = template(plan.workspace.copy_).render({"inputs": inputs, "run": {"id": run_id}, "steps": {}})
    source = _directory(plan.path.parent / written)
    if source is None:
        raise PlanError(
            f"workspace.copy: there is no directory {plan.path.parent / written}",
            advice="Name one, or give the input.",
        )
    target = data_path / "workspaces" / run_id
    if source in target.parents and source not in data_path.parents:
        raise PlanError(
            f"workspace.copy: {source} is the data directory, where copies are kept",
            advice="Copy another directory, or set data_dir to a folder of its own.",
        )
    return WorkspaceCopy(source, target, data_path)


def _directory(path: Path) -> Path | None:
    try:
        found = path.resolve()
        return found if found.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long a name, a loop of links, a NUL character
        return None


async def make_copy(copy: WorkspaceCopy, environ: Mapping[str, str], *, git_seconds: float = GIT_SECONDS) -> None:
    """Copy the tree; a copy without a history of its own becomes a repository with one commit.

    Links stay links; sockets, pipes and devices are skipped. Trouble with git is logged and no more. A copy that
    fails or is cancelled is removed. Raises PlanError naming the file that could not be copied.
    """
    git = _Git(environ, git_seconds)
    with _explained():
        copy.target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        copy.target.mkdir()
        try:
            for folder in await anyio.to_thread.run_sync(copy_tree, copy):
                await _keep_or_cut(git, copy, folder)
            if not (copy.target / ".git").exists():
                await _begin_history(git, copy)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(_clear_away, copy.target)
            raise


@contextmanager
def _explained() -> Iterator[None]:
    """Raise errors of the file system as PlanError."""
    try:
        yield
    except OSError as error:
        several = isinstance(error, shutil.Error) and isinstance(error.args[0], list)
        reason = error.args[0][0][2] if several else error  # of (source, target, reason) each; the first will do
        raise PlanError(
            f"the workspace could not be copied: {reason}",
            advice="Correct that, or have workspace.copy name a directory without it; then run the plan again.",
        ) from error


# -- files --------------------------------------------------------------------------------------------------


def copy_tree(copy: WorkspaceCopy) -> list[Path]:
    """Copy the files, in a worker thread of anyio; returns the copy's folders that have a ``.git``.

    Stops between two files when its caller is cancelled. Raises PlanError, OSError.
    """
    repositories: list[Path] = []
    ours = {_identity(copy.data_path), _identity(copy.target)}

    def left_out(folder: str, names: list[str]) -> set[str]:
        anyio.from_thread.check_cancelled()
        here = Path(folder)
        if ".git" in names:
            repositories.append(copy.target / here.relative_to(copy.source))
        return {name for name in names if _identity(here / name) in ours or _is_linked_worktree(here / name)}

    shutil.copytree(
        copy.source, copy.target, symlinks=True, ignore=left_out, copy_function=_copy_file, dirs_exist_ok=True
    )
    return repositories


def _identity(path: Path) -> tuple[int, int]:
    """Which file it is, however its path is written."""
    facts = path.lstat()
    return facts.st_dev, facts.st_ino


def _is_linked_worktree(path: Path) -> bool:
    """Whether this is a git directory's note of a working tree at an absolute path: the original's, not the copy's.

    With such notes, ``git worktree repair`` in the copy would take the original's working trees over.
    """
    if path.parent.name != "worktrees":
        return False
    note = path / "gitdir"
    return note.is_file() and note.read_bytes().startswith(b"/")


def _copy_file(source: str, target: str) -> None:
    anyio.from_thread.check_cancelled()
    with _explained():  # at once: copytree by itself would go on to the end with the other files
        if stat.S_ISREG(Path(source).lstat().st_mode):
            shutil.copy2(source, target)
        else:
            log.warning("%s is not copied: it is a socket, a pipe or a device", source)


def _clear_away(target: Path) -> None:
    try:
        _remove(target)
    except OSError as error:
        log.warning("what was copied to %s could not be removed: %s", target, error)


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for folder, _, _ in os.walk(path):
        Path(folder).chmod(0o700)  # nothing can be removed from a read-only folder
    shutil.rmtree(path)


# -- git ----------------------------------------------------------------------------------------------------


class _Git:
    """Runs git with our settings alone, each command within a time limit in seconds."""

    def __init__(self, environ: Mapping[str, str], seconds: float) -> None:
        # Variables like GIT_DIR, set inside git hooks, would send the commands to another repository.
        ours = {name: value for name, value in environ.items() if not name.startswith("GIT_")}
        self.env = {**ours, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        self.seconds = seconds

    async def __call__(self, folder: Path, *arguments: str) -> str | None:
        """What git prints, or None, with a warning, if it fails."""
        settings = [part for name, value in _GIT_SETTINGS.items() for part in ("-c", f"{name}={value}")]
        try:
            with anyio.fail_after(self.seconds):
                done = await anyio.run_process(
                    ["git", *settings, *arguments], cwd=folder, env=self.env, stdin=subprocess.DEVNULL
                )
            return os.fsdecode(done.stdout)
        except TimeoutError:
            reason = f"it took longer than {self.seconds:g} s"
        except subprocess.CalledProcessError as error:
            reason = os.fsdecode(error.stderr).strip()
        except OSError as error:
            reason = str(error)
        log.warning("git %s in %s: %s", arguments[0], folder, reason)
        return None


async def _keep_or_cut(git: _Git, copy: WorkspaceCopy, folder: Path) -> None:
    """Keep the history in ``folder`` if git there works on the copy alone; otherwise remove the ``.git``."""
    directory = await _own_git_directory(git, copy, folder)
    if directory is not None:
        _find_borrowed_objects(copy, directory / "objects")
        return
    log.warning("%s is left out of the copy: it leads out of it, or is broken", folder / ".git")
    await anyio.to_thread.run_sync(_remove, folder / ".git")


async def _own_git_directory(git: _Git, copy: WorkspaceCopy, folder: Path) -> Path | None:
    """Where the history of ``folder`` is kept; None if git cannot tell, or would write outside the copy."""
    said = await git(folder, "rev-parse", "--show-toplevel", "--absolute-git-dir", "--git-common-dir")
    if said is None:
        return None
    top, *directories = [(folder / line).resolve() for line in said.removesuffix("\n").split("\n")]
    written = [(directory / name).resolve() for directory in directories for name in ("", *_WRITTEN)]
    if top != folder or not all(path.is_relative_to(copy.target) for path in written):
        return None
    return directories[-1]


def _find_borrowed_objects(copy: WorkspaceCopy, objects: Path) -> None:
    """Make relative paths to objects of repositories outside the source absolute. Git only reads there."""
    file = objects / "info" / "alternates"
    if not file.is_file():
        return
    original = copy.source / objects.relative_to(copy.target)
    lines = os.fsdecode(file.read_bytes()).split("\n")
    file.write_bytes(os.fsencode("\n".join(_seen_from_anywhere(copy, original, line) for line in lines)))


def _seen_from_anywhere(copy: WorkspaceCopy, original: Path, line: str) -> str:
    lender = (original / line).resolve()
    return str(lender) if lender.is_dir() and not lender.is_relative_to(copy.source) else line


async def _begin_history(git: _Git, copy: WorkspaceCopy) -> None:
    """Commit everything, so that what agents change can be seen. Without git, the copy stays a folder."""
    commit = ("commit", "--quiet", "--allow-empty", "--message", f"Copy of {copy.source.name}")
    for arguments in (("init", "--quiet"), ("add", "--all"), commit):
        if await git(copy.target, *arguments) is None:
            for lock in (copy.target / ".git").rglob("*.lock"):
                lock.unlink()  # of a git that was killed: no other would work here
            return
