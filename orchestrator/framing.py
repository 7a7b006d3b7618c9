"""Bytes to lines to messages, without I/O: whoever reads hands bytes in and gets what is complete.

Stream-json is one JSON object per line. A line may be very long (a 10 MB answer is one line, and comes twice),
so each byte is searched once and joined once, however small the pieces it comes in.
"""

from collections import deque

from orchestrator.errors import MessageTooLargeError
from orchestrator.messages import Message, parse_message

MAX_LINE_BYTES = 64 * 1024 * 1024

_BOM = b"\xef\xbb\xbf"
_SAMPLES = 5
_SAMPLE_CHARS = 200


class LineFramer:
    r"""Splits bytes into lines at ``\n`` and nowhere else: other separators, such as U+2028, are data.

    Line ends, blank lines and a byte order mark at the very start are dropped. ``skipped`` counts the lines
    passed over because they were longer than ``max_line_bytes``.
    """

    def __init__(self, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self.skipped = 0
        self._max = max_line_bytes
        self._parts: list[bytes] = []
        self._size = 0
        self._at_start = True
        self._lines: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that ``data`` completes.

        Raises MessageTooLargeError when a line grows over the limit, once for each such line at most. The
        bytes are taken in all the same: the line is passed over, the others come with the next call, for
        which ``b""`` will do.
        """
        skipped = self.skipped
        size = 0
        *ends, rest = data.split(b"\n")
        for end in ends:
            size = max(size, self._add(end))
            self._end_line()
        size = max(size, self._add(rest))
        if self.skipped > skipped:
            raise self._too_large(size)
        lines, self._lines = self._lines, []
        return lines

    def close(self) -> bytes | None:
        """The last line, if no line end followed it. Call once, after the last ``feed``."""
        self._end_line()
        return self._lines.pop() if self._lines else None

    def _add(self, part: bytes) -> int:
        before = self._size
        self._size += len(part)
        if self._size <= self._max:
            self._parts.append(part)
        elif before <= self._max:
            self.skipped += 1
            self._parts.clear()
        return self._size

    def _end_line(self) -> None:
        line = b"".join(self._parts).removesuffix(b"\r")
        if self._at_start:
            line = line.removeprefix(_BOM)
        if line.strip():
            self._lines.append(line)
        self._parts.clear()
        self._size = 0
        self._at_start = False

    def _too_large(self, size: int) -> MessageTooLargeError:
        return MessageTooLargeError(
            f"a line of the CLI's output has {size} bytes or more; claude.max_line_bytes allows {self._max}",
            details={"size": size, "max_line_bytes": self._max},
        )


class MessageDecoder:
    """Turns the bytes of a CLI's output into messages.

    A line that is not a JSON object (a warning somebody printed) is passed over: ``skipped_lines`` counts
    those and the over-long ones, ``skipped_samples`` holds the beginnings of the latest of the former.
    """

    def __init__(self, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._framer = LineFramer(max_line_bytes)
        self._not_json = 0
        self._samples: deque[str] = deque(maxlen=_SAMPLES)

    @property
    def skipped_lines(self) -> int:
        """How many lines gave no message."""
        return self._not_json + self._framer.skipped

    @property
    def skipped_samples(self) -> list[str]:
        """The latest lines that were no JSON object, each cut to 200 characters, oldest first."""
        return list(self._samples)

    def feed(self, data: bytes) -> list[Message]:
        """The messages that ``data`` completes. Raises MessageTooLargeError like ``LineFramer.feed``."""
        return self._decode(self._framer.feed(data))

    def close(self) -> list[Message]:
        """The messages left when the stream has ended."""
        left = self._framer.feed(b"")
        last = self._framer.close()
        return self._decode([*left, last] if last is not None else left)

    def _decode(self, lines: list[bytes]) -> list[Message]:
        messages = []
        for line in lines:
            try:
                messages.append(parse_message(line))
            except ValueError:
                self._skip(line)
        return messages

    def _skip(self, line: bytes) -> None:
        self._not_json += 1
        # A character has at most four bytes: enough for the sample without decoding a huge line.
        self._samples.append(line[: 4 * _SAMPLE_CHARS].decode("utf-8", "replace")[:_SAMPLE_CHARS])
