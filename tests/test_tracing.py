"""Trace context: what the W3C calls valid is read, all else is nothing, and ids are fit for a trace."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.tracing import SpanContext, new_run_id, new_trace_id

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    "header",
    [
        f"00-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-00",
        f"00-{TRACE}-{SPAN}-03",
        f"  00-{TRACE}-{SPAN}-01\r\n",
        f"00-{TRACE.upper()}-{SPAN.upper()}-01",
        f"01-{TRACE}-{SPAN}-01",
        f"cc-{TRACE}-{SPAN}-01-what-the-future-holds",
        f"fe-{TRACE}-{SPAN}-01-",
    ],
)
def test_valid_headers_are_read(header: str) -> None:
    assert SpanContext.parse(header) == SpanContext(TRACE, SPAN)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "garbage",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01x",
        f"00-{TRACE}-{SPAN}-011",
        f"01-{TRACE}-{SPAN}-01x",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}0-{SPAN}-01",
        f"00-{TRACE[:-1]}g-{SPAN}-01",
        f"00_{TRACE}_{SPAN}_01",
        f"00-{TRACE}-{SPAN}-01\n00-{TRACE}-{SPAN}-01",
        f"00-{TRACE[:-1]}\u0661-{SPAN}-01",
    ],
)
def test_everything_else_is_no_context(header: str | None) -> None:
    assert SpanContext.parse(header) is None


@given(st.text(max_size=80) | st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}.?", fullmatch=True))
def test_any_text_is_a_context_or_none(text: str) -> None:
    context = SpanContext.parse(text)
    if context is not None:
        assert SpanContext.parse(context.traceparent) == context


def test_what_we_send_is_sampled() -> None:
    assert SpanContext(TRACE, SPAN).traceparent == f"00-{TRACE}-{SPAN}-01"


def test_ids_have_the_size_of_span_and_trace_ids() -> None:
    runs, traces = {new_run_id() for _ in range(1000)}, {new_trace_id() for _ in range(1000)}
    assert len(runs) == len(traces) == 1000
    assert all(re.fullmatch("[0-9a-f]{16}", each) for each in runs)
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in traces)
