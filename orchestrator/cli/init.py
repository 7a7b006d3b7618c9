"""``orchestrator init``: the files a project begins with. Nothing that is there is changed without a yes."""

import difflib
import os
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.common import as_json, print_json
from orchestrator.config import CONFIG_FILE
from orchestrator.errors import ConfigError
from orchestrator.mcp_json import servers_in, with_server
from orchestrator.registration import SERVER_NAME, stdio_server

MCP_FILE = ".mcp.json"


@dataclass(frozen=True, slots=True)
class Change:
    """What is to become of one file: its text now (None: there is no file) and then.

    ``keeps`` says that the new text has all of the old one, so that no copy of it is needed.
    """

    name: str
    path: Path
    old: str | None
    new: str
    keeps: bool = False

    @property
    def kind(self) -> str:
        if self.old is None:
            return "create"
        return "keep" if self.old == self.new else "change"

    def diff(self) -> str:
        before, after = (self.old or "").splitlines(keepends=True), self.new.splitlines(keepends=True)
        lines = difflib.unified_diff(before, after, self.name, f"{self.name} (new)")
        return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)


@click.command("init")
@click.argument("directory", metavar="[DIR]", default=".", type=click.Path(file_okay=False, path_type=Path))
@click.option("--dry-run", is_flag=True, help="Show what would be written, and write nothing.")
@click.option("--yes", is_flag=True, help="Change existing files without asking; replaced ones stay as NAME.bak.")
@as_json
def init_command(directory: Path, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Set up a project in DIR: settings, two example agents, and .mcp.json for Claude Code.

    An existing file that would change is shown as a diff and asked about. Where nobody can be asked, it is left
    as it is, and the exit code is 1. An existing .mcp.json only gains our server.
    """
    changes = list(planned(directory))
    if dry_run:
        _preview(directory, changes, as_json)
        return
    ask = None if as_json or not (sys.stdin.isatty() and sys.stderr.isatty()) else _ask
    # All questions come before the first file is written: Ctrl-C leaves the project as it was.
    agreed = {change.name: _agreed(change, yes, ask) for change in changes}
    report = {change.name: _carry_out(change) if agreed[change.name] else "left" for change in changes}
    if as_json:
        print_json({"directory": str(directory.resolve()), "files": report, "next": next_steps(directory)})
    else:
        _tell(directory, changes, report)
    sys.exit(1 if ask is None and "left" in report.values() else 0)


# -- what is to be written ----------------------------------------------------------------------------------


def planned(directory: Path) -> Iterator[Change]:
    """Every file, and what is to become of it. Raises ConfigError for what cannot be read or merged."""
    for name, template in templates():
        path = directory / name
        yield Change(name, path, read_text(path), template.read_text("utf-8"))
    path = directory / MCP_FILE
    old = read_text(path)
    new = with_server(old or "", SERVER_NAME, stdio_server(["orchestrator", "mcp"]), str(path))
    yield Change(MCP_FILE, path, old, new, keeps=True)


def templates() -> Iterator[tuple[str, Traversable]]:
    """The name in the project, and the text, of each file that is not merged."""
    folder = files("orchestrator.cli") / "templates"
    yield CONFIG_FILE, folder / CONFIG_FILE
    for agent in sorted((folder / "agents").iterdir(), key=lambda file: file.name):
        yield f"agents/{agent.name}", agent


def read_text(path: Path) -> str | None:
    """The file's text with its line ends as they are; None if there is no file. Raises ConfigError."""
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise _refused(f"{path}:{line}: not UTF-8") from None
    except OSError as error:
        raise _refused(f"{path} cannot be read: {error.strerror}") from None


# -- writing it ---------------------------------------------------------------------------------------------


def _agreed(change: Change, yes: bool, ask: Callable[[Change], bool] | None) -> bool:
    if change.kind != "change" or yes:
        return True
    return ask is not None and ask(change)


def _ask(change: Change) -> bool:
    click.echo(change.diff(), err=True)
    question = f"Change {change.name}" if change.keeps else f"Replace {change.name} (it stays as {change.name}.bak)"
    return click.confirm(f"{question}?", default=change.keeps, err=True)


def _carry_out(change: Change) -> str:
    """Make it so, and say what was done. Raises ConfigError."""
    if change.kind == "keep":
        return "unchanged"
    if read_text(change.path) != change.old:
        raise _refused(f"{change.path} was changed by somebody else meanwhile")
    try:
        change.path.parent.mkdir(parents=True, exist_ok=True)
        if change.kind == "change" and not change.keeps:
            shutil.copy2(change.path, _spare(change.path))
        _write(change.path.resolve(), change.new)
    except OSError as error:
        raise _refused(f"{change.path} cannot be written: {error.strerror}") from None
    return "created" if change.kind == "create" else "changed"


def _spare(path: Path) -> Path:
    """A free name beside the file: ``NAME.bak``, ``NAME.bak2`` and so on."""
    spare, count = path.with_name(f"{path.name}.bak"), 1
    while spare.exists():
        count += 1
        spare = path.with_name(f"{path.name}.bak{count}")
    return spare


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a full disk must not cost anyone their file."""
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(text.encode())
            file.flush()
            temporary.chmod(mode)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _refused(message: str) -> ConfigError:
    return ConfigError(
        message, advice="Correct that and run `orchestrator init` again; what is done stays as it is."
    )


# -- saying it ----------------------------------------------------------------------------------------------


def _preview(directory: Path, changes: list[Change], as_json: bool) -> None:
    if as_json:
        plan: dict[str, Any] = {c.name: {"would": c.kind, "text": c.new, "diff": c.diff()} for c in changes}
        print_json({"directory": str(directory.resolve()), "files": plan})
        return
    for change in changes:
        click.echo(f"would {change.kind} {change.path}")
        if change.kind == "create":
            click.echo(textwrap.indent(change.new, "    "))
        elif change.kind == "change":
            click.echo(change.diff())
    click.echo("nothing was written")


def _tell(directory: Path, changes: list[Change], report: dict[str, str]) -> None:
    for change in changes:
        click.echo(f"{report[change.name]:9}  {change.path}{_why(change, report[change.name])}")
    click.echo("\nnext:")
    for step in next_steps(directory):
        click.echo(f"  {step}")


def _why(change: Change, done: str) -> str:
    if done == "left":
        what = "adds our server" if change.keeps else f"replaces it and keeps it as {change.path.name}.bak"
        return f"  (was there: --dry-run shows the difference, --yes {what})"
    if done == "changed" and not change.keeps:
        return "  (what was there is beside it as .bak)"
    if change.name == MCP_FILE and done == "unchanged":
        server = servers_in(change.new, MCP_FILE)[SERVER_NAME]
        words = [server.get("command"), *server.get("args", [])] if isinstance(server, dict) else [server]
        return f"  (has a server {SERVER_NAME!r} already: {' '.join(map(str, words))})"
    return ""


def next_steps(directory: Path) -> list[str]:
    """What a newcomer does now, in order."""
    steps = [] if directory.resolve() == Path.cwd() else [f"cd {directory}"]
    if shutil.which("orchestrator") is None:
        steps.append("put `orchestrator` on your PATH: Claude Code starts it by that name")
    return [
        *steps,
        "orchestrator doctor                    is everything in place?",
        'orchestrator delegate researcher "What does this project do?"',
        "claude                                 approve the server, then ask it to delegate something",
    ]
