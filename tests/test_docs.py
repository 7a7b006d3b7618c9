"""The documents keep their word: snippets run, names exist, every dependency has its reason."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import anyio

from orchestrator.testing import ModelServer, Rule
from tests.conftest import DUMMY_KEY, bundled_cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


async def test_the_readmes_python_program_runs(tmp_path: Path, model: ModelServer) -> None:
    model.rules = [Rule("It keeps track of shelves.")]
    (tmp_path / "home").mkdir()
    [program] = blocks(README, "python")
    environ = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
        "ORCHESTRATOR_DATA_DIR": str(tmp_path / "data"),
        "ORCHESTRATOR_AGENTS__PATHS": f"[{ROOT / 'agents'}]",
        "ORCHESTRATOR_CLAUDE__PATH": str(bundled_cli()),
        "ORCHESTRATOR_CLAUDE__BASE_URL": model.base_url,
        "ORCHESTRATOR_CLAUDE__ENV": f"{{ANTHROPIC_API_KEY: {DUMMY_KEY}}}",
    }
    with anyio.fail_after(60):
        done = await anyio.run_process(
            [sys.executable, "-c", program], cwd=tmp_path, env=environ, check=False, stderr=subprocess.STDOUT
        )
    said = done.stdout.decode()
    assert done.returncode == 0, said
    assert said.startswith("succeeded It keeps track of shelves. "), said
    assert float(said.split()[-1]) > 0, "the cost is known"


def test_the_readmes_agent_file_loads(tmp_path: Path) -> None:
    from orchestrator.agents import validate_tree

    [agent] = blocks(README, "markdown")
    (tmp_path / "worker.md").write_text(agent)
    [report] = validate_tree(tmp_path)
    assert report.status == "loaded", report


def test_commands_in_the_readme_exist() -> None:
    from orchestrator.cli.main import COMMANDS

    named = set(re.findall(r"^ {4}(?:\.venv/bin/)?orchestrator (\w+)", README, re.MULTILINE))
    assert named
    assert named <= COMMANDS.keys()


def test_make_targets_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make (\w+)`?", README)) - {"without"} <= targets


def test_every_dependency_has_a_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[><=\[ ]", requirement)[0] for requirement in project["dependencies"]]
    design = (ROOT / "docs" / "design.md").read_text()
    assert [name for name in names if name not in design] == []


def test_public_names_exist_and_are_the_listed_ones() -> None:
    import orchestrator

    for name in orchestrator.__all__:
        assert getattr(orchestrator, name) is not None
    assert (ROOT / "orchestrator" / "py.typed").exists()
    assert (ROOT / "mcp_tools" / "py.typed").exists()


def test_ci_runs_what_the_readme_names() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    for target in ("make demo", "make test", "make lint"):
        assert target in ci
        assert target in README


def test_the_agents_of_the_project_load() -> None:
    from orchestrator.agents import validate_tree

    reports = validate_tree(ROOT / "agents")
    assert {report.status for report in reports} == {"loaded"}, reports
