"""``orchestrator init`` as its users meet it, and what it does to an .mcp.json that somebody has written."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.agents import validate_tree
from orchestrator.config import load_config
from orchestrator.errors import ConfigError
from orchestrator.mcp_json import servers_in, with_server
from orchestrator.testing import ModelServer, Rule
from tests.conftest import DUMMY_KEY, bundled_cli

ROOT = Path(__file__).parent.parent
OURS = {"command": "orchestrator", "args": ["mcp"]}
FILES = ["orchestrator.yaml", "agents/implementer.md", "agents/researcher.md", ".mcp.json"]


class Init:
    """Runs ``orchestrator init`` in an empty directory, with nothing of this machine's environment."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "new"
        self.project.mkdir()
        (folder / "home").mkdir(exist_ok=True)
        self.env = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(folder / "home"),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
        }

    def run(self, *args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator", *(args or ("init",))],
            cwd=self.project, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def on_a_terminal(self, answers: str) -> tuple[int, str]:
        """Exit code, and all that was on the screen."""
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", "init"],
            cwd=self.project, env=self.env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        os.write(ours, answers.encode())
        seen = b""
        try:
            while data := os.read(ours, 4096):
                seen += data
        except OSError:  # how Linux says that the other end is closed
            pass
        os.close(ours)
        return process.wait(timeout=60), seen.decode()

    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.project)): path.read_bytes()
            for path in self.project.rglob("*")
            if path.is_file()
        }

    def write(self, name: str, text: str) -> Path:
        path = self.project / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
        return path


@pytest.fixture
def init(tmp_path: Path) -> Init:
    return Init(tmp_path)


# -- a new project ------------------------------------------------------------------------------------------


def test_a_new_project_is_valid(init: Init) -> None:
    said = init.run().stdout
    assert sorted(init.files()) == sorted(FILES)
    assert [line.split()[:2] for line in said.splitlines()[:4]] == [["created", name] for name in FILES]
    assert 2 <= len(said.partition("next:\n")[2].splitlines()) <= 4
    config = load_config(project_dir=init.project, environ={})
    assert config.limits.budget_usd == 5
    assert {report.status for report in validate_tree(init.project / "agents")} == {"loaded"}
    assert json.loads((init.project / ".mcp.json").read_text()) == {"mcpServers": {"orchestrator": OURS}}


def test_settings_that_are_commented_out_are_valid_too(init: Init) -> None:
    init.run()
    path = init.project / "orchestrator.yaml"
    every, count = re.subn(r"(?m)^( *)# (?= *[a-z_]+:(?: |$))", r"\1", path.read_text())
    assert count == 6
    path.write_text(every)
    config = load_config(project_dir=init.project, environ={})
    assert config.pool.warm == {"researcher": 1}
    assert config.limits.max_processes == 4


async def test_the_first_next_steps_work(init: Init, model: ModelServer) -> None:
    """What a newcomer types next: delegate to the researcher, and open Claude Code in the project."""
    model.rules = [Rule("It keeps shelves.", when={"system": "You answer one question about this project"})]
    await anyio.to_thread.run_sync(init.run)
    init.env |= {
        "ORCHESTRATOR_CLAUDE__PATH": str(bundled_cli()),
        "ORCHESTRATOR_CLAUDE__BASE_URL": model.base_url,
        "ORCHESTRATOR_CLAUDE__ENV__ANTHROPIC_API_KEY": DUMMY_KEY,
    }
    done = await anyio.to_thread.run_sync(init.run, "delegate", "researcher", "What does this project do?")
    assert "It keeps shelves." in done.stdout
    environ = {**init.env, "ANTHROPIC_BASE_URL": model.base_url, "ANTHROPIC_API_KEY": DUMMY_KEY}
    with anyio.fail_after(60):
        listed = await anyio.run_process([str(bundled_cli()), "mcp", "list"], cwd=init.project, env=environ)
    assert re.search(r"orchestrator: orchestrator mcp .*Pending approval", listed.stdout.decode())


def test_another_directory_is_made(init: Init) -> None:
    done = init.run("init", "deep/down")
    assert (init.project / "deep/down/.mcp.json").is_file()
    assert "  cd deep/down\n" in done.stdout


def test_one_who_has_no_orchestrator_on_the_path_is_told(init: Init, tmp_path: Path) -> None:
    init.env["PATH"] = str(tmp_path)
    assert "put `orchestrator` on your PATH" in init.run().stdout


# -- what is there already ----------------------------------------------------------------------------------


def test_again_changes_nothing(init: Init) -> None:
    init.run()
    before = init.files()
    said = init.run().stdout
    assert init.files() == before
    assert said.count("unchanged") == 4
    assert "(has a server 'orchestrator' already: orchestrator mcp)" in said


def test_dry_run_shows_all_and_writes_nothing(init: Init) -> None:
    init.write(".mcp.json", '{\n  "mcpServers": {}\n}\n')
    init.write("orchestrator.yaml", "limits: {max_depth: 2}\n")
    before = init.files()
    said = init.run("init", "--dry-run").stdout
    assert init.files() == before
    assert "would create agents/researcher.md\n    ---\n    name: researcher\n" in said
    assert '+    "orchestrator": {\n' in said
    assert "-limits: {max_depth: 2}\n" in said
    plan = json.loads(init.run("init", "--dry-run", "--json").stdout)["files"]
    assert {name: plan[name]["would"] for name in FILES} == dict(
        zip(FILES, ["change", "create", "create", "change"], strict=True)
    )
    assert init.files() == before


def test_where_nobody_can_be_asked_what_is_there_stays(init: Init) -> None:
    init.write("orchestrator.yaml", "limits: {max_depth: 2}\n")
    init.write(".mcp.json", '{"mcpServers": {}}\n')
    before = init.files()
    said = init.run(code=1).stdout
    assert re.search(r"left +orchestrator.yaml .*--yes replaces it and keeps it as orchestrator.yaml.bak", said)
    assert re.search(r"left +.mcp.json .*--yes adds our server", said)
    after = init.files()
    assert before.items() <= after.items()
    assert sorted(after) == sorted(FILES)
    report = json.loads(init.run("init", "--json", code=1).stdout)["files"]
    assert report == dict(zip(FILES, ["left", "unchanged", "unchanged", "left"], strict=True))


def test_yes_replaces_and_keeps_the_old(init: Init) -> None:
    for count, name in enumerate(["orchestrator.yaml.bak", "orchestrator.yaml.bak2"], 3):
        init.write("orchestrator.yaml", f"limits: {{max_depth: {count}}}\n")
        init.run("init", "--yes")
        assert init.files()[name] == f"limits: {{max_depth: {count}}}\n".encode()
    assert load_config(project_dir=init.project, environ={}).limits.budget_usd == 5


@pytest.mark.parametrize(("answer", "replaced"), [("n\n", False), ("\n", False), ("y\n", True)])
def test_on_a_terminal_it_asks(init: Init, answer: str, replaced: bool) -> None:
    agent = init.write("agents/researcher.md", "---\nname: researcher\ndescription: mine\n---\nMine.\n")
    mine = agent.read_bytes()
    code, screen = init.on_a_terminal(answer)
    assert code == 0
    assert "-Mine." in screen
    assert "Replace agents/researcher.md (it stays as agents/researcher.md.bak)? [y/N]" in screen
    assert (agent.read_bytes() != mine) is replaced
    assert ("agents/researcher.md.bak" in init.files()) is replaced


def test_ctrl_c_at_a_question_writes_nothing(init: Init) -> None:
    init.write(".mcp.json", "{}")
    code, screen = init.on_a_terminal("\x04")
    assert code == 1
    assert "Aborted" in screen
    assert init.files() == {".mcp.json": b"{}"}


def test_a_link_stays_a_link_and_keeps_its_mode(init: Init) -> None:
    real = init.write("shared.json", '{"mcpServers": {}}')
    real.chmod(0o600)
    (init.project / ".mcp.json").symlink_to("shared.json")
    init.run("init", "--yes")
    assert (init.project / ".mcp.json").is_symlink()
    assert json.loads(real.read_text()) == {"mcpServers": {"orchestrator": OURS}}
    assert real.stat().st_mode & 0o777 == 0o600
    assert not [name for name in init.files() if name.endswith(".bak")], "nothing is lost by a merge"


def test_a_server_of_our_name_is_left_alone(init: Init) -> None:
    mine = (
        '{"mcpServers": {"orchestrator": {"command": "/opt/bin/orchestrator", "args": ["mcp", "--config", "x"]}}}'
    )
    init.write(".mcp.json", mine)
    said = init.run("init", "--yes").stdout
    assert init.files()[".mcp.json"] == mine.encode()
    assert "(has a server 'orchestrator' already: /opt/bin/orchestrator mcp --config x)" in said


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{\n  "mcpServers": {\n    "a": {"command": "a"},\n  }\n}\n', r"\.mcp\.json:(3|4):\d+: not valid JSON: "),
        ('{\n  "mcpServers": {\n', r"\.mcp\.json:3:1: not valid JSON: "),
        ('{\n  "a": 1,\n  "mcpServers": []\n}\n', r"\.mcp\.json:3: 'mcpServers' must be an object"),
        ("[1]\n", r"\.mcp\.json:1:1: must be an object with 'mcpServers', not list"),
        ("[" * 100_000, r"\.mcp\.json(:1:\d+: not valid JSON|: nested too deeply)"),
    ],
)
@pytest.mark.parametrize("option", ["--yes", "--dry-run"])
def test_a_broken_mcp_json_is_named_and_nothing_is_written(
    init: Init, text: str, problem: str, option: str
) -> None:
    init.write(".mcp.json", text)
    said = init.run("init", option, code=2).stderr
    assert re.search(problem, said), said
    assert "Traceback" not in said
    assert init.files() == {".mcp.json": text.encode()}


def test_a_file_that_is_no_text_is_named(init: Init) -> None:
    (init.project / ".mcp.json").write_bytes(b'{\n"a": "\xff"}')
    assert ".mcp.json:2: not UTF-8" in init.run(code=2).stderr
    assert list(init.files()) == [".mcp.json"]


def test_a_directory_in_the_way_is_named(init: Init) -> None:
    (init.project / "orchestrator.yaml").mkdir()
    assert "orchestrator.yaml cannot be read: Is a directory" in init.run(code=2).stderr
    assert init.files() == {}


# -- merging ------------------------------------------------------------------------------------------------

STYLES = {
    "two spaces": '{\n  "mcpServers": {\n    "a": {"command": "a"}\n  },\n  "x": [1,2]\n}\n',
    "four spaces": '{\n    "x": 1.50,\n    "mcpServers": {\n        "a": {\n            "command": "a"\n        }'
    "\n    }\n}",
    "tabs": '{\n\t"mcpServers": {\n\t\t"a": {"command": "a"},\n\t\t"b": {"command": "b"}\n\t}\n}\n',
    "Windows": '{\r\n  "mcpServers": {\r\n    "a": {"command": "a"}\r\n  }\r\n}\r\n',
    "one line": '{"mcpServers": {"a": {"command": "a", "args": ["}", "\\"{"]}}}',
    "no servers": '{\n  "other": true\n}\n',
    "empty object": "{}\n",
    "one line, empty": '{"x": 1, "mcpServers": {}}',
    "empty servers": '{\n  "mcpServers": {}\n}\n',
    "byte order mark": '\ufeff{\n  "mcpServers": {\n    "ä": {"command": "ü\\u00e9"}\n  }\n}\n',
    "twice": '{"mcpServers": {"old": {}}, "mcpServers": {"a": {"command": "a"}}}',
}


def merged(text: str) -> str:
    """The text with our server, checked: it means what it should, and nothing that was there is gone."""
    new = with_server(text, "orchestrator", OURS, "f")
    tree = json.loads(text.removeprefix("\ufeff"))
    assert json.loads(new.removeprefix("\ufeff")) == {
        **tree,
        "mcpServers": {**tree.get("mcpServers", {}), "orchestrator": OURS},
    }
    kept = next((at for at, (was, now) in enumerate(zip(text, new, strict=False)) if was != now), len(text))
    assert new.endswith(text[kept:]), f"more than one place changed:\n{new}"
    assert with_server(new, "orchestrator", {"command": "other"}, "f") == new
    return new


@pytest.mark.parametrize("text", STYLES.values(), ids=STYLES)
def test_only_our_server_is_added(text: str) -> None:
    merged(text)


def test_it_is_written_in_the_style_of_its_neighbours() -> None:
    assert merged(STYLES["four spaces"]) == (
        '{\n    "x": 1.50,\n    "mcpServers": {\n        "a": {\n            "command": "a"\n        },\n'
        '        "orchestrator": {\n            "command": "orchestrator",\n            "args": [\n'
        '                "mcp"\n            ]\n        }\n    }\n}'
    )
    assert '\n\t\t"orchestrator": {\n\t\t\t"command": "orchestrator",\n' in merged(STYLES["tabs"])
    assert merged(STYLES["Windows"]).count("\n") == merged(STYLES["Windows"]).count("\r\n")
    assert merged(STYLES["one line"]).count("\n") == 0
    assert merged(STYLES["one line, empty"]).count("\n") == 0
    assert merged(STYLES["empty servers"]).startswith(
        '{\n  "mcpServers": {\n    "orchestrator": {\n      "command"'
    )


def test_an_empty_file_becomes_a_whole_one() -> None:
    assert json.loads(with_server(" \n", "orchestrator", OURS, "f")) == {"mcpServers": {"orchestrator": OURS}}


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@given(
    tree=st.dictionaries(st.text(), TREES),
    servers=st.none() | st.dictionaries(st.text(), TREES),
    indent=st.sampled_from([None, 1, 2, 4, "\t"]),
    ascii_only=st.booleans(),
)
def test_any_file_is_merged(
    tree: Mapping[str, Any], servers: Mapping[str, Any] | None, indent: int | str | None, ascii_only: bool
) -> None:
    tree = {key: value for key, value in tree.items() if key != "mcpServers"}
    if servers is not None:
        tree["mcpServers"] = {key: value for key, value in servers.items() if key != "orchestrator"}
    merged(json.dumps(tree, indent=indent, ensure_ascii=ascii_only))


@given(st.text(alphabet='{}[]",: \n1anulmcpServers'))
def test_any_text_is_understood_or_refused(text: str) -> None:
    try:
        found = servers_in(text, "f")
    except ConfigError as error:
        found = error.message
    assert found == {} or isinstance(found, dict) or found.startswith("f:")
