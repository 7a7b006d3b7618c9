"""One error inside a task group is raised as itself."""

import anyio
import pytest

from orchestrator.groups import unwrapped


async def fail(error: BaseException) -> None:
    raise error


async def fail_deep_down(error: Exception) -> None:
    with unwrapped():
        async with anyio.create_task_group() as outer, anyio.create_task_group() as inner:
            inner.start_soon(fail, error)
            outer.start_soon(anyio.sleep, 0)


async def test_a_single_error_comes_out_of_its_groups() -> None:
    error = ValueError("the only one")
    with pytest.raises(ValueError, match="the only one") as caught:
        await fail_deep_down(error)
    assert caught.value is error


def test_its_cause_is_kept() -> None:
    cause = KeyError("why")
    with pytest.raises(ValueError, match="x") as caught, unwrapped():
        raise ExceptionGroup("g", [_caused(cause)])
    assert caught.value.__cause__ is cause


def _caused(cause: Exception) -> Exception:
    error = ValueError("x")
    error.__cause__ = cause
    return error


def test_several_errors_stay_a_group() -> None:
    group = ExceptionGroup("both", [ValueError("a"), ExceptionGroup("inner", [KeyError("b")])])
    with pytest.raises(ExceptionGroup) as caught, unwrapped():
        raise group
    assert caught.value is group


def test_a_group_of_several_comes_out_of_groups_of_one() -> None:
    inner = ExceptionGroup("several", [ValueError("a"), KeyError("b")])
    with pytest.raises(ExceptionGroup) as caught, unwrapped():
        raise ExceptionGroup("outer", [inner])
    assert caught.value is inner


def test_a_plain_error_and_no_error_pass_through() -> None:
    with unwrapped():
        pass
    with pytest.raises(KeyError), unwrapped():
        raise KeyError("x")


def test_what_is_no_exception_of_ours_comes_out_too() -> None:
    with pytest.raises(KeyboardInterrupt), unwrapped():
        raise BaseExceptionGroup("g", [KeyboardInterrupt()])


async def test_a_cancelled_scope_stays_cancelled() -> None:
    with anyio.CancelScope() as scope:
        with unwrapped():
            async with anyio.create_task_group() as tg:
                tg.start_soon(anyio.sleep_forever)
                scope.cancel()
    assert scope.cancelled_caught
