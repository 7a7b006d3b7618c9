"""Agent files as people write them: what is understood, what is warned of, what is refused."""

import hashlib
import os
from pathlib import Path

import frontmatter
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.agent_files import MAX_BYTES, Agent, parse_agent, read_agent
from orchestrator.agent_keys import BUILT_IN_TOOLS
from orchestrator.agents import FileReport, validate_tree
from orchestrator.errors import AgentError
from orchestrator.frontmatter import MAX_CHARS

CORPUS = Path(__file__).parent / "agent_corpus"


def parse(text: str | bytes) -> Agent:
    return parse_agent(text, path=Path("agents/x.md"), source="project")


def agent_file(*lines: str, body: str = "You are x.") -> str:
    return "\n".join(["---", "name: x", "description: An x.", *lines, "---", body])


def corpus_agent(name: str) -> Agent:
    path = CORPUS / name
    return parse_agent(path.read_bytes(), path=path, source="project")


def reports(folder: Path) -> dict[str, FileReport]:
    return {report.path.name: report for report in validate_tree(folder)}


# --- the corpus ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CORPUS.rglob("*.md")), ids=lambda path: path.stem)
def test_each_file_of_the_corpus_is_judged_as_its_folder_says(path: Path) -> None:
    (report,) = validate_tree(path)
    assert report.status == path.parent.name
    assert bool(report.warnings) == (report.status == "warnings")
    assert bool(report.reason) == (report.status == "refused")
    assert bool(report.name) == (report.status != "refused")


def test_a_tree_is_reported_file_by_file_in_a_stable_order() -> None:
    found = [report.path for report in validate_tree(CORPUS)]
    assert found == sorted(CORPUS.rglob("*.md"))


@pytest.mark.parametrize(
    ("name", "tools"),
    [
        ("loaded/plain.md", ("Read", "Grep", "Glob")),
        ("loaded/tools-as-list.md", ("Read", "Bash", "mcp__postgres__query")),
        (
            "loaded/tools-with-patterns.md",
            ("Bash(git add *)", 'Bash(git commit -m "*", --no-verify)', "Read", "Agent(log-reader)"),
        ),
        ("loaded/block-description.md", ("Read", "Write")),
        ("loaded/everything.md", None),
        ("warnings/examples-on-one-line.md", ("Read", "Write")),
        ("warnings/examples-unindented.md", ("Read", "Edit", "Bash")),
        ("warnings/tabs.md", ("Read", "Grep")),
        ("warnings/bare-star.md", None),
        ("warnings/wrong-case.md", ("Read", "Grep")),
        ("warnings/allowed-tools.md", ("Bash(git rebase:*)", "Bash(git fetch:*)", "Read")),
        ("warnings/tools-empty.md", ()),
        ("warnings/unknown-keys.md", None),
        ("warnings/full-width-colons.md", ("Read",)),
    ],
)
def test_tools_are_understood_however_they_are_written(name: str, tools: tuple[str, ...] | None) -> None:
    assert corpus_agent(name).tools == tools


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("README.md", 1, "no frontmatter"),
        ("text-first.md", 1, "no frontmatter"),
        ("unclosed.md", 1, "not closed"),
        ("no-name.md", 1, "no name"),
        ("name-number.md", 2, "quotes"),
        ("tools-as-mapping.md", 5, "names of tools"),
        ("tools-unbalanced.md", 4, "unbalanced"),
        ("tools-misspelt.md", 4, "did you mean 'tools'"),
        ("tools-twice.md", 5, "given twice, first on line 4"),
        ("tools-swallowed.md", 4, "'tools'"),
        ("permission-mode-unknown.md", 4, "'delegate' is not one of"),
        ("hooks-unreadable.md", 4, "hooks"),
    ],
)
def test_a_refusal_names_file_line_and_reason(name: str, line: int, words: str) -> None:
    path = CORPUS / "refused" / name
    with pytest.raises(AgentError) as caught:
        parse_agent(path.read_text(), path=path, source="project")
    assert caught.value.message.startswith(f"{path}:{line}: ")
    assert words in caught.value.message
    assert caught.value.details["line"] == line
    assert caught.value.details["reason"] in caught.value.message


def test_every_known_key_has_a_field() -> None:
    agent = corpus_agent("loaded/everything.md")
    assert agent.disallowed_tools == ("Write", "Edit")
    assert (agent.model, agent.effort, agent.permission_mode, agent.max_turns) == (
        "claude-sonnet-4-5",
        "high",
        "plan",
        25,
    )
    assert agent.mcp_servers == {"advisories": {"type": "http", "url": "http://127.0.0.1:9000/mcp", "retries": 3}}
    assert agent.color == "orange"
    assert agent.description == "Audits dependencies. 🔍"
    assert agent.system_prompt == "You audit."
    assert agent.extra == {}


def test_keys_without_effect_are_kept_and_said_to_have_none() -> None:
    agent = corpus_agent("warnings/hooks-and-memory.md")
    assert (agent.memory, agent.isolation) == ("project", "worktree")
    assert agent.hooks["PreToolUse"][0]["hooks"][0]["command"] == "./check.sh"
    assert [warning.split(": is kept")[0] for warning in agent.warnings] == [
        "line 4: memory",
        "line 5: isolation",
        "line 6: hooks",
    ]


def test_unknown_keys_are_kept_as_written_and_a_near_one_is_named() -> None:
    agent = corpus_agent("warnings/unknown-keys.md")
    assert agent.extra == {
        "version": "1.2.0",
        "tags": ["planning", "backend"],
        "last_updated": "2025-03-01",
        "modle": "opus",
    }
    assert "line 7: unknown key 'modle' is ignored; did you mean 'model'?" in agent.warnings


def test_values_that_restrict_nothing_are_left_out_with_a_warning_each() -> None:
    agent = corpus_agent("warnings/bad-values.md")
    assert (agent.effort, agent.max_turns, agent.background, agent.memory, agent.model) == (
        None,
        None,
        False,
        None,
        None,
    )
    assert agent.mcp_servers == {}
    assert [warning.split(":")[1].strip() for warning in agent.warnings] == [
        "effort",
        "maxTurns",
        "background",
        "memory",
        "model",
        "mcpServers",
    ]


def test_lenient_reading_tells_the_line_that_is_not_yaml() -> None:
    agent = corpus_agent("warnings/examples-unindented.md")
    assert agent.warnings[0].startswith("frontmatter is not valid YAML (line 3: mapping values")
    assert agent.warnings[0].endswith("; read leniently")
    assert agent.description.startswith("Use this agent when tests fail.")
    assert 'user: "Fix the build"' in agent.description
    assert "Note: it never skips tests" in agent.description
    assert agent.model == "opus"


def test_a_written_line_break_in_a_description_is_one() -> None:
    assert "</example>\n\n<example>another" in corpus_agent("warnings/examples-on-one-line.md").description


def test_dashes_in_the_body_do_not_end_it() -> None:
    assert corpus_agent("loaded/block-description.md").system_prompt.endswith("is text.")


# --- single rules ----------------------------------------------------------------------------------------


def test_windows_line_ends_and_a_byte_order_mark_do_not_matter() -> None:
    text = agent_file("tools: Read", body="One.\nTwo.")
    windows = b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()
    assert parse(windows).model_copy(update={"digest": ""}) == parse(text).model_copy(update={"digest": ""})


def test_the_digest_is_that_of_the_file() -> None:
    data = agent_file().encode()
    assert parse(data).digest == hashlib.sha256(data).hexdigest()


def test_workspaces_qualify_the_id() -> None:
    agent = parse_agent(agent_file(), path=Path("x.md"), source="workspace", workspace="shop")
    assert (agent.id, agent.name, agent.source) == ("shop:x", "x", "workspace")


@pytest.mark.parametrize(
    ("line", "model"),
    [
        ("model: inherit", None),
        ("model: Inherit", None),
        ("model:", None),
        ("model: opus", "opus"),
        ("model: --dangerously-skip-permissions", None),
        ("model: claude-opus-4-5[1m]", "claude-opus-4-5[1m]"),
    ],
)
def test_a_model_is_an_alias_or_an_id(line: str, model: str | None) -> None:
    assert parse(agent_file(line)).model == model


@pytest.mark.parametrize(
    "lines",
    [
        ["tools: true"],
        ["tools: [Read, 3]"],
        ["tools: [Read, {Bash: git}]"],
        ["tools: '; rm -rf /'"],
        ["tools: Bash)("],
        ["tools: --allow-all"],
        ["disallowedTools: '*'"],
        ["disallowedTools: {Write: true}"],
        ["disalowedTools: Write"],
        ["permissionMode: acceptedits"],
        ["permissionMode: [plan]"],
        ["permissionMode: plan", "permission-mode: plan", "permissionMode: default"],
        ["isolation: container"],
        ["hooks: [PreToolUse]"],
    ],
)
def test_a_restriction_that_makes_no_sense_refuses_the_file(lines: list[str]) -> None:
    with pytest.raises(AgentError):
        parse(agent_file(*lines))


def test_a_misspelt_restriction_is_only_a_warning_where_the_right_one_is_given_too() -> None:
    agent = parse(agent_file("tools: Read", "tool: Read, Write", "allowed-tools: Bash"))
    assert agent.tools == ("Read",)
    assert len(agent.warnings) == 2


def test_the_same_restriction_said_twice_is_no_contradiction() -> None:
    assert parse(agent_file("tools: Read", "tools: Read")).tools == ("Read",)


@pytest.mark.parametrize(
    ("lines", "delegates", "subagents"),
    [
        ([], False, False),
        (["tools: '*'"], False, False),
        (["tools: []"], False, False),
        (["tools: Read"], False, False),
        (["tools: mcp__orchestrator"], True, False),
        (["tools: mcp__orchestrator__delegate"], True, False),
        (["tools: mcp__orchestrator__query_traces"], True, False),
        (["tools: mcp__*"], True, False),
        (["tools: mcp__orchestra"], False, False),
        (["tools: mcp__orchestrator2__delegate"], False, False),
        (["disallowedTools: mcp__orchestrator"], False, False),
        (["disallowedTools: mcp__orchestrator__*"], False, False),
        (["tools: mcp__orchestrator", "disallowedTools: mcp__orchestrator__delegate"], False, False),
        (["tools: mcp__orchestrator", "disallowedTools: Bash"], True, False),
        (["tools: Agent"], False, True),
        (["tools: Read, Agent(worker, writer)"], False, True),
        (["tools: Task"], False, True),
        (["tools: Workflow"], False, True),
        (["tools: Agent", "disallowedTools: Agent"], False, False),
    ],
)
def test_who_may_hand_on_work(lines: list[str], delegates: bool, subagents: bool) -> None:
    agent = parse(agent_file(*lines))
    assert (agent.may_delegate(), agent.may_use_subagents()) == (delegates, subagents)


def test_servers_given_only_by_name_are_named_in_a_warning() -> None:
    agent = parse(agent_file("mcpServers:", "  - github", "  - files: {command: file-server}"))
    assert agent.mcp_servers == {"files": {"command": "file-server"}}
    assert "used in part" in agent.warnings[0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"---\nname: x\n\0\n---\n", ":3: not text"),
        ("---\nname: x\n---\n".encode("utf-16"), "UTF-16"),
        (b"---\nname: x\ndescription: caf\xe9\n---\n", ":3: not UTF-8"),
        (b"x" * (MAX_BYTES + 1), "larger than 1024 KiB"),
        (b"---\nname: x\ndescription: " + b"x" * MAX_CHARS + b"\n---\n", "frontmatter is larger"),
        ("---\nname: x\ndescription: \ud800\n---\n", "not valid Unicode"),
        ("---\nname: 'x\\ny'\n---\n".replace("'", '"'), "control characters"),
        (f"---\nname: {'x' * 257}\n---\n", "longer than 256"),
        ("---\nname: -x\n---\n", "must not start with -"),
    ],
    ids=["nul", "utf-16", "latin-1", "huge", "huge-frontmatter", "surrogate", "newline", "long", "option"],
)
def test_what_cannot_be_an_agent_is_refused(data: str | bytes, words: str) -> None:
    with pytest.raises(AgentError, match=words):
        parse(data)


def test_aliases_that_multiply_do_not_explode() -> None:
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    agent = parse(agent_file("tools: Read", *bomb))
    assert agent.tools == ("Read",)
    assert len(agent.model_dump_json()) < 10_000


def test_endless_nesting_is_refused_or_read_as_text() -> None:
    agent = parse(agent_file("tools: Read", "metadata: " + "[" * 20_000))
    assert agent.tools == ("Read",)


# --- a folder full of surprises --------------------------------------------------------------------------


def test_odd_things_in_a_folder_are_reported_and_never_raise(tmp_path: Path) -> None:
    (tmp_path / "good.md").write_text(agent_file())
    (tmp_path / "folder.md").mkdir()
    (tmp_path / "folder.md" / "inner.MD").write_text(agent_file())
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "self.md").symlink_to(tmp_path / "self.md")
    (tmp_path / "dangling.md").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked.md").symlink_to(tmp_path / "good.md")
    os.mkfifo(tmp_path / "pipe.md")
    (tmp_path / "binary.md").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "notes.txt").write_text("not markdown")
    found = reports(tmp_path)
    assert {name: report.status for name, report in found.items()} == {
        "good.md": "loaded",
        "inner.MD": "loaded",
        "linked.md": "loaded",
        "self.md": "refused",
        "dangling.md": "refused",
        "pipe.md": "refused",
        "binary.md": "refused",
    }
    assert "not a regular file" in str(found["pipe.md"].reason)
    assert "cannot be read" in str(found["dangling.md"].reason)


def test_a_file_name_that_is_not_text_can_still_be_reported(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.md")
    try:
        path.write_text(agent_file())
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    (report,) = validate_tree(tmp_path)
    assert report.status == "refused"
    assert "udce9" in report.model_dump_json()


def test_a_folder_that_is_missing_is_reported(tmp_path: Path) -> None:
    (report,) = validate_tree(tmp_path / "nothing")
    assert report.status == "refused"
    assert "cannot be read" in str(report.reason)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_reported(tmp_path: Path) -> None:
    (tmp_path / "secret.md").write_text(agent_file())
    (tmp_path / "secret.md").chmod(0)
    (tmp_path / "closed").mkdir(mode=0)
    assert {report.status for report in validate_tree(tmp_path)} == {"refused"}


# --- properties ------------------------------------------------------------------------------------------


def must_be_agent_or_refusal(data: str | bytes) -> Agent | None:
    """The agent, or None; any other exception fails the test. What is loaded can be stored."""
    try:
        agent = parse(data)
    except AgentError:
        return None
    agent.model_dump_json()
    return agent


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_an_agent_or_a_refusal(data: bytes) -> None:
    must_be_agent_or_refusal(data)
    must_be_agent_or_refusal(b"---\nname: x\n" + data + b"\n---\n")


WORDS = ["name", "tools", "description", "hooks", "mcpServers", "x", "1", "~", "yes", "2024-01-01", "é"]
MARKS = [":", ": ", "\n", "\n  ", "\t", "- ", "[", "]", "{", "}", '"', "'", "|", ">-", "#", "---", "...", "*", "("]
TRAPS = [
    "&a ",
    "*a",
    "!!set ",
    "!x ",
    "? ",
    "<<",
    "%YAML 9.9",
    "\\U99999999",
    "\\ud800",
    "：",
    "\u2028",
    "\x85",
    "\x07",
]
FRAGMENTS = st.sampled_from(WORDS) | st.sampled_from(MARKS) | st.sampled_from(TRAPS)


@settings(max_examples=400, deadline=None)
@given(st.lists(FRAGMENTS, max_size=25).map("".join))
def test_anything_like_yaml_is_an_agent_or_a_refusal(text: str) -> None:
    must_be_agent_or_refusal(f"---\n{text}\n---\nbody")
    must_be_agent_or_refusal(f"---\nname: x\ndescription: {text}\n---\nbody")


SPEECH = ["when: now", "<example>", 'user: "hi"', "Context: x", "name: other", "model: opus", "Examples:", ""]
NOISE = ["  - item", "\tTabbed: y", "'open", "*star", "#", "| a", "{b", "use `x: y`", "&anchor", "@home"]
PROSE = st.lists(st.sampled_from(SPEECH) | st.sampled_from(NOISE), max_size=6)
SPELLINGS = st.sampled_from(["tools", "Tools", "allowed-tools", '"tools"', "tools "])


@settings(max_examples=300, deadline=None)
@given(before=PROSE, after=PROSE, key=SPELLINGS, indent=st.sampled_from(["", "", " ", "\t"]))
def test_a_list_of_tools_is_never_lost_in_a_broken_description(
    before: list[str], after: list[str], key: str, indent: str
) -> None:
    """Whatever is around the line, the agent has the tools it names and no other, or the file is refused."""
    lines = ["name: x", "description: Use it: now", *before, f"{indent}{key}: Read, Grep", *after]
    agent = must_be_agent_or_refusal("\n".join(["---", *lines, "---", "body"]))
    if agent is not None:
        assert agent.tools is not None
        assert set(BUILT_IN_TOOLS).intersection(agent.tools) == {"Read", "Grep"}
        assert not any("*" in tool for tool in agent.tools)


RULES = st.from_regex(r"[A-Z][a-z]{1,8}(\([a-z *:,]{1,10}\))?", fullmatch=True)


@settings(max_examples=150, deadline=None)
@given(st.lists(RULES, min_size=1, max_size=6, unique=True), st.sampled_from([", ", ",", " ", "  ,  "]))
def test_rules_are_split_between_and_not_within(rules: list[str], separator: str) -> None:
    quoted = separator.join(rules).replace("'", "''")
    assert parse(agent_file(f"tools: '{quoted}'")).tools == tuple(rules)


@pytest.mark.parametrize("path", sorted((CORPUS / "loaded").glob("*.md")), ids=lambda path: path.name)
def test_valid_files_read_as_python_frontmatter_reads_them(path: Path) -> None:
    """An independent reader of the same format agrees on every file it can read."""
    theirs = frontmatter.load(str(path))
    ours = read_agent(path, source="project")
    assert ours.name == theirs["name"]
    assert ours.description == str(theirs["description"]).strip()
    assert ours.system_prompt == theirs.content.replace("\r\n", "\n").strip()
