"""Where the CLI keeps a session: its file is found whatever the directory is called, so that no turn is lost."""

import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator import Outcome, Runtime, Task, delegate
from orchestrator.backends.claude_files import state_of, transcript
from orchestrator.testing import ModelServer, Rule

Open = Callable[..., AbstractAsyncContextManager[Runtime]]

#: Names of more than 200 characters are cut off by the CLI, and what it puts in their place is its own affair.
DIRECTORIES = {
    "short": Path("here"),
    "long": Path(*("a-long-name-of-a-directory" for _ in range(9))),
    "beyond the BMP": Path("\U0001f600 und Grüße", "e\u0301"),
    "long and beyond the BMP": Path(*("\U0001f600-Grüße-und-Küsse-aus-der-Ferne" for _ in range(9))),
}


@pytest.fixture(params=DIRECTORIES)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path: Path = tmp_path / DIRECTORIES[request.param]
    path.mkdir(parents=True)
    return path


@pytest.fixture(params=["home", "configured"])
def config_folder(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Settings that say where the CLI keeps its files."""
    if request.param == "home":
        return {}
    return {"claude__env__CLAUDE_CONFIG_DIR": str(tmp_path / "settings of \U0001f600")}


async def turn(rt: Runtime, prompt: str, cwd: Path, session: str | None = None) -> Outcome:
    with anyio.fail_after(60):
        outcome = await delegate(rt, Task(agent="helper", prompt=prompt, cwd=cwd, session=session))
    assert outcome.status == "succeeded", outcome.error
    return outcome


async def test_what_was_said_elsewhere_is_known_wherever_the_session_is_kept(
    runtime: Open, model: ModelServer, directory: Path, config_folder: dict[str, Any]
) -> None:
    """Our process holds the session and knows nothing of the turn between: it must not go on from its memory."""
    model.rules = [Rule("ok")]
    async with runtime(**config_folder) as rt:
        first = await turn(rt, "My name is Ada.", directory)
        second = await turn(rt, "I am a countess.", directory, first.session_id)
        assert rt.pool.state.counters.session_hits == 1, "nobody else was there: the process goes on"
        async with runtime(**config_folder) as elsewhere:
            await turn(elsewhere, "I live in London.", directory, first.session_id)
        await turn(rt, "And now?", directory, first.session_id)
        assert (rt.pool.state.counters.session_hits, rt.pool.state.counters.retired["superseded"]) == (1, 1)
    assert second.session_id == first.session_id
    told = json.dumps(model.journal[-1].body["messages"])
    assert [said in told for said in ("My name is Ada.", "I am a countess.", "I live in London.")] == [True] * 3


def a_transcript(config: Path, folder: str, session_id: str) -> Path:
    path = config / "projects" / folder / f"{session_id}.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("{}\n")
    return path


def test_a_file_is_looked_for_until_it_is_there(tmp_path: Path) -> None:
    """The state before the first turn must not hide the one after it."""
    env, cwd = {"HOME": str(tmp_path)}, Path("/somewhere/else")
    assert state_of(transcript("s1", cwd, env)) == ""
    made = a_transcript(tmp_path / ".claude", "a-name-of-the-clis-own", "s1")
    assert transcript("s1", cwd, env) == made
    assert state_of(transcript("s2", cwd, env)) == "", "another session's file is none of its"


def test_the_folder_of_the_directory_comes_first(tmp_path: Path) -> None:
    env, cwd = {"HOME": str(tmp_path)}, Path("/srv/my project")
    copied = a_transcript(tmp_path / ".claude", "-srv-copied", "s1")
    assert transcript("s1", cwd, env) == copied
    own = a_transcript(tmp_path / ".claude", "-srv-my-project", "s1")
    assert transcript("s1", cwd, env) == own


@pytest.mark.parametrize("session_id", ["*", "?1", "[s]1"])
def test_an_id_is_no_pattern(tmp_path: Path, session_id: str) -> None:
    a_transcript(tmp_path / ".claude", "elsewhere", "s1")
    assert state_of(transcript(session_id, Path("/srv"), {"HOME": str(tmp_path)})) == ""


def test_each_configuration_has_its_own_sessions(tmp_path: Path) -> None:
    made = [a_transcript(tmp_path / name, "elsewhere", "s1") for name in ("one", "two")]
    envs = [{"HOME": str(tmp_path), "CLAUDE_CONFIG_DIR": str(tmp_path / name)} for name in ("one", "two")]
    assert [transcript("s1", Path("/srv"), env) for env in envs] == made
