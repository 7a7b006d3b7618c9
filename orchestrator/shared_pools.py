"""Pools shared by name among the parts of a program that have the same runtime."""

from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self, TypeVar

from orchestrator.errors import ConfigError
from orchestrator.pools import ProcessPool, StreamingPool
from orchestrator.runtime import Runtime

PoolT = TypeVar("PoolT", ProcessPool, StreamingPool)


class Pools:
    """``async with Pools(rt) as pools``: leaving shuts all of them down, as leaving each would.

    They belong to whoever opened them, instead of to the process: nothing is left over for the next runtime.
    """

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt
        self._opened: dict[tuple[type, str], tuple[Any, dict[str, Any]]] = {}
        self._exits = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exits.__aexit__(kind, error, trace)

    def get_pool(self, name: str = "default", **settings: Any) -> ProcessPool:
        """The pool of that name; opened with the settings (those of ``ProcessPool``) if there is none yet.

        Raises ConfigError for settings it was not opened with.
        """
        return self._get(ProcessPool, name, settings)

    def get_streaming_pool(self, name: str = "default", **settings: Any) -> StreamingPool:
        """The same for pools whose tasks can be watched; their names are their own."""
        return self._get(StreamingPool, name, settings)

    async def reset_pools(self, *, wait: bool = True) -> None:
        """Shut all of them down as ``shutdown`` does; the next ``get_pool`` opens a new one."""
        pools = [pool for pool, _ in self._opened.values()]
        self._opened.clear()
        for pool in pools:
            await pool.shutdown(wait=wait)

    def _get(self, kind: type[PoolT], name: str, settings: dict[str, Any]) -> PoolT:
        if (found := self._opened.get((kind, name))) is None:
            found = self._opened[kind, name] = kind(self._rt, **settings), settings
            self._exits.push_async_exit(found[0])
        pool, opened_with = found
        if settings and settings != opened_with:
            raise ConfigError(
                f"the pool {name!r} has other settings: {opened_with}",
                advice="Ask for it without settings, or choose another name.",
            )
        assert isinstance(pool, kind)
        return pool
