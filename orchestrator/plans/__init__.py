"""Plans: YAML coordinates, code computes, agents judge. The language is described in docs/plans.md."""

from orchestrator.plans.engine import RunStep, drive
from orchestrator.plans.inputs import InputSpec
from orchestrator.plans.jobs import StepChange, StepJob, StepStatus
from orchestrator.plans.model import Plan, Step
from orchestrator.plans.spec import load_plan, parse_plan, plan_problems
from orchestrator.plans.state import PlanState

__all__ = [
    "InputSpec",
    "Plan",
    "PlanState",
    "RunStep",
    "Step",
    "StepChange",
    "StepJob",
    "StepStatus",
    "drive",
    "load_plan",
    "parse_plan",
    "plan_problems",
]
