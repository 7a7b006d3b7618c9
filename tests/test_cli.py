"""The command line as its users meet it: a process, its output, its exit code."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.killing import RUN_ID_ENV
from tests.conftest import bundled_cli, write_agent

ROOT = Path(__file__).parent.parent

INSTANCE_COLUMNS = "(id, kind, host, pid, pid_created, started_us, alive_us, ended_us)"


class Shell:
    """Runs ``orchestrator`` in a project of its own, with nothing of this machine's environment."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "project"
        self.project.mkdir(parents=True)
        (folder / "home").mkdir()
        (self.project / "orchestrator.yaml").write_text(
            f"data_dir: .data\nclaude:\n  path: {bundled_cli()}\nlimits:\n  timeout_s: 60\n"
        )
        self.env = {
            "PATH": os.defpath + ":/usr/local/bin:/usr/bin:/bin",
            "HOME": str(folder / "home"),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
        }

    def start(self, *args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator", *args],
            cwd=self.project,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        process = self.start(*args)
        out, err = process.communicate(timeout=90)
        assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(args, code, out, err)

    def json(self, *args: str, code: int = 0) -> Any:
        return json.loads(self.run(*args, "--json", code=code).stdout)

    def scenario(self, plan: str, scenario: str, name: str = "plan") -> Path:
        path = self.project / f"{name}.yaml"
        path.write_text(plan)
        path.with_suffix(".scenario.yaml").write_text(scenario)
        return path


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shell, subprocess.CompletedProcess[str]]:
    """A project in which the example ran once."""
    shell = Shell(tmp_path_factory.mktemp("cli"))
    shutil.copytree(ROOT / "examples", shell.project / "examples")
    shutil.copytree(ROOT / "agents", shell.project / "agents")
    return shell, shell.run("run", "examples/review_team.yaml", "--offline")


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    shell = Shell(tmp_path)
    (shell.project / "agents").mkdir()
    write_agent(shell.project, "helper", tools="Read", body="You are the helper.")
    write_agent(shell.project, "worker", tools="Read, Write, Bash", permissionMode="acceptEdits", body="You work.")
    return shell


PLAN = """\
version: 1
name: small
steps:
  - id: one
    agent: {agent}
    prompt: say something
"""
HELLO = "version: 1\nrules: [{reply: hello}]\n"


def _run_id(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout.rsplit("orchestrator trace show ", 1)[1].strip()


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['orchestrator', '--help']\n"
        "from orchestrator.__main__ import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'pydantic', 'anyio', 'rich', 'mcp', 'yaml', 'opentelemetry', 'asyncio'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0, done.stderr
    for command in ("run", "delegate", "agents", "runs", "trace", "serve", "mcp", "doctor", "config"):
        assert f"\n  {command} " in done.stdout


def test_a_mistyped_command_is_guessed(shell: Shell) -> None:
    assert "Did you mean 'doctor'?" in shell.run("docter", code=2).stderr


def test_the_demo_reports_steps_tree_and_where_to_look(demo: tuple[Shell, Any]) -> None:
    _, done = demo
    assert "review[2]" in done.stdout
    assert "continued" in done.stdout
    assert "forked" in done.stdout
    assert "plan review_team: succeeded" in done.stdout
    assert "verdict: Not ready" in done.stdout
    assert "review[0] started: worker sonnet" in done.stderr, "a pipe gets one line per change, on stderr"
    assert "…" not in done.stdout, "nothing is cut in a pipe"


def test_json_is_one_event_per_line_and_the_outcome_last(shell: Shell) -> None:
    plan = shell.scenario(PLAN.format(agent="helper"), HELLO)
    lines = shell.run("run", str(plan), "--offline", "--json").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    assert {"run.created", "run.started", "run.ended", "plan.step"} <= {event["event"] for event in events}
    assert events[-1]["event"] == "outcome"
    assert events[-1]["status"] == "succeeded"


def test_trace_show_draws_the_tree(demo: tuple[Shell, Any]) -> None:
    shell, done = demo
    shown = shell.run("trace", "show", _run_id(done), "--tools").stdout
    assert "✓ succeeded review_team" in shown
    assert shown.count("✓ succeeded worker") == 3
    assert "Write findings/security.md" in shown or "Write" in shown
    runs = shell.json("trace", "show", _run_id(done)[:8])
    assert len(runs) == 8


def test_trace_export_is_what_jaeger_reads(demo: tuple[Shell, Any]) -> None:
    shell, done = demo
    shell.run("trace", "export", _run_id(done), "--jaeger", "trace.json")
    [trace] = json.loads((shell.project / "trace.json").read_text())["data"]
    ids = {span["spanID"] for span in trace["spans"]}
    names = [span["operationName"] for span in trace["spans"]]
    assert names.count("invoke_workflow review_team") == 1
    assert names.count("invoke_agent worker") == 3
    assert "execute_tool Write" in names
    roots = [span for span in trace["spans"] if not span["references"]]
    assert [span["operationName"] for span in roots] == ["invoke_workflow review_team"]
    assert all(ref["spanID"] in ids for span in trace["spans"] for ref in span["references"])
    assert all(span["duration"] >= 0 and span["startTime"] > 1_700_000_000_000_000 for span in trace["spans"])


def test_runs_list_show_wait(demo: tuple[Shell, Any]) -> None:
    shell, done = demo
    run_id = _run_id(done)
    listed = shell.json("runs", "list")
    assert len(listed) == 8
    assert shell.json("runs", "list", "--agent", "worker", "--limit", "2")[0]["name"] == "worker"
    assert shell.json("runs", "show", run_id)["status"] == "succeeded"
    assert shell.json("runs", "wait", run_id)["status"] == "succeeded"
    assert "review_team" in shell.run("runs", "list").stdout
    assert "plan review_team" in shell.run("runs", "show", run_id).stdout
    assert "no run 'feedbeef'" in shell.run("runs", "show", "feedbeef", code=2).stderr


def test_agents_list_show_prefer(shell: Shell) -> None:
    assert [agent["id"] for agent in shell.json("agents", "list")] == ["helper", "worker"]
    shell.run("agents", "prefer", "helper", "opus")
    helper = shell.json("agents", "list")[0]
    assert (helper["model"], helper["model_origin"]) == ("opus", "preference")
    assert "opus (preference)" in shell.run("agents", "show", "helper").stdout
    shell.run("agents", "prefer", "helper", "--clear")
    assert shell.json("agents", "list")[0]["model_origin"] != "preference"
    assert shell.json("agents", "show", "worker")["permission_mode"] == "acceptEdits"
    assert "helper" in shell.run("agents", "show", "helpr", code=2).stderr, "a near name is offered"


def test_agents_validate_reports_each_file(shell: Shell) -> None:
    (shell.project / "agents" / "broken.md").write_text("no frontmatter at all")
    (shell.project / "agents" / "odd.md").write_text(
        "---\nname: odd\ndescription: Use it: when\ncolour: red\n---\nx\n"
    )
    reports = {Path(r["path"]).name: r["status"] for r in shell.json("agents", "validate", "agents", code=1)}
    assert reports == {"helper.md": "loaded", "worker.md": "loaded", "broken.md": "refused", "odd.md": "warnings"}
    text = shell.run("agents", "validate", "agents", code=1).stdout
    assert "2 loaded, 1 loaded with warnings, 1 refused" in text


def test_config_show_origin(shell: Shell) -> None:
    shell.env["ORCHESTRATOR_LIMITS__MAX_DEPTH"] = "7"
    shown = shell.json("--set", "limits.max_processes=2", "config", "show")
    assert shown["limits.max_depth"] == {"value": 7, "origin": "environment"}
    assert shown["limits.max_processes"] == {"value": 2, "origin": "command line"}
    assert shown["limits.timeout_s"]["origin"].endswith("orchestrator.yaml")
    assert shown["limits.idle_timeout_s"]["origin"] == "default"
    assert "limits.max_depth" in shell.run("config", "show", "--origin").stdout
    shell.env["ORCHESTRATOR_LIMITS__MAX_DEPHT"] = "7"
    assert "did you mean 'limits.max_depth'" in shell.run("config", "show", code=2).stderr


def test_logs_are_as_the_settings_say(shell: Shell) -> None:
    plan = shell.scenario(PLAN.format(agent="helper"), HELLO)
    done = shell.run(
        "--set", "log.level=INFO", "--set", "log.format=json", "run", str(plan), "--offline", "--quiet"
    )
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    ended = [line for line in lines if "succeeded" in line["message"]]
    assert {line["level"] for line in ended} == {"INFO"}
    assert all(len(line["run_id"]) == 16 for line in ended)
    assert "say something" not in done.stderr, "no prompt at this level"


def test_secrets_in_settings_are_masked(shell: Shell) -> None:
    with (shell.project / "orchestrator.yaml").open("a") as file:
        file.write("")
    shell.env["ORCHESTRATOR_CLAUDE__ENV"] = "{ANTHROPIC_API_KEY: sk-ant-secret-value}"
    assert "sk-ant-secret" not in shell.run("config", "show", "--json").stdout


def test_doctor_says_what_to_do(shell: Shell) -> None:
    checks = {check["name"]: check for check in shell.json("doctor", code=1)}
    assert checks["Claude Code CLI"]["level"] == "ok"
    assert "Claude Code" in checks["Claude Code CLI"]["found"]
    assert checks["login"]["level"] == "problem"
    assert "auth login" in checks["login"]["advice"]
    assert checks["agents"]["found"] == "2: helper, worker"
    shell.env["ORCHESTRATOR_CLAUDE__ENV"] = "{ANTHROPIC_API_KEY: sk-ant-test-loopback}"
    assert "✓ login: api_key" in shell.run("doctor").stdout


def test_doctor_names_a_missing_cli(shell: Shell) -> None:
    done = shell.run("--set", "claude.path=/nowhere/claude", "doctor", code=1)
    assert "/nowhere/claude" in done.stdout
    assert "orchestrator-mcp[claude]" in done.stdout


def test_delegate_prints_the_answer_alone_on_stdout(shell: Shell) -> None:
    (shell.project / "s.yaml").write_text(HELLO)
    done = shell.run("delegate", "helper", "hi", "--scenario", "s.yaml")
    assert done.stdout == "hello\n"
    assert "succeeded" in done.stderr
    assert shell.json("delegate", "helper", "hi", "--scenario", "s.yaml")["text"] == "hello"


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("version: 1\nname: x\nsteps:\n  - id: a\n    agnet: helper\n    prompt: p\n", "plan.yaml:5"),
        (PLAN.format(agent="helpr"), "helper"),
        ("version: 1\nname: x\nsteps: [", "plan.yaml"),
    ],
)
def test_a_bad_plan_is_refused_with_file_and_line(shell: Shell, plan: str, said: str) -> None:
    path = shell.scenario(plan, HELLO)
    done = shell.run("run", str(path), "--offline", code=2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_inputs_are_checked(shell: Shell) -> None:
    plan = shell.scenario(PLAN.format(agent="helper") + "inputs:\n  n: {type: integer}\n", HELLO)
    assert "is required" in shell.run("run", str(plan), "--offline", code=2).stderr
    assert "integer" in shell.run("run", str(plan), "--offline", "-i", "n=many", code=2).stderr
    shell.run("run", str(plan), "--offline", "-i", "n=3")


def test_offline_without_a_scenario_says_so(shell: Shell) -> None:
    plan = shell.scenario(PLAN.format(agent="helper"), HELLO)
    plan.with_suffix(".scenario.yaml").unlink()
    done = shell.run("run", str(plan), "--offline", code=2)
    assert "no scenario at" in done.stderr


def test_a_failed_plan_exits_with_1_and_says_why(shell: Shell) -> None:
    plan = shell.scenario(
        PLAN.format(agent="helper"), "version: 1\nrules: [{fault: {status: 403, message: not for you}}]\n"
    )
    done = shell.run("run", str(plan), "--offline", code=1)
    assert "not for you" in done.stdout
    assert "✗ failed" in done.stdout


def test_steps_that_never_ran_are_shown(shell: Shell) -> None:
    two = PLAN.format(agent="helper") + "  - {id: two, agent: helper, prompt: more, depends_on: [one]}\n"
    plan = shell.scenario(two, "version: 1\nrules: [{fault: {status: 403, message: no}}]\n")
    done = shell.run("run", str(plan), "--offline", code=1)
    assert "two   – skipped" in done.stdout
    [run] = [run for run in shell.json("runs", "list") if run["kind"] == "plan"]
    assert run["options"]["steps"] == {"one": "failed", "two": "skipped"}


@pytest.mark.parametrize("option", [("--budget-usd", "-1"), ("--timeout-s", "0"), ("--schema", ".")])
def test_wrong_options_are_wrong_use(shell: Shell, option: tuple[str, str]) -> None:
    done = shell.run("delegate", "helper", "hi", *option, code=2)
    assert "Traceback" not in done.stderr


def test_a_plans_figures_are_the_sums_of_its_runs(demo: tuple[Shell, Any]) -> None:
    shell, done = demo
    plan, *runs = shell.json("trace", "show", _run_id(done))
    for figure in ("input_tokens", "output_tokens", "cache_read_tokens", "num_turns"):
        assert plan[figure] == sum(run[figure] for run in runs) > 0


def test_a_second_ctrl_c_leaves_at_once_and_still_writes_the_end(shell: Shell) -> None:
    scenario = "version: 1\nrules: [{reply: {tool: Bash, input: {command: sleep 300, description: long}}}]\n"
    plan = shell.scenario(PLAN.format(agent="worker"), scenario)
    with shell.start("run", str(plan), "--offline", "--json") as process:
        _read_until(process, "sleep 300")
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 3, err
    assert "Traceback" not in err
    assert {run["status"] for run in shell.json("runs", "list")} == {"cancelled"}


def test_a_plan_over_budget_exits_with_4(shell: Shell) -> None:
    scenario = (
        "version: 1\nrules:\n"
        "  - reply: {tool: Read, input: {file_path: orchestrator.yaml}}\n"
        "    usage: {input: 100000, output: 1000}\n"
    )
    plan = shell.scenario(PLAN.format(agent="helper") + "limits: {budget_usd: 0.01}\n", scenario)
    done = shell.run("run", str(plan), "--offline", code=4)
    assert "budget" in done.stdout


def _alive_with_run_ids() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if RUN_ID_ENV in process.environ():
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_ctrl_c_cancels_the_plan_and_keeps_what_was_said(shell: Shell) -> None:
    scenario = (
        "version: 1\nrules:\n"
        "  - reply:\n"
        "      - text: working on it\n"
        "      - {tool: Bash, input: {command: sleep 300, description: long}}\n"
    )
    plan = shell.scenario(PLAN.format(agent="worker"), scenario)
    with shell.start("run", str(plan), "--offline", "--json") as process:
        _read_until(process, "sleep 300")
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        rest = process.stdout.read()
        assert process.wait(timeout=20) == 3
    outcome = json.loads(rest.splitlines()[-1])
    assert outcome["status"] == "cancelled"
    mine = [run for run in shell.json("runs", "list") if run["name"] == "worker"]
    assert mine[0]["status"] == "cancelled"
    assert mine[0]["text"] == "working on it"
    assert [p for p in _alive_with_run_ids() if p.environ().get(RUN_ID_ENV) == mine[0]["id"]] == []


def test_runs_cancel_reaches_a_run_of_another_process(shell: Shell) -> None:
    scenario = "version: 1\nrules: [{reply: {tool: Bash, input: {command: sleep 300, description: long}}}]\n"
    plan = shell.scenario(PLAN.format(agent="worker"), scenario)
    with shell.start("run", str(plan), "--offline", "--json") as process:
        first = json.loads(_read_until(process, "sleep 300")[0])
        assert "cancelled" in shell.run("runs", "cancel", first["run_id"]).stdout
        process.communicate(timeout=20)
        assert process.returncode == 3


@pytest.mark.parametrize(("silent_us", "status", "code"), [(180_000_000, "interrupted", 0), (0, "running", 1)])
def test_runs_cancel_ends_a_run_whose_host_is_gone(shell: Shell, silent_us: int, status: str, code: int) -> None:
    """As long as the other host is heard of, the request waits for it."""
    assert shell.json("runs", "list") == []  # makes the store
    [path] = (shell.project / ".data").glob("*.db")
    run_id, now = "a" * 16, time.time_ns() // 1000
    with sqlite3.connect(path) as store:
        store.execute(
            "INSERT INTO runs (id, trace_id, root_id, depth, kind, name, status, project, cwd, created_us,"
            " instance_id) VALUES (?, ?, ?, 1, 'agent', 'helper', 'running', '/srv', '/srv', 1, 'far')",
            (run_id, "b" * 32, run_id),
        )
        store.execute(
            f"INSERT INTO instances {INSTANCE_COLUMNS} VALUES ('far', 'serve', 'another-host', 1, 0, 1, ?, NULL)",
            (now - silent_us,),
        )
    store.close()
    assert shell.run("runs", "cancel", run_id, code=code).stdout == f"run {run_id} {status}\n"


def _read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} never came: {lines}")


def test_what_an_agent_starts_from_its_shell_is_its_own(shell: Shell) -> None:
    """An agent with a shell can run `orchestrator` too: below its run, no deeper, within its budget."""
    inner = f"{sys.executable} -m orchestrator --config {shell.project}/orchestrator.yaml"
    inner += f" delegate helper hi --scenario {shell.project}/inner.yaml 2>&1"
    (shell.project / "deeper.sh").write_text(f"{inner}\n")
    (shell.project / "inner.yaml").write_text(HELLO)
    write_agent(shell.project, "sheller", tools="Bash(sh *)", body="You have a shell.")
    scenario = (
        "version: 1\nrules:\n"
        "  - {when: {tool_result: true}, reply: 'it said {{ tool_results }}'}\n"
        "  - reply: {tool: Bash, input: {command: sh deeper.sh, description: deeper}}\n"
    )
    (shell.project / "outer.yaml").write_text(scenario)
    shell.env["ORCHESTRATOR_CLAUDE__PASS_ENV"] = "[PYTHONPATH]"
    shell.run("delegate", "sheller", "go", "--scenario", "outer.yaml")
    helper, sheller = shell.json("runs", "list")
    assert (helper["name"], helper["status"], helper["parent_id"]) == ("helper", "succeeded", sheller["id"])
    assert (helper["depth"], helper["trace_id"]) == (2, sheller["trace_id"])
    with (shell.project / "orchestrator.yaml").open("a") as file:
        file.write("  max_depth: 1\n")
    assert "limited to 1 levels" in shell.run("delegate", "sheller", "go", "--scenario", "outer.yaml").stdout


def test_every_listing_has_json(shell: Shell) -> None:
    for command in (["agents", "list"], ["runs", "list"], ["config", "show"], ["agents", "validate"], ["doctor"]):
        assert "--json" in shell.run(*command, "--help").stdout, command
