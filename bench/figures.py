"""What a measurement is made of: samples, figures with their bounds, and the machine they were taken on. Pure."""

import platform
import sqlite3
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One measured value with the bound it should keep. ``note`` says what the value is made of."""

    what: str
    measured: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def bound(self) -> str:
        if self.at_most is not None:
            return f"≤ {self.at_most:g}{_space(self.unit)}"
        return "" if self.at_least is None else f"≥ {self.at_least:g}{_space(self.unit)}"

    @property
    def met(self) -> bool | None:
        """Whether the bound is kept; None where there is none."""
        if self.at_most is not None:
            return self.measured <= self.at_most
        return None if self.at_least is None else self.measured >= self.at_least

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bound": self.bound, "met": self.met}


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile, least, most and number of the samples, in their own unit."""
    ordered = sorted(samples)
    return {
        "n": len(ordered),
        "median": statistics.median(ordered),
        "p95": p95(ordered),
        "min": ordered[0],
        "max": ordered[-1],
    }


def median(samples: Sequence[float]) -> float:
    return statistics.median(samples)


def p95(samples: Sequence[float]) -> float:
    """The sample that 95 % are not above: of few samples, the greatest."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


def machine(cores: int, cli: str) -> dict[str, Any]:
    """What a figure depends on; nothing that names the machine."""
    return {
        "cores": cores,
        "cli": cli,
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "system": f"{platform.system()} {platform.machine()}",
    }


def table(figures: Sequence[dict[str, Any]]) -> str:
    """The figures as a table in Markdown."""
    head = "| what | must reach | measured | met | made of |\n|---|---|---|---|---|\n"
    return head + "".join(
        f"| {f['what']} | {f['bound'] or '–'} | {written(f['measured'])}{_space(f['unit'])} | {_met(f['met'])}"
        f" | {f['note']} |\n"
        for f in figures
    )


def written(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _space(unit: str) -> str:
    return f" {unit}" if unit else ""


def _met(met: bool | None) -> str:
    return {True: "yes", False: "**no**", None: "–"}[met]
