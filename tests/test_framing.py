"""Framing: lines do not depend on how the bytes were cut, and no line is too long until the limit says so."""

import json
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.errors import MessageTooLargeError
from orchestrator.framing import LineFramer, MessageDecoder
from orchestrator.messages import AssistantMessage, ResultMessage, UnknownMessage

TRANSCRIPTS = sorted((Path(__file__).parent / "transcripts").glob("*.ndjson"))
CAP = 8


def cut(data: bytes, at: list[int]) -> list[bytes]:
    """``data`` in pieces, cut at the given places."""
    places = [0, *sorted(place % (len(data) + 1) for place in at), len(data)]
    return [data[start:end] for start, end in pairwise(places)]


def frame(pieces: list[bytes], cap: int) -> tuple[list[bytes], int]:
    """All lines, and how many were refused as too long, going on after each refusal."""
    framer = LineFramer(cap)
    lines: list[bytes] = []
    for piece in pieces:
        try:
            lines += framer.feed(piece)
        except MessageTooLargeError:
            lines += framer.feed(b"")
    last = framer.close()
    return ([*lines, last] if last is not None else lines), framer.skipped


def test_lines_come_when_they_are_complete() -> None:
    framer = LineFramer()
    assert framer.feed(b'{"a"') == []
    assert framer.feed(b":1}\n{") == [b'{"a":1}']
    assert framer.feed(b"}") == []
    assert framer.close() == b"{}"


def test_nothing_is_left_after_a_line_end() -> None:
    framer = LineFramer()
    assert framer.feed(b"a\n") == [b"a"]
    assert framer.close() is None


def test_windows_line_ends_and_blank_lines() -> None:
    assert frame([b"a\r\n\r\n\n  \nb\r", b"\nc\r"], 100) == ([b"a", b"b", b"c"], 0)


def test_byte_order_mark_only_at_the_start() -> None:
    mark = b"\xef\xbb\xbf"
    assert frame([mark[:1], mark[1:] + b"a\n" + mark + b"b\n"], 100) == ([b"a", mark + b"b"], 0)


def test_other_separators_are_data() -> None:
    line = json.dumps({"type": "x", "a": "1\u2028\u2029\x85\x0b2"}, ensure_ascii=False).encode()
    (message,) = MessageDecoder().feed(line + b"\n")
    assert message.raw()["a"] == "1\u2028\u2029\x85\x0b2"


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([b"\n", b"\r\n", b"\r", b" ", b"a", b"12345678", b"\xe2\x80\xa8", b"\xef\xbb\xbf"])),
    st.lists(st.integers(0, 200)),
)
@example([b"12345678", b"\r\n", b"a"], [8])
def test_lines_do_not_depend_on_the_cuts(parts: list[bytes], at: list[int]) -> None:
    data = b"".join(parts)
    assert frame(cut(data, at), CAP) == frame([data], CAP)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(TRANSCRIPTS), st.lists(st.integers(0, 100_000), max_size=20))
def test_recordings_do_not_depend_on_the_cuts(path: Path, at: list[int]) -> None:
    data = path.read_bytes()
    whole, pieces = MessageDecoder(), MessageDecoder()
    found = [message for piece in cut(data, at) for message in pieces.feed(piece)]
    assert found == whole.feed(data)
    assert len(found) == data.count(b"\n")
    assert pieces.close() == whole.close() == []


def test_a_long_line_takes_time_in_proportion_to_its_length() -> None:
    """Joining the line anew for each of these pieces would move 50 GB."""
    piece, line = b"a" * 1024, b"a" * 10 * 1024 * 1024
    framer = LineFramer()
    start = time.process_time()
    for _ in range(len(line) // len(piece)):
        assert framer.feed(piece) == []
    assert framer.feed(b"\n") == [line]
    assert time.process_time() - start < 3


def test_a_ten_megabyte_answer_is_one_message() -> None:
    text = "abcdefghij" * 1024 * 1024
    body = {"type": "assistant", "message": {"content": [{"type": "text", "text": text}]}}
    data = json.dumps(body).encode() + b"\n"
    decoder = MessageDecoder()
    pieces = [data[start : start + 65536] for start in range(0, len(data), 65536)]
    (message,) = [message for piece in pieces for message in decoder.feed(piece)]
    assert isinstance(message, AssistantMessage)
    assert message.text_content == text


def test_a_line_of_exactly_the_limit_passes() -> None:
    assert frame([b"12345678\n"], CAP) == ([b"12345678"], 0)
    assert frame([b"123456789\n"], CAP) == ([], 1)


def test_a_line_over_the_limit_is_refused_as_soon_as_it_is() -> None:
    framer = LineFramer(CAP)
    assert framer.feed(b"ok\n1234") == [b"ok"]
    with pytest.raises(MessageTooLargeError, match=r"9 bytes.*claude\.max_line_bytes allows 8") as caught:
        framer.feed(b"56789")
    assert caught.value.details == {"size": 9, "max_line_bytes": 8}
    assert framer.skipped == 1


def test_after_a_refused_line_reading_goes_on() -> None:
    framer = LineFramer(CAP)
    with pytest.raises(MessageTooLargeError):
        framer.feed(b"before\n123456789")
    assert framer.feed(b"more of it") == [b"before"]
    assert framer.feed(b"its end\nafter\n") == [b"after"]
    assert framer.skipped == 1


def test_lines_behind_a_refused_one_are_not_lost() -> None:
    framer = LineFramer(CAP)
    with pytest.raises(MessageTooLargeError):
        framer.feed(b"a\n123456789\nb\n1234567890\nc")
    assert framer.feed(b"") == [b"a", b"b"]
    assert framer.close() == b"c"
    assert framer.skipped == 2


def test_an_unfinished_refused_line_is_no_last_line() -> None:
    framer = LineFramer(CAP)
    with pytest.raises(MessageTooLargeError):
        framer.feed(b"123456789")
    assert framer.close() is None


def test_what_is_no_json_object_is_passed_over_and_sampled() -> None:
    decoder = MessageDecoder()
    junk = [f"warning {number}".encode() for number in range(7)]
    messages = decoder.feed(b"\n".join([*junk, b'{"type": "x"}', b"[]", b"\xff" * 500, b""]))
    assert [type(message) for message in messages] == [UnknownMessage]
    assert decoder.skipped_lines == 9
    assert decoder.skipped_samples == ["warning 4", "warning 5", "warning 6", "[]", "\ufffd" * 200]


def test_samples_are_cut_by_characters() -> None:
    decoder = MessageDecoder()
    decoder.feed(("\U0001f600" * 300 + "\n").encode())
    assert decoder.skipped_samples == ["\U0001f600" * 200]


def test_refused_lines_count_as_skipped() -> None:
    decoder = MessageDecoder(max_line_bytes=20)
    with pytest.raises(MessageTooLargeError):
        decoder.feed(b'{"type": "x"}\n{"type": "much too long"}\n{"type": "y"}')
    assert [message.raw()["type"] for message in decoder.close()] == ["x", "y"]
    assert decoder.skipped_lines == 1


def test_the_last_message_needs_no_line_end() -> None:
    decoder = MessageDecoder()
    assert decoder.feed(b'{"type": "result", "subtype": "success"}') == []
    (message,) = decoder.close()
    assert isinstance(message, ResultMessage)
    assert decoder.close() == []
