"""What types cannot say about a plan: that names are known, orders possible, references resolved. Pure.

Every rule is a generator of faults over one ``Draft``, so that all problems of a plan are told at once.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import combinations

from orchestrator.errors import PlanError
from orchestrator.plans.keys import Fault
from orchestrator.plans.model import JobRef, PlanFile, Step
from orchestrator.plans.names import RESERVED, is_step_id, is_variable, suggestion
from orchestrator.plans.template import Reference, Template, template
from orchestrator.yaml_lines import KeyPath

_PLAIN_RESULT = frozenset({"status", "text", "output", "error"})
_FOR_EACH_RESULT = frozenset({"status", "results", "outputs", "error"})


@dataclass(frozen=True)
class Draft:
    """A plan on its way to be one: the steps that could be read, by position, and every name that was given.

    A step that could not be read is in ``ids`` only, so that references to it are not called wrong as well.
    """

    head: PlanFile
    steps: Mapping[int, Step]
    ids: Mapping[str, int]
    input_names: frozenset[str]

    @cached_property
    def by_id(self) -> Mapping[str, Step]:
        return {step.id: step for position, step in self.steps.items() if self.ids[step.id] == position}

    @cached_property
    def needs(self) -> Mapping[str, frozenset[str]]:
        """Every step a step waits for, directly or through others."""
        return {step_id: self._above(step_id) for step_id in self.by_id}

    def _above(self, step_id: str) -> frozenset[str]:
        found: set[str] = set()
        waiting = [step_id]
        while waiting:
            step = self.by_id.get(waiting.pop())
            if step is None:  # what an unreadable step waits for is not known: assume the best
                return frozenset(self.ids)
            new = (set(step.depends_on) & self.ids.keys()) - found
            found |= new
            waiting.extend(new)
        return frozenset(found)


@dataclass(frozen=True)
class Scope:
    """What one template may use. ``steps`` None: any step. ``user`` names the template's place in messages."""

    user: str
    variables: frozenset[str] = frozenset()
    steps: frozenset[str] | None = None
    step_id: str | None = None


def check(draft: Draft) -> list[Fault]:
    """Every fault of the draft, in no particular order."""
    return [fault for rule in _RULES for fault in rule(draft)]


def _inputs(draft: Draft) -> Iterator[Fault]:
    for name, spec in draft.head.inputs.items():
        if not is_variable(name):
            yield Fault(("inputs", name), f"input name '{name}' must be letters, digits and underscores")
        for key, text in spec.faults().items():
            yield Fault(("inputs", name, key), f"input '{name}': {text}")


def _ids(draft: Draft) -> Iterator[Fault]:
    for position, step in draft.steps.items():
        if not is_step_id(step.id):
            allowed = "letters, digits, _ and -, and must not begin with a digit or -"
            yield Fault(("steps", position, "id"), f"step id '{step.id}' may hold {allowed}")
        variable = step.for_each.variable if step.for_each else None
        if variable is not None and (not is_variable(variable) or variable in RESERVED):
            text = f"step '{step.id}': '{variable}' cannot be the name of an item: choose another for `as`"
            yield Fault(("steps", position, "for_each", "as"), text)


def _dependencies(draft: Draft) -> Iterator[Fault]:
    for position, step in draft.steps.items():
        for at, needed in enumerate(step.depends_on):
            if needed not in draft.ids:
                hint = suggestion(needed, draft.ids.keys() - {step.id})
                text = f"step '{step.id}' depends on unknown step '{needed}'{hint}"
                yield Fault(("steps", position, "depends_on", at), text)


def _cycles(draft: Draft) -> Iterator[Fault]:
    edges = {step_id: set(step.depends_on) & draft.by_id.keys() for step_id, step in draft.by_id.items()}
    while cycle := _cycle(edges):
        # graphlib lists each step before the one that waits for it; the arrow reads "depends on".
        path = cycle[::-1]
        text = f"steps depend on each other in a circle: {' -> '.join(path)}; remove one of the dependencies"
        yield Fault(("steps", draft.ids[path[0]], "depends_on"), text)
        edges[path[0]].discard(path[1])


def _cycle(edges: Mapping[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def _prompts(draft: Draft) -> Iterator[Fault]:
    for position, step in draft.steps.items():
        if step.prompt is None:
            yield Fault(("steps", position), f"step '{step.id}' needs a prompt or a prompt_file")


def _sessions(draft: Draft) -> Iterator[Fault]:
    for position, step in draft.steps.items():
        if step.session.mode != "fresh" and (text := _session_fault(draft, step)):
            yield Fault(("steps", position, "session"), f"step '{step.id}': {text}")


def _session_fault(draft: Draft, step: Step) -> str | None:
    mode, source = step.session.mode, step.session.source
    if source is None:
        return f"session: {mode} names a step, or one run of a for_each step as review[0]"
    if source.step_id not in draft.ids:
        hint = suggestion(source.step_id, draft.ids.keys() - {step.id})
        return f"session: there is no step '{source.step_id}'{hint}"
    if source.step_id not in draft.needs.get(step.id, ()):
        return f"session uses step '{source.step_id}' but the step does not depend on it: {_add(source.step_id)}"
    if mode == "continue" and step.for_each:
        return "the items of a for_each step cannot all continue one session: use fork"
    return _index_fault(draft.by_id.get(source.step_id), source)


def _index_fault(target: Step | None, source: JobRef) -> str | None:
    if target is None:
        return None
    if target.for_each and source.index is None:
        return f"session: '{source}' is a for_each step: name one of its runs, as {source}[0]"
    if not target.for_each and source.index is not None:
        return f"session: '{source.step_id}' is not a for_each step: write {source.step_id} without an index"
    return None


def _shared_sessions(draft: Draft) -> Iterator[Fault]:
    """Two runs continuing one session at once would split its history between them unseen."""
    users: dict[JobRef, list[str]] = defaultdict(list)
    for step_id in draft.by_id:
        if (root := _continued(draft, step_id)) is not None:
            users[root].append(step_id)
    for root, step_ids in users.items():
        for first, second in combinations(step_ids, 2):
            if first not in draft.needs[second] and second not in draft.needs[first]:
                text = f"steps '{first}' and '{second}' both continue the session of '{root}' and could run "
                advice = "at the same time: make one depend on the other, or fork"
                yield Fault(("steps", draft.ids[second], "session"), text + advice)


def _continued(draft: Draft, step_id: str) -> JobRef | None:
    """The run that began the session which ``step_id`` continues, through steps that continued it before."""
    root, seen = None, set[str]()
    step = draft.by_id.get(step_id)
    while step and step.session.mode == "continue" and step.id not in seen:
        seen.add(step.id)
        root = step.session.source
        step = draft.by_id.get(root.step_id) if root else None
    return root


def _templates(draft: Draft) -> Iterator[Fault]:
    for name, text in draft.head.outputs.items():
        yield from _template(draft, ("outputs", name), text, Scope(f"output '{name}'"))
    if draft.head.workspace is not None:
        scope = Scope("workspace.copy", steps=frozenset())
        yield from _template(draft, ("workspace", "copy"), draft.head.workspace.copy_, scope)
    for key in ("model", "cwd"):
        scope = Scope(f"defaults.{key}", steps=frozenset())
        yield from _template(draft, ("defaults", key), getattr(draft.head.defaults, key) or "", scope)
    for position, step in draft.steps.items():
        yield from _step_templates(draft, ("steps", position), step)


def _step_templates(draft: Draft, path: KeyPath, step: Step) -> Iterator[Fault]:
    outer = Scope(f"step '{step.id}'", steps=draft.needs.get(step.id, frozenset()), step_id=step.id)
    inner = outer
    if step.for_each:
        variables = frozenset({step.for_each.variable, "index"})
        inner = Scope(outer.user, variables, outer.steps, outer.step_id)
        yield from _items(draft, (*path, "for_each", "in"), step.for_each.items, outer)
    yield from _template(draft, (*path, "prompt"), step.prompt or "", inner, step.prompt_file)
    for key in ("model", "cwd"):
        yield from _template(draft, (*path, key), getattr(step, key) or "", inner)


def _items(draft: Draft, path: KeyPath, items: object, scope: Scope) -> Iterator[Fault]:
    if not isinstance(items, str):
        if "{{" in repr(items):
            yield Fault(path, f"{scope.user}: a written list is data: for templates, make it one {{{{ [ … ] }}}}")
        return
    faults = list(_template(draft, path, items, scope))
    yield from faults
    if not faults and not template(items).is_expression:
        yield Fault(path, f"{scope.user}: for_each.in must be a list, or one {{{{ expression }}}} and nothing else")


def _template(draft: Draft, path: KeyPath, text: str, scope: Scope, file: str | None = None) -> Iterator[Fault]:
    try:
        found = template(text)
    except PlanError as error:
        yield Fault(path, f"{scope.user}: {error.message}", error.details["line"], file)
        return
    for line, complaint in _complaints(draft, found, scope):
        yield Fault(path, complaint, line, file)


def _complaints(draft: Draft, found: Template, scope: Scope) -> Iterator[tuple[int, str]]:
    known = scope.variables | {"inputs", "steps", "run"}
    for name, line in found.unbound.items():
        if name not in known:
            yield line, f"{scope.user} uses unknown name '{name}'{suggestion(name, known)}"
    for reference in found.references:
        is_input = reference.root == "inputs"
        text = _input_fault(draft, reference) if is_input else _step_fault(draft, reference, scope)
        if text:
            yield reference.line, f"{scope.user} {text}"


def _input_fault(draft: Draft, reference: Reference) -> str | None:
    name = reference.name
    if name is None or name in draft.input_names:
        return None
    return f"uses inputs.{name}, but there is no such input{suggestion(name, draft.input_names)}"


def _step_fault(draft: Draft, reference: Reference, scope: Scope) -> str | None:
    name = reference.name
    if name is None:
        return "uses `steps` as a whole: name the step, as steps.ID"
    if name not in draft.ids:
        return f"uses steps.{name}, but there is no such step{_step_suggestion(draft, name, scope.step_id)}"
    if name == scope.step_id:
        return f"uses steps.{name}, its own result"
    if scope.steps is not None and name not in scope.steps:
        return f"uses steps.{name}{_not_needed(name, scope)}"
    return _result_fault(draft.by_id.get(name), reference)


def _not_needed(name: str, scope: Scope) -> str:
    if scope.step_id is None:
        return ", but here only inputs and run are known"
    return f" but does not depend on it: {_add(name)}"


def _step_suggestion(draft: Draft, name: str, own: str | None) -> str:
    for step_id in draft.ids:
        if step_id.startswith(f"{name}-"):  # `steps.my-step` reads as a subtraction
            return f"; a name with a hyphen is written steps['{step_id}']"
    return suggestion(name, draft.ids.keys() - {own})


def _result_fault(target: Step | None, reference: Reference) -> str | None:
    name, attribute = reference.name, reference.attribute
    if target is None or attribute is None:
        return None
    if target.for_each:
        if attribute in _FOR_EACH_RESULT:
            return None
        hint = suggestion(attribute, _FOR_EACH_RESULT)
        return f"uses steps.{name}.{attribute}, but '{name}' is a for_each step{hint}"
    if attribute not in _PLAIN_RESULT:
        hint = suggestion(attribute, _PLAIN_RESULT)
        return f"uses steps.{name}.{attribute}, which a step does not have{hint}"
    if attribute == "output" and target.output_schema is None:
        return f"uses steps.{name}.output, but '{name}' has no output_schema: add one, or use steps.{name}.text"
    return None


def _add(step_id: str) -> str:
    return f"add depends_on: [{step_id}]"


_RULES: tuple[Callable[[Draft], Iterator[Fault]], ...] = (
    _inputs,
    _ids,
    _dependencies,
    _cycles,
    _prompts,
    _sessions,
    _shared_sessions,
    _templates,
)
