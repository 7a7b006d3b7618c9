"""The example plan end to end: the real CLI, the scripted model, the record, the files, and one trace."""

from collections import Counter
from pathlib import Path

import anyio
import pytest

from mcp_tools import open_door
from orchestrator.backends.claude_binary import version_of
from orchestrator.config import load_config
from orchestrator.offline import offline_model, offline_settings, scenario_beside
from orchestrator.outcome import Outcome
from orchestrator.plan_runs import run_plan
from orchestrator.plans import load_plan
from orchestrator.runtime import open_runtime
from orchestrator.store import Run
from orchestrator.testing import ModelServer
from tests.conftest import bundled_cli
from tests.otlp import OtlpReceiver, ReceivedSpan, otlp_receiver

ROOT = Path(__file__).parent.parent
PLAN = ROOT / "examples" / "review_team.yaml"

# List prices in USD per million tokens: input, output, cache read. Source: the CLI's own table, by experiment.
PRICES = {"claude-sonnet-5-5": (2.0, 10.0, 0.1), "claude-opus-5-5": (4.0, 20.0, 0.2)}


class Demo:
    """What one run of the example left behind."""

    outcome: Outcome
    runs: list[Run]
    model: ModelServer
    otlp: OtlpReceiver
    workspace: Path

    def run(self, step: str) -> Run:
        return next(run for run in self.runs if run.step == step)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return anyio.run(_run_demo, tmp_path_factory.mktemp("demo"))


async def _run_demo(tmp: Path) -> Demo:
    (tmp / "home").mkdir()
    found = Demo()
    overrides = {
        "data_dir": str(tmp / "data"),
        "agents.user_path": str(tmp / "none"),
        "claude.path": str(bundled_cli()),
    }
    async with otlp_receiver() as otlp, offline_model(scenario_beside(PLAN)) as model:
        config = load_config(project_dir=ROOT, environ={}, overrides=overrides)
        config = load_config(
            project_dir=ROOT, environ={}, overrides={**overrides, **offline_settings(config, model.base_url)}
        )
        environ = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(tmp / "home"),
            "OTEL_EXPORTER_OTLP_ENDPOINT": otlp.endpoint,
        }
        with anyio.fail_after(90):
            async with open_runtime(config, kind="run", open_door=open_door, environ=environ) as rt:
                found.outcome = await run_plan(rt, load_plan(PLAN), {})
                found.runs = await rt.store.tree(found.outcome.run_id)
        found.model, found.otlp, found.workspace = model, otlp, Path(found.runs[0].cwd)
        return found


def test_every_step_succeeds(demo: Demo) -> None:
    assert demo.outcome.ok, demo.outcome.error
    assert demo.model.unmatched == []
    assert Counter(run.step for run in demo.runs) == Counter(
        [None, "plan", "review[0]", "review[1]", "review[2]", "deepen", "challenge", "report"]
    )
    assert {run.status for run in demo.runs} == {"succeeded"}


def test_runs_form_one_tree_under_the_plan(demo: Demo) -> None:
    plan, *steps = demo.runs
    assert (plan.kind, plan.depth, plan.parent_id) == ("plan", 0, None)
    assert {step.parent_id for step in steps} == {plan.id}
    assert {run.root_id for run in demo.runs} == {plan.id}
    assert {run.trace_id for run in demo.runs} == {plan.trace_id}


def test_workers_used_their_tools_in_the_workspace(demo: Demo) -> None:
    findings = {path.name for path in (demo.workspace / "findings").iterdir()}
    assert findings == {"security.md", "correctness.md", "tests.md"}
    assert "SQL injection" in (demo.workspace / "REVIEW.md").read_text()
    used = Counter(result.tool_use_id for request in demo.model.journal for result in request.tool_results)
    assert used, "no tool result ever reached the model"
    errors = [r.text for request in demo.model.journal for r in request.tool_results if r.is_error]
    assert errors == []


def test_the_original_repository_is_untouched(demo: Demo) -> None:
    original = ROOT / "examples" / "tiny_repo"
    assert not (original / "findings").exists()
    assert not (original / ".git").exists()
    assert (demo.workspace / ".git").is_dir()


def test_workers_ran_in_parallel(demo: Demo) -> None:
    reviews = [run for run in demo.runs if run.step and run.step.startswith("review[")]
    assert max(run.started_us or 0 for run in reviews) < min(run.ended_us or 0 for run in reviews)


def test_cost_is_the_scripted_usage_at_list_prices(demo: Demo) -> None:
    for run in demo.runs[1:]:
        price_in, price_out, price_cache = PRICES[run.model_used or ""]
        expected = (
            run.input_tokens * price_in + run.output_tokens * price_out + run.cache_read_tokens * price_cache
        ) / 1e6
        assert run.cost_usd == pytest.approx(expected), run.step
        assert run.cost_basis == "cli"
    assert demo.runs[0].cost_usd == pytest.approx(sum(run.cost_usd or 0 for run in demo.runs[1:]))


def test_a_continued_session_has_its_history(demo: Demo) -> None:
    first, deepen = demo.run("review[0]"), demo.run("deepen")
    assert deepen.session_mode == "continue"
    assert deepen.session_id == first.session_id
    [request] = demo.model.requests(text="Take the most severe")
    assert any("Aspect: security" in text for text in request.texts)
    assert any("Findings are in findings/security.md." in text for text in request.texts)


def test_a_forked_session_has_the_history_and_an_id_of_its_own(demo: Demo) -> None:
    source, challenge = demo.run("review[1]"), demo.run("challenge")
    assert challenge.session_mode == "fork"
    assert challenge.source_session_id == source.session_id
    assert challenge.session_id != source.session_id
    [request] = demo.model.requests(text="Argue against")
    assert any("Findings are in findings/correctness.md." in text for text in request.texts)


def test_each_agent_speaks_with_its_own_system_prompt(demo: Demo) -> None:
    [request] = demo.model.requests(text="Take the most severe")
    assert "You decide what stands" in request.system
    assert "You review one aspect" not in request.system


def test_all_spans_are_one_trace_each_under_its_parent(demo: Demo) -> None:
    spans = demo.otlp.spans
    plan = demo.runs[0]
    assert {span.trace_id for span in spans} == {plan.trace_id}
    by_id = {span.span_id: span for span in spans}
    assert by_id[plan.id].name == "invoke_workflow review_team"
    assert by_id[plan.id].parent_span_id == ""
    for run in demo.runs[1:]:
        assert by_id[run.id].name == f"invoke_agent {run.name}"
        assert by_id[run.id].parent_span_id == plan.id
    orphans = [span.name for span in spans if span.parent_span_id and span.parent_span_id not in by_id]
    assert orphans == []


def test_the_clis_own_spans_hang_under_their_runs(demo: Demo) -> None:
    by_id = {span.span_id: span for span in demo.otlp.spans}
    for run in demo.runs[1:]:
        below = [span for span in demo.otlp.spans if _is_below(span, run.id, by_id)]
        names = {span.name for span in below}
        assert {"claude_code.interaction", "claude_code.llm_request"} <= names, run.step
        if run.step == "review[0]":
            assert {"claude_code.tool", "claude_code.tool.execution"} <= names
        assert {span.service for span in below} == {run.name}


def _is_below(span: ReceivedSpan, ancestor: str, by_id: dict[str, ReceivedSpan]) -> bool:
    while span.parent_span_id:
        if span.parent_span_id == ancestor:
            return True
        span = by_id[span.parent_span_id]
    return False


def test_the_cli_is_the_real_one() -> None:
    assert "Claude Code" in version_of(bundled_cli())
