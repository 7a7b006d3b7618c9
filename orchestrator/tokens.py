"""Bearer tokens by which a CLI process calls back: each says which process calls, and so for which run."""

import hashlib
import secrets

from orchestrator.redaction import RUN_TOKEN_PREFIX

TOKEN_ENV = "ORCHESTRATOR_RUN_TOKEN"  # noqa: S105  # the variable's name, not a token


class Tokens:
    """Bearer tokens of CLI processes: for which run does the one that calls work now? Only hashes are kept."""

    def __init__(self) -> None:
        self._processes: dict[str, str] = {}
        self._runs: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._processes)

    def issue(self, process_id: str) -> str:
        token = RUN_TOKEN_PREFIX + secrets.token_urlsafe(32)
        self._processes[_digest(token)] = process_id
        return token

    def assign(self, process_id: str, run_id: str | None) -> None:
        """The process works for the run from now on, or for none."""
        if run_id is None:
            self._runs.pop(process_id, None)
        else:
            self._runs[process_id] = run_id

    def run_of(self, token: str) -> str | None:
        """The run whose process presents the token; None for a process that works for none."""
        return self._runs.get(self._processes.get(_digest(token), ""))

    def knows(self, token: str) -> bool:
        """Whether a living process was given the token."""
        return _digest(token) in self._processes

    def revoke(self, process_id: str) -> None:
        self._processes = {digest: of for digest, of in self._processes.items() if of != process_id}
        self._runs.pop(process_id, None)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
