"""YAML to Plan. A plan loads without any problem, or not at all: every problem is told, by file and line."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, SchemaError

from orchestrator.errors import PlanError
from orchestrator.plans.check import Draft, check
from orchestrator.plans.keys import Fault, validated
from orchestrator.plans.model import Options, Plan, PlanFile, Step
from orchestrator.plans.names import suggestion
from orchestrator.yaml_lines import KeyPath, YamlLines, parse_yaml

#: Keys other steps and checks build on: a step in which one is wrong is not checked further.
_STRUCTURE = frozenset({"id", "depends_on", "for_each", "session"})


def load_plan(path: Path, known_agents: Collection[str] | None = None) -> Plan:
    """Read a plan file. Raises PlanError with every problem in ``details["problems"]``."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        problem = f"{path}:1: cannot read the plan: {_reason(error)}"
        raise PlanError(problem, details={"problems": [problem]}, advice="Give the path of a plan.") from error
    return parse_plan(text, path, known_agents=known_agents)


def parse_plan(text: str, path: Path, *, known_agents: Collection[str] | None = None) -> Plan:
    """The plan that ``text`` says; files it names are read relative to ``path``'s directory.

    With ``known_agents``, an agent of another name is a problem. Raises PlanError as ``load_plan``.
    """
    reader = _Reader(parse_yaml(text), path, known_agents)
    plan = reader.plan(text)
    problems = reader.problems()
    if problems or plan is None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        listed = "\n".join(problems)
        raise PlanError(f"the plan has {count}:\n{listed}", details={"problems": problems})
    return plan


def plan_problems(text: str, path: Path, *, known_agents: Collection[str] | None = None) -> list[str]:
    """Every problem of a plan as ``file:line: text``, by line; empty if it would load."""
    try:
        parse_plan(text, path, known_agents=known_agents)
    except PlanError as error:
        return list(error.details["problems"])
    return []


@dataclass
class _Reader:
    document: YamlLines
    path: Path
    known_agents: Collection[str] | None
    faults: list[Fault] = field(default_factory=list)
    included: dict[str, str] = field(default_factory=dict)

    def plan(self, text: str) -> Plan | None:
        """The plan, or None where not even its outline can be read; faults are collected either way."""
        data = self.document.data
        if not isinstance(data, dict):
            if not self.document.problems:
                self.faults.append(Fault((), "a plan is a mapping with the keys version, name and steps"))
            return None
        head, faults = validated(PlanFile, data, {"version": 1, "name": "?", "steps": []})
        self.faults += faults
        if head is None:
            return None
        draft = self._draft(head, data)
        self.faults += check(draft)
        return _plan(draft, self.path, text, self.included)

    def problems(self) -> list[str]:
        """Every problem as text, ordered by file (the plan's own first) and line."""
        found = {(str(self.path), line, text) for line, text in self.document.problems}
        found |= {self._located(fault) for fault in self.faults}
        ordered = sorted(found, key=lambda each: (each[0] != str(self.path), each))
        return [f"{file}:{line}: {text}" for file, line, text in ordered]

    def _located(self, fault: Fault) -> tuple[str, int, str]:
        if fault.file is not None:
            return str(self.path.parent / fault.file), fault.text_line or 1, fault.text
        if fault.text_line is not None:
            return str(self.path), self.document.text_line(fault.path, fault.text_line), fault.text
        return str(self.path), self.document.line(fault.path), fault.text

    def _draft(self, head: PlanFile, data: Mapping[str, Any]) -> Draft:
        if data.get("steps") == []:
            self.faults.append(Fault(("steps",), "a plan needs at least one step"))
        ids: dict[str, int] = {}
        steps: dict[int, Step] = {}
        for position, raw in enumerate(head.steps):
            step = self._step(("steps", position), raw)
            step_id = raw.get("id") if isinstance(raw, dict) else None
            if isinstance(step_id, str) and ids.setdefault(step_id, position) != position:
                line = self.document.line(("steps", ids[step_id], "id"))
                text = f"step id '{step_id}' is already used on line {line}"
                self.faults.append(Fault(("steps", position, "id"), text))
            elif step is not None:
                steps[position] = step
        inputs = data.get("inputs")
        return Draft(head, steps, ids, frozenset(inputs if isinstance(inputs, dict) else ()))

    def _step(self, path: KeyPath, raw: Any) -> Step | None:
        """The step with its files read, if it is sound enough for its references to be checked."""
        if not isinstance(raw, dict):
            self.faults.append(Fault(path, "a step is a mapping with the keys id, agent and prompt"))
            return None
        user = f"step '{raw['id']}'" if isinstance(raw.get("id"), str) else "the step without an id"
        step, faults = validated(Step, raw, {"agent": "?"})
        self.faults += [Fault((*path, *fault.path), f"{user}: {fault.text}") for fault in faults]
        self.faults += self._agent_faults(path, user, raw.get("agent"))
        if step is None or any(fault.path and fault.path[0] in _STRUCTURE for fault in faults):
            return None
        prompt = self._prompt(path, user, step)
        if prompt is None and any(fault.path[:1] in [("prompt",), ("prompt_file",)] for fault in faults):
            prompt = ""
        return step.model_copy(update={"prompt": prompt, "output_schema": self._schema(path, user, step)})

    def _agent_faults(self, path: KeyPath, user: str, agent: Any) -> Iterator[Fault]:
        if self.known_agents is not None and isinstance(agent, str) and agent not in self.known_agents:
            hint = suggestion(agent, self.known_agents)
            yield Fault((*path, "agent"), f"{user}: unknown agent '{agent}'{hint}")

    def _prompt(self, path: KeyPath, user: str, step: Step) -> str | None:
        if step.prompt_file is None:
            return step.prompt
        if step.prompt is not None:
            fault = f"{user}: prompt and prompt_file exclude each other"
            self.faults.append(Fault((*path, "prompt_file"), fault))
            return step.prompt
        text = self._include((*path, "prompt_file"), user, step.prompt_file)
        return "" if text is None else text

    def _include(self, path: KeyPath, user: str, name: str) -> str | None:
        """The text of a file named in the plan, or None and a fault."""
        try:
            self.included[name] = (self.path.parent / name).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            self.faults.append(Fault(path, f"{user}: cannot read '{name}': {_reason(error)}"))
            return None
        return self.included[name]

    def _schema(self, path: KeyPath, user: str, step: Step) -> Any:
        """The step's schema, read from its file if it names one; every fault is noted on the way."""
        path = (*path, "output_schema")
        if not isinstance(step.output_schema, str):
            self.faults += _schema_faults(path, user, step.output_schema)
            return step.output_schema
        name = step.output_schema
        text = self._include(path, user, name)
        if text is None:
            return {}
        document = _json(text) if name.endswith(".json") else parse_yaml(text)
        self.faults += [Fault(path, problem, line, name) for line, problem in document.problems]
        if not document.problems:
            for fault in _schema_faults((), user, document.data if document.data is not None else []):
                self.faults.append(Fault(path, fault.text, document.line(fault.path), name))
        return document.data or {}


def _json(text: str) -> YamlLines:
    try:
        return YamlLines(json.loads(text), (), {}, {})
    except json.JSONDecodeError as error:
        return YamlLines(None, ((error.lineno, f"not JSON: {error.msg}"),), {}, {})


def _schema_faults(path: KeyPath, user: str, schema: Any) -> Iterator[Fault]:
    if schema is None:
        return
    if not isinstance(schema, dict):
        yield Fault(path, f"{user}: output_schema must be a JSON Schema (a mapping) or the path of a file with one")
        return
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        at = ".".join(map(str, error.absolute_path))
        text = f"{user}: output_schema is not a valid JSON Schema{f' at {at}' if at else ''}: {error.message[:200]}"
        yield Fault((*path, *error.absolute_path), text)


def _plan(draft: Draft, path: Path, source: str, included: Mapping[str, str]) -> Plan:
    head = draft.head
    return Plan(
        name=head.name,
        description=head.description,
        inputs=head.inputs,
        limits=head.limits,
        steps=tuple(_with_defaults(step, head.defaults) for step in draft.steps.values()),
        outputs=head.outputs,
        path=path,
        source=source,
        workspace=head.workspace,
        included=included,
    )


def _with_defaults(step: Step, defaults: Options) -> Step:
    """The step with the defaults it does not set itself; ``timeout: null`` in a step sets it to none."""
    missing = defaults.model_fields_set - step.model_fields_set
    return step.model_copy(update={name: getattr(defaults, name) for name in missing})


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
