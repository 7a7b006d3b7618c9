"""Copies of directories that plans work on: real trees, real git. Nothing done in a copy reaches the original."""

import logging
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import anyio
import anyio.from_thread
import pytest

from orchestrator.delegation import cancel, wait
from orchestrator.errors import PlanError
from orchestrator.plan_runs import run_plan, submit_plan
from orchestrator.plans import Plan, load_plan
from orchestrator.runtime import Runtime
from orchestrator.workspaces import WorkspaceCopy, make_copy, workspace_copy

CopyOf = Callable[..., Awaitable[Path]]
OpenRuntime = Callable[..., AbstractAsyncContextManager[Runtime]]
GIT = shutil.which("git") or "git"
NOBODY = 65534


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tree without history."""
    folder = tmp_path / "source"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "main.py").write_text("print('hello')\n")
    (folder / "README").write_text("read me\n")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def copy_of(data: Path, environ: dict[str, str]) -> CopyOf:
    """Copies a directory as a plan's run would, and returns where the copy is."""

    async def make(folder: Path, *, data_path: Path = data, git_seconds: float = 30) -> Path:
        copy = WorkspaceCopy(folder.resolve(), data_path / "workspaces" / "run", data_path)
        with anyio.fail_after(30):
            await make_copy(copy, environ, git_seconds=git_seconds)
        return copy.target

    return make


def git(folder: Path, *arguments: str) -> str:
    """What git says in ``folder``, with no settings but these."""
    env = {
        "PATH": os.defpath,
        "HOME": "/nonexistent",
        "GIT_CONFIG_NOSYSTEM": "1",
    }
    settings = ("user.name=tester", "user.email=tester@localhost", "protocol.file.allow=always")
    command = [GIT, *(part for setting in settings for part in ("-c", setting)), *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"git {' '.join(arguments)}: {done.stderr}"
    return done.stdout.strip()


def repository(folder: Path) -> Path:
    """``folder`` as a repository with one commit."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file.txt").write_text("one\n")
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", "first")
    return folder


def state(folder: Path) -> tuple[str, ...]:
    """All that a stray command could change in a repository: its refs, where HEAD is, its files."""
    return git(folder, "for-each-ref"), git(folder, "rev-parse", "HEAD"), git(folder, "status", "--porcelain")


def commit_in(folder: Path) -> None:
    """What an agent does: change a file and commit it, on whatever branch that is."""
    (folder / "file.txt").write_text("changed by an agent\n")
    git(folder, "add", "file.txt")
    git(folder, "commit", "--quiet", "-m", "an agent's")


async def test_a_tree_without_history_becomes_a_repository(source: Path, copy_of: CopyOf) -> None:
    target = await copy_of(source)
    assert git(target, "ls-files").split() == ["README", "src/main.py"]
    assert git(target, "status", "--porcelain") == ""
    assert git(target, "log", "--format=%an: %s") == "orchestrator: Copy of source"
    assert not (source / ".git").exists()


async def test_an_empty_directory_becomes_a_repository(tmp_path: Path, copy_of: CopyOf) -> None:
    (tmp_path / "empty").mkdir()
    assert git(await copy_of(tmp_path / "empty"), "rev-list", "--count", "HEAD") == "1"


async def test_history_is_kept_and_the_original_is_not_touched(tmp_path: Path, copy_of: CopyOf) -> None:
    original = repository(tmp_path / "original")
    (original / "draft").write_text("not committed\n")
    before = state(original)
    target = await copy_of(original)
    assert state(target) == before
    commit_in(target)
    assert state(original) == before


# -- a .git that leads elsewhere ----------------------------------------------------------------------------


async def test_commits_in_the_copy_of_a_worktree_stay_there(tmp_path: Path, copy_of: CopyOf) -> None:
    original = repository(tmp_path / "original")
    git(original, "worktree", "add", "-q", "-b", "topic", "../worktree")
    before = state(original), state(tmp_path / "worktree")
    target = await copy_of(tmp_path / "worktree")
    commit_in(target)
    assert (state(original), state(tmp_path / "worktree")) == before
    assert git(target, "log", "--format=%s").split("\n") == ["an agent's", "Copy of worktree"]


async def test_commits_in_the_copy_of_a_submodule_stay_there(tmp_path: Path, copy_of: CopyOf) -> None:
    outer = with_submodule(tmp_path)
    before = state(outer / "sub")
    target = await copy_of(outer / "sub")
    commit_in(target)
    assert state(outer / "sub") == before
    assert (target / ".git").is_dir()


async def test_submodules_of_the_copy_belong_to_the_copy(tmp_path: Path, copy_of: CopyOf) -> None:
    outer = with_submodule(tmp_path)
    before = state(outer), state(outer / "sub")
    target = await copy_of(outer)
    assert (state(target), state(target / "sub")) == before
    commit_in(target / "sub")
    assert (state(outer), state(outer / "sub")) == before
    assert git(target, "status", "--porcelain") == "M sub"


async def test_a_submodule_at_an_absolute_path_is_cut_off(tmp_path: Path, copy_of: CopyOf) -> None:
    """As git before 1.7.10 wrote them."""
    outer = with_submodule(tmp_path)
    (outer / "sub" / ".git").write_text(f"gitdir: {outer}/.git/modules/sub\n")
    before = state(outer), state(outer / "sub")
    target = await copy_of(outer)
    assert not (target / "sub" / ".git").exists()
    commit_in(target)
    assert (state(outer), state(outer / "sub")) == before


def with_submodule(folder: Path) -> Path:
    repository(folder / "library")
    outer = repository(folder / "outer")
    git(outer, "submodule", "--quiet", "add", str(folder / "library"), "sub")
    git(outer, "commit", "--quiet", "-m", "a submodule")
    return outer


async def test_worktrees_inside_the_tree_are_not_worktrees_of_the_copy(tmp_path: Path, copy_of: CopyOf) -> None:
    original = repository(tmp_path / "original")
    git(original, "worktree", "add", "-q", "-b", "inside", "trees/inside")
    git(original, "worktree", "add", "-q", "-b", "beside", "../beside")
    before = state(original), state(original / "trees" / "inside"), state(tmp_path / "beside")
    target = await copy_of(original)
    commit_in(target / "trees" / "inside")
    git(target, "worktree", "repair")  # would bend the links of the original's worktrees to the copy
    assert (state(original), state(original / "trees" / "inside"), state(tmp_path / "beside")) == before
    assert len(git(target, "worktree", "list").split("\n")) == 1
    git(target, "switch", "--quiet", "beside")  # not refused as checked out elsewhere


async def test_a_working_tree_set_in_the_settings_is_not_the_copys(tmp_path: Path, copy_of: CopyOf) -> None:
    original = repository(tmp_path / "original")
    git(original, "config", "core.worktree", str(original))
    target = await copy_of(original)
    assert git(target, "rev-parse", "--show-toplevel") == str(target)
    (original / "file.txt").write_text("the user's work\n")
    git(target, "checkout", "--force", "HEAD")
    assert (original / "file.txt").read_text() == "the user's work\n"


@pytest.mark.parametrize("linked", [(), ("config", "objects", "refs", "logs")], ids=["whole", "parts"])
async def test_a_git_directory_of_links_is_left_out(
    tmp_path: Path, copy_of: CopyOf, linked: tuple[str, ...]
) -> None:
    original, workdir = repository(tmp_path / "original"), tmp_path / "workdir"
    workdir.mkdir()
    if linked:
        (workdir / ".git").mkdir()
        shutil.copy(original / ".git" / "HEAD", workdir / ".git")
        for name in linked:
            (workdir / ".git" / name).symlink_to(original / ".git" / name)
    else:
        (workdir / ".git").symlink_to(original / ".git")
    git(workdir, "reset", "--quiet", "--hard")
    before = state(original)
    target = await copy_of(workdir)
    commit_in(target)
    assert state(original) == before
    assert git(target, "rev-list", "--count", "HEAD") == "2"


@pytest.mark.parametrize("absolute", [True, False])
async def test_borrowed_objects_are_still_found(tmp_path: Path, copy_of: CopyOf, absolute: bool) -> None:
    lender = repository(tmp_path / "lender")
    git(tmp_path, "clone", "--quiet", "--shared", "lender", "borrower")
    alternates = tmp_path / "borrower" / ".git" / "objects" / "info" / "alternates"
    alternates.write_text(f"# kept\n{lender}/.git/objects\n" if absolute else "../../../lender/.git/objects\n")
    before = state(tmp_path / "borrower")
    target = await copy_of(tmp_path / "borrower")
    assert state(target) == before
    commit_in(target)
    git(target, "fsck")
    assert state(tmp_path / "borrower") == before


async def test_objects_lent_within_the_tree_are_the_copys_own(tmp_path: Path, copy_of: CopyOf) -> None:
    original = repository(tmp_path / "original")
    git(original, "clone", "--quiet", "--shared", ".", "inner")
    lent = Path("inner") / ".git" / "objects" / "info" / "alternates"
    (original / lent).write_text("../../../.git/objects\n")
    target = await copy_of(original)
    assert (target / lent).read_text() == "../../../.git/objects\n"
    git(target / "inner", "fsck")


async def test_a_broken_git_directory_does_not_give_the_copy_to_a_repository_above(
    tmp_path: Path, source: Path, copy_of: CopyOf
) -> None:
    above = repository(tmp_path / "above")
    (above / ".gitignore").write_text("data\n")
    (source / ".git").mkdir()
    before = state(above)
    target = await copy_of(source, data_path=above / "data")
    commit_in(target)
    assert state(above) == before


# -- what a tree may hold -----------------------------------------------------------------------------------


async def test_links_stay_links(source: Path, copy_of: CopyOf) -> None:
    links = {"dangling": "nowhere", "absolute": "/etc", "folder": "src", "file": "src/main.py"}
    for name, to in links.items():
        (source / name).symlink_to(to)
    target = await copy_of(source)
    assert {name: str((target / name).readlink()) for name in links} == links


async def test_modes_and_times_are_kept(source: Path, copy_of: CopyOf) -> None:
    (source / "src" / "main.py").chmod(0o755)
    (source / "src").chmod(0o555)
    os.utime(source / "README", (1_000_000_000, 1_000_000_000))
    target = await copy_of(source)
    (source / "src").chmod(0o755)
    assert [oct((target / name).stat().st_mode & 0o777) for name in ("src", "src/main.py")] == ["0o555", "0o755"]
    assert (target / "README").stat().st_mtime == 1_000_000_000


async def test_what_is_no_file_is_skipped_and_named(
    source: Path, copy_of: CopyOf, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(source / "pipe")
    monkeypatch.chdir(source)  # the path of a socket has to be short
    with socket.socket(socket.AF_UNIX) as listener, caplog.at_level(logging.INFO):
        listener.bind("socket")
        target = await copy_of(source)
    assert sorted(path.name for path in target.iterdir()) == [".git", "README", "src"]
    lines = [record.getMessage() for record in caplog.records if record.name == "orchestrator.workspaces"]
    assert len(lines) == 2
    for name in ("pipe", "socket"):
        assert any(str(source / name) in line for line in lines)


async def test_the_data_directory_is_left_out(source: Path) -> None:
    """A project that keeps its data directory inside and copies itself: the usual case."""
    data = source / "deep" / ".orchestrator"
    data.mkdir(parents=True)
    (data / "runs.db").write_text("the journal")
    (source / "deep" / "kept").write_text("mine")
    copy = workspace_copy(plan_in(source, "."), {}, "run", data)
    assert copy is not None
    await make_copy(copy, {"PATH": os.defpath})
    assert copy.target == data / "workspaces" / "run"
    assert [path.name for path in (copy.target / "deep").iterdir()] == ["kept"]


# -- git as others have set it up ---------------------------------------------------------------------------


async def test_the_users_git_settings_have_no_say(source: Path, copy_of: CopyOf, environ: dict[str, str]) -> None:
    home = Path(environ["HOME"])
    for folder in (home / "hooks", home / "template" / "hooks"):
        folder.mkdir(parents=True)
        (folder / "pre-commit").write_text("#!/bin/sh\nexit 1\n")
        (folder / "pre-commit").chmod(0o755)
    (home / ".gitconfig").write_text(
        "[commit]\n gpgsign = true\n[gpg]\n program = /bin/false\n"
        f"[core]\n hooksPath = {home}/hooks\n[init]\n templateDir = {home}/template\n"
        '[filter "strict"]\n clean = false\n required = true\n'
    )
    (source / ".gitattributes").write_text("* filter=strict\n")
    target = await copy_of(source)
    assert git(target, "ls-files").split() == [".gitattributes", "README", "src/main.py"]
    assert not (target / ".git" / "hooks" / "pre-commit").exists()


async def test_variables_of_git_do_not_send_the_commit_elsewhere(
    tmp_path: Path, source: Path, copy_of: CopyOf, environ: dict[str, str]
) -> None:
    other = repository(tmp_path / "other")
    before = state(other)
    environ.update(GIT_DIR=str(other / ".git"), GIT_WORK_TREE=str(other), GIT_INDEX_FILE="elsewhere")
    target = await copy_of(source)
    assert state(other) == before
    assert git(target, "rev-list", "--count", "HEAD") == "1"


async def test_without_git_the_copy_stays_a_folder(
    source: Path, copy_of: CopyOf, environ: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    environ["PATH"] = "/nonexistent"
    target = await copy_of(source)
    assert sorted(path.name for path in target.iterdir()) == ["README", "src"]
    assert "git init" in caplog.text


@pytest.fixture
def slow_git(tmp_path: Path, environ: dict[str, str]) -> Path:
    """A git that takes a lock and hangs when files are to be added; returns the lock."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "git").write_text(
        f'#!/bin/sh\ncase " $* " in *" add "*) touch .git/index.lock; exec sleep 300;; esac\nexec {GIT} "$@"\n'
    )
    (folder / "git").chmod(0o755)
    environ["PATH"] = f"{folder}:{environ['PATH']}"
    return Path(".git", "index.lock")


async def test_a_slow_git_costs_the_first_commit_and_no_more(
    source: Path, copy_of: CopyOf, slow_git: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = await copy_of(source, git_seconds=1)
    assert "took longer than 1 s" in caplog.text
    assert not (target / slow_git).exists(), "git would refuse to work"
    assert git(target, "status", "--porcelain").split("\n") == ["?? README", "?? src/"]


# -- copies that fail ---------------------------------------------------------------------------------------


@pytest.fixture
def plain_user() -> Iterator[Path]:
    """A directory of a user who may not read everything: ourselves, or nobody where we are root."""
    folder = Path(tempfile.mkdtemp())
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    yield folder
    os.seteuid(os.getuid())
    for parent, _, _ in os.walk(folder):
        Path(parent).chmod(0o700)
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["secret", "closed", "."])
async def test_what_cannot_be_read_is_named_and_nothing_is_left(plain_user: Path, name: str) -> None:
    source = plain_user / "source"
    (source / "closed" / "deeper").mkdir(parents=True)
    (source / "secret").write_text("s")
    (source / "open").mkdir()
    (source / "open" / "file").write_text("in a folder that is read-only")
    (source / "open").chmod(0o555)
    (source / name).chmod(0)
    copy = WorkspaceCopy(source, plain_user / "data" / "workspaces" / "run", plain_user / "data")
    with pytest.raises(PlanError) as caught:
        await make_copy(copy, {"PATH": os.defpath})
    assert f"Permission denied: '{source / name}'" in caught.value.message
    assert "again" in caught.value.advice
    assert not copy.target.exists()


async def test_the_first_file_that_fails_ends_the_copy(plain_user: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = plain_user / "source"
    for number in range(10):
        (folder := source / f"folder{number}").mkdir(parents=True)
        os.mkfifo(folder / "pipe")
        (folder / "secret").touch(mode=0)
    with pytest.raises(PlanError, match="secret"):
        await make_copy(WorkspaceCopy(source, plain_user / "data" / "run", plain_user / "data"), {})
    assert caplog.text.count("pipe is not copied") <= 1


async def test_a_copy_that_exists_is_not_touched(source: Path, data: Path, copy_of: CopyOf) -> None:
    earlier = data / "workspaces" / "run" / "work"
    earlier.mkdir(parents=True)
    with pytest.raises(PlanError, match="File exists"):
        await copy_of(source)
    assert earlier.is_dir()


class OnSkip(logging.Handler):
    """Calls back, in the event loop, when the copying thread skips a file; counts how often."""

    def __init__(self, call: Callable[[], None]) -> None:
        super().__init__()
        self.call, self.count = call, 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        anyio.from_thread.run_sync(self.call)


async def test_cancelling_stops_the_copy_soon_and_removes_it(source: Path, data: Path) -> None:
    for number in range(20):
        (source / f"folder{number}").mkdir()
        os.mkfifo(source / f"folder{number}" / "pipe")
    copy = WorkspaceCopy(source, data / "workspaces" / "run", data)
    logger = logging.getLogger("orchestrator.workspaces")
    with anyio.fail_after(10), anyio.CancelScope() as scope:
        logger.addHandler(handler := OnSkip(scope.cancel))
        try:
            await make_copy(copy, {"PATH": os.defpath})
        finally:
            logger.removeHandler(handler)
    assert scope.cancelled_caught
    assert handler.count == 1
    assert not copy.target.exists()


# -- as part of a plan's run --------------------------------------------------------------------------------


def plan_in(folder: Path, copy: str, more: str = "") -> Plan:
    path = folder / "plan.yaml"
    path.write_text(
        f"version: 1\nname: copying\nworkspace: {{copy: {copy}}}\n{more}"
        "inputs:\n  repo: {type: string, default: source}\n"
        "steps:\n  - {id: one, agent: helper, prompt: hi}\n"
    )
    return load_plan(path)


@pytest.mark.parametrize("written", ["missing", "README", "'{{ inputs.repo }}/none'", "x" * 300, "loop"])
async def test_a_source_that_is_no_directory_is_refused_before_any_run(
    rt: Runtime, source: Path, written: str
) -> None:
    (source / "loop").symlink_to("loop")
    with pytest.raises(PlanError) as caught:
        await submit_plan(rt, plan_in(source, written), {})
    assert "no directory" in caught.value.message
    assert caught.value.exit_code == 2
    assert await rt.store.runs() == []


@pytest.mark.parametrize("written", ["{data}", "{data}/workspaces"])
async def test_the_place_of_the_copies_is_no_source(rt: Runtime, source: Path, written: str) -> None:
    (rt.config.data_path / "workspaces").mkdir(parents=True)
    with pytest.raises(PlanError, match="data directory"):
        await submit_plan(rt, plan_in(source, written.format(data=rt.config.data_path)), {})
    assert await rt.store.runs() == []


async def test_a_copy_that_fails_is_a_failed_run(rt: Runtime, source: Path) -> None:
    workspaces = rt.config.data_path / "workspaces"
    workspaces.write_text("a file where the copies ought to be")
    with anyio.fail_after(20), rt.events.watch() as watcher:
        outcome = await run_plan(rt, plan_in(source, "."), {})
        events = list(watcher.rest())
    [run] = await rt.store.runs()
    assert (run.id, run.status, run.cwd) == (outcome.run_id, "failed", str(workspaces / run.id))
    assert outcome.error is not None
    assert outcome.error["code"] == "plan"
    assert str(workspaces) in outcome.error["message"]
    assert outcome.cost_usd == 0
    steps = [(event.data["id"], event.data["status"]) for event in events if event.type == "plan.step"]
    assert steps == [("one", "skipped")]


async def appears(path: Path) -> bool:
    """Whether the file is made in time."""
    for _ in range(1000):
        if path.exists():
            return True
        await anyio.sleep(0.01)
    return False


async def test_a_plan_can_be_cancelled_while_it_copies(
    runtime: OpenRuntime, environ: dict[str, str], source: Path, slow_git: Path
) -> None:
    with anyio.fail_after(30):
        async with runtime(env={"PATH": environ["PATH"]}) as rt:
            run_id = await submit_plan(rt, plan_in(source, "."), {})
            target = rt.config.data_path / "workspaces" / run_id
            assert await appears(target / slow_git)
            run = await rt.store.run(run_id)
            assert (run.status, run.cwd) == ("running", str(target))
            await cancel(rt, run_id)
            assert (await wait(rt, run_id)).status == "cancelled"
    assert not target.exists()


async def test_copying_counts_towards_the_plans_time_limit(
    runtime: OpenRuntime, environ: dict[str, str], source: Path, slow_git: Path
) -> None:
    with anyio.fail_after(30):
        async with runtime(env={"PATH": environ["PATH"]}) as rt:
            outcome = await run_plan(rt, plan_in(source, ".", "limits: {timeout: 0.5}\n"), {})
    assert (outcome.status, (outcome.error or {}).get("code")) == ("timed_out", "timeout")
    assert not list((rt.config.data_path / "workspaces").iterdir())
