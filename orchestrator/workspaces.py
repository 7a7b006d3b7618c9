import logging, shutil, subprocess
from dataclasses import dataclass
from pathlib import Path
import anyio, anyio.to_thread
from orchestrator.errors import PlanError
from orchestrator.plans.template import template
log = logging.getLogger(__name__)
GIT_SECONDS = 60.0
@dataclass(frozen=True)
class WorkspaceCopy:
    source: Path
    target: Path
    data_path: Path
def workspace_copy(plan, inputs, run_id, data_path):
    if plan.workspace is None: return None
    written = template(plan.workspace.copy_).render({"inputs": inputs, "run": {"id": run_id}, "steps": {}})
    source = (plan.path.parent / written).resolve()
    if not source.is_dir():
        raise PlanError(f"workspace.copy: there is no directory {source}", advice="Name one, or give the input.")
    return WorkspaceCopy(source, data_path / "workspaces" / run_id, data_path)
async def make_copy(copy, environ, *, git_seconds=GIT_SECONDS):
    source, target = copy.source, copy.target
    await anyio.to_thread.run_sync(copy_tree, source, target)
    if not (target / ".git").exists():
        env = {name: value for name, value in environ.items() if not name.startswith("GIT_")}
        await _commit_all(target, f"Copy of {source.name}", env)
def copy_tree(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    shutil.copytree(source, target, symlinks=True)
async def _commit_all(folder, message, env):
    identity = ("-c", "user.name=orchestrator", "-c", "user.email=orchestrator@localhost")
    for command in (("init", "--quiet"), ("add", "--all"), (*identity, "commit", "--quiet", "-m", message)):
        try:
            await anyio.run_process(["git", *command], cwd=folder, env=env)
        except (OSError, subprocess.CalledProcessError) as error:
            log.warning("the workspace %s is not a git repository: %s", folder, error)
            return
