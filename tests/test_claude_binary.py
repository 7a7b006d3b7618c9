"""Finding the CLI: with real programs in real directories."""

import os
from pathlib import Path

import pytest

from orchestrator.backends.claude_binary import Candidate, candidates, find_binary, version_of
from orchestrator.errors import CLINotFoundError


def program(path: Path, script: str = "echo '1.2.3 (Claude Code)'", mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(mode)
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


# -- where it is looked for ---------------------------------------------------------------------------------


def test_the_configured_path_is_the_only_one(tmp_path: Path, home: Path) -> None:
    on_path = program(tmp_path / "bin" / "claude")
    configured = program(tmp_path / "mine")
    found = find_binary(configured, {"PATH": str(on_path.parent)}, home)
    assert (found.origin, found.path) == ("claude.path", configured)
    assert len(candidates(configured, {"PATH": str(on_path.parent)}, home)) == 1


def test_path_comes_before_the_usual_places_and_they_before_the_bundled_one(tmp_path: Path, home: Path) -> None:
    on_path = program(tmp_path / "bin" / "claude")
    local = program(home / ".local" / "bin" / "claude")
    older = program(home / ".claude" / "local" / "claude")
    environ = {"PATH": f"{tmp_path / 'empty'}{os.pathsep}{on_path.parent}"}
    for place, origin in ((on_path, "PATH"), (local, "usual place"), (older, "usual place")):
        found = find_binary(None, environ, home)
        assert (found.path, found.origin) == (place, origin)
        place.unlink()
    assert candidates(None, environ, home)[-1].origin == "claude_agent_sdk"


def test_the_bundled_copy_is_used_where_nothing_else_is(home: Path) -> None:
    found = [each for each in candidates(None, {}, home) if each.origin == "claude_agent_sdk"]
    assert [each.path and each.path.name for each in found] == ["claude"]
    assert find_binary(None, {}, home).usable


def test_without_path_nothing_of_our_own_path_is_used(tmp_path: Path, home: Path) -> None:
    on_path = candidates(None, {}, home)[0]
    assert on_path == Candidate("PATH", None)
    assert not on_path.usable


@pytest.mark.parametrize("mode", [0o644, 0o000])
def test_a_file_that_is_no_program_is_passed_over(tmp_path: Path, home: Path, mode: int) -> None:
    program(tmp_path / "bin" / "claude", mode=mode)
    local = program(home / ".local" / "bin" / "claude")
    assert find_binary(None, {"PATH": str(tmp_path / "bin")}, home).path == local


def test_a_directory_of_that_name_is_passed_over(tmp_path: Path, home: Path) -> None:
    (tmp_path / "bin" / "claude").mkdir(parents=True)
    local = program(home / ".local" / "bin" / "claude")
    assert find_binary(None, {"PATH": str(tmp_path / "bin")}, home).path == local


def test_a_link_is_followed_and_a_broken_one_passed_over(tmp_path: Path, home: Path) -> None:
    local = home / ".local" / "bin" / "claude"
    local.parent.mkdir(parents=True)
    local.symlink_to(tmp_path / "versions" / "1.2.3")
    older = program(home / ".claude" / "local" / "claude")
    assert find_binary(None, {}, home).path == older
    program(tmp_path / "versions" / "1.2.3")
    assert find_binary(None, {}, home).path == local


def test_a_relative_entry_of_path_gives_an_absolute_path(home: Path, tmp_path: Path) -> None:
    """Agents run in directories of their own: from there a relative path leads elsewhere."""
    program(tmp_path / "bin" / "claude")
    relative = os.path.relpath(tmp_path / "bin")
    found = find_binary(None, {"PATH": relative}, home)
    assert found.path is not None
    assert found.path.is_absolute()
    assert found.path.samefile(tmp_path / "bin" / "claude")


# -- what is said when it is not there ----------------------------------------------------------------------


def test_a_configured_path_that_does_not_exist_is_named(tmp_path: Path, home: Path) -> None:
    program(tmp_path / "bin" / "claude")
    missing = tmp_path / "missing" / "claude"
    with pytest.raises(CLINotFoundError) as caught:
        find_binary(missing, {"PATH": str(tmp_path / "bin")}, home)
    assert f"claude.path: {missing} is not there" in caught.value.message
    assert "claude.path" in caught.value.advice
    assert caught.value.exit_code == 2
    assert not caught.value.retryable


@pytest.mark.parametrize("make", [lambda path: program(path, mode=0o644), lambda path: path.mkdir()])
def test_a_configured_path_that_is_no_program_is_named(tmp_path: Path, home: Path, make: object) -> None:
    configured = tmp_path / "claude"
    assert callable(make)
    make(configured)
    with pytest.raises(CLINotFoundError, match="is not a program") as caught:
        find_binary(configured, {}, home)
    assert str(configured) in caught.value.message


def test_a_path_nobody_can_look_at_is_just_not_there(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "claude", tmp_path / ("x" * 300)):
        with pytest.raises(CLINotFoundError, match="is not there"):
            find_binary(path, {}, home)


# -- its version --------------------------------------------------------------------------------------------


def test_the_version_is_its_first_line(tmp_path: Path) -> None:
    binary = program(tmp_path / "claude", "echo '  1.2.3 (Claude Code)'; echo 'a new version is available'")
    assert version_of(binary) == "1.2.3 (Claude Code)"


def test_the_version_is_asked_for_without_our_environment_and_input(tmp_path: Path) -> None:
    binary = program(tmp_path / "claude", 'read -r line; echo "$* $HOME $line $(env | grep -c ORCHESTRATOR_)"')
    assert version_of(binary) == "--version /nonexistent  0"


def test_a_version_that_is_no_text_is_still_a_version(tmp_path: Path) -> None:
    assert version_of(program(tmp_path / "claude", r"printf '1.2.3 \377'")) == "1.2.3 \ufffd"


@pytest.mark.parametrize("script", ["exit 3", "kill -9 $$", "exec sleep 60"])
def test_a_program_that_does_not_answer_is_named(tmp_path: Path, script: str) -> None:
    binary = program(tmp_path / "claude", script)
    with pytest.raises(CLINotFoundError, match="does not answer --version") as caught:
        version_of(binary, timeout=0.3)
    assert str(binary) in caught.value.message


def test_a_file_that_cannot_be_run_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "claude"
    binary.write_bytes(b"\x7fELF but not really")
    binary.chmod(0o755)
    with pytest.raises(CLINotFoundError, match="does not answer"):
        version_of(binary)
