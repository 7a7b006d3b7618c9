"""What a plan says, as types: the keys a plan file may have, and the Plan that loading one gives."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from orchestrator.plans.inputs import InputSpec, bind_inputs

SessionMode = Literal["fresh", "continue", "fork"]

Word = Annotated[str, Field(pattern=r"^[^\s{}]+$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

_JOB = re.compile(r"(?P<step>[a-zA-Z_][a-zA-Z0-9_-]*)(?:\[(?P<index>\d{1,9})\])?")


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Options(_Keys):
    """How a step runs. Under ``defaults`` they hold for every step that does not say otherwise.

    ``timeout`` (wall time) and ``idle_timeout`` (time without a message) are seconds. ``model`` and ``cwd`` are
    templates. None leaves the matter to the agent's file and the configuration.
    """

    model: str | None = None
    cwd: str | None = None
    timeout: Positive | None = None
    idle_timeout: Positive | None = None
    budget_usd: Positive | None = None
    max_turns: Count | None = None
    effort: Word | None = None
    permission_mode: Word | None = None


class Limits(_Keys):
    """Bounds of the whole plan: US dollars, jobs running at once, seconds of wall time."""

    budget_usd: Positive | None = None
    max_parallel: Count | None = None
    timeout: Positive | None = None


class ForEach(_Keys):
    """One run of the step per item of ``in``: a list, or one ``{{ expression }}`` that gives a list."""

    items: Any = Field(alias="in")
    variable: str = Field(default="item", alias="as")
    max_parallel: Count | None = None

    @field_validator("items")
    @classmethod
    def _list_or_template(cls, value: Any) -> Any:
        if not isinstance(value, str | list):
            raise ValueError("must be a list, or one {{ expression }} that gives a list")  # noqa: TRY004  pydantic's
        return value


@dataclass(frozen=True, slots=True)
class JobRef:
    """A run inside the plan, as ``session`` names it: ``plan``, or ``review[0]`` in a for_each step."""

    step_id: str
    index: int | None = None

    def __str__(self) -> str:
        return job_id(self.step_id, self.index)

    @classmethod
    def parse(cls, text: str) -> "JobRef | None":
        """The reference ``text`` writes, or None if it is not one."""
        found = _JOB.fullmatch(text)
        if found is None:
            return None
        index = found["index"]
        return cls(found["step"], None if index is None else int(index))


class Session(_Keys):
    """Whose conversation the step goes on with; neither key means a fresh one."""

    continue_: Word | None = Field(default=None, alias="continue")
    fork: Word | None = None

    @model_validator(mode="before")
    @classmethod
    def _fresh(cls, value: Any) -> Any:
        if value == "fresh":
            return {}
        if not isinstance(value, dict) or len(value) != 1:
            raise ValueError("must be fresh, {continue: STEP} or {fork: STEP}")
        return value

    @property
    def mode(self) -> SessionMode:
        if self.continue_ is not None:
            return "continue"
        return "fresh" if self.fork is None else "fork"

    @property
    def source(self) -> JobRef | None:
        """The run whose session is used; None for a fresh one."""
        return JobRef.parse(self.continue_ or self.fork or "")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Step(Options):
    """One step. ``output_schema`` is a JSON Schema, or the path of a file that holds one.

    In a loaded Plan the defaults are filled in, and ``prompt`` and ``output_schema`` hold what was read from
    the files named for them.
    """

    id: str
    agent: Word
    prompt: str | None = None
    prompt_file: str | None = None
    depends_on: Annotated[list[str], BeforeValidator(_listed)] = []
    for_each: ForEach | None = None
    output_schema: Any = None
    session: Session = Session.model_validate("fresh")


class Workspace(_Keys):
    """Where the steps work instead of the directory the plan is started for.

    ``copy`` is a template over the inputs: a directory that is copied anew for each run of the plan, so that
    agents cannot change the original. Relative paths start from the plan file.
    """

    copy_: Annotated[str, Field(min_length=1, alias="copy")]


class PlanFile(_Keys):
    """The keys at the top of a plan file, the steps apart: each is read by itself, to report all problems."""

    version: Literal[1]
    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    inputs: dict[str, InputSpec] = {}
    defaults: Options = Options()
    limits: Limits = Limits()
    workspace: Workspace | None = None
    steps: list[Any]
    outputs: dict[str, str] = {}


@dataclass(frozen=True)
class Plan:
    """A plan that was loaded and found to be without problems.

    ``source`` is the file's text and ``included`` the text of every file it names, by the path it is named
    with; ``digest`` is the SHA-256 of both, so that a changed plan is told from the one that began to run.
    """

    name: str
    description: str
    inputs: Mapping[str, InputSpec]
    limits: Limits
    steps: tuple[Step, ...]
    outputs: Mapping[str, str]
    path: Path
    source: str = field(repr=False)
    workspace: Workspace | None = None
    included: Mapping[str, str] = field(default_factory=dict, repr=False)

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 over the plan file and the files it includes."""
        parts = [self.source, *(part for item in sorted(self.included.items()) for part in item)]
        lengths_and_parts = "".join(f"{len(part)}:{part}" for part in parts)
        return hashlib.sha256(lengths_and_parts.encode()).hexdigest()

    def bind(self, values: Mapping[str, Any], *, base: Path | None = None) -> dict[str, Any]:
        """The inputs of one run, as ``bind_inputs`` describes; paths given are joined to ``base``."""
        return bind_inputs(self.inputs, values, base=base, default_base=self.path.parent.absolute())

    def layers(self) -> list[list[str]]:
        """Step ids by the earliest round they can run in: each layer only depends on the ones before it."""
        return layers({step.id: step.depends_on for step in self.steps})


def job_id(step_id: str, index: int | None) -> str:
    """``review`` for the one job of a step, ``review[3]`` for the fourth item of a for_each step."""
    return step_id if index is None else f"{step_id}[{index}]"


def layers(needs: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Names by depth, in the order given; ``needs`` must be without cycles and name only its own keys."""
    found: list[list[str]] = []
    done: set[str] = set()
    while len(done) < len(needs):
        layer = [name for name in needs if name not in done and done.issuperset(needs[name])]
        found.append(layer)
        done.update(layer)
    return found
