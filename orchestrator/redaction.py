"""Secrets kept out of logs, rows, spans and errors: pure text in, text out.

Two kinds are replaced by ``[redacted]``: values known to be secret (variables and headers whose name says so), and
what has the shape of a well-known key wherever it comes from. Everything runs in time linear in the text, because
tools print whole files, and what has no secret in it costs a few substring tests.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

MARKER = "[redacted]"
#: Shorter values are never taken for secrets: ordinary words would be blotted out everywhere.
MIN_SECRET_CHARS = 8
#: What the bearer tokens of running agents begin with, so that they are known by their shape, like other keys.
RUN_TOKEN_PREFIX = "orch-run-"  # noqa: S105  # how tokens begin, not one


class Redactor:
    """Replaces secrets. Doing so twice changes nothing more."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets: dict[str, _Secret] = {}
        self.add_secrets(secrets)

    def __repr__(self) -> str:
        return f"<Redactor secrets={len(self._secrets)}>"  # never the values

    def add_secrets(self, values: Iterable[str]) -> None:
        for value in values:
            self.add_secret(value)

    def add_secret(self, value: str) -> None:
        """Hide this value from now on, also where it stands escaped in JSON or in a URL. Too short: no effect."""
        value = value.strip()
        if value in self._secrets:
            return
        for form in _forms(value) - self._secrets.keys():
            if len(form) >= MIN_SECRET_CHARS and form not in MARKER and MARKER not in form:
                self._secrets[form] = _Secret(form)
        # A secret may be part of another: the longest goes first.
        self._secrets = dict(sorted(self._secrets.items(), key=lambda item: -len(item[0])))

    def text(self, text: str) -> str:
        """The text without its secrets; one that is cut off at its begin or end is recognised too."""
        return _without(self._known_in(text), text)

    def json(self, text: str) -> str:
        """JSON text (a whole document) without the secrets in its strings, object keys included."""
        if not (found := self._known_in(text)):
            return text
        # Escaped here, a value may be found in another of its forms than in the string itself.
        known: list[_Secret | _Kind] = [*self._secrets.values()]
        known += (each for each in found if isinstance(each, _Kind))
        return _JSON_STRING.sub(lambda match: _json_string(known, match), text)

    def data(self, value: Any) -> Any:
        """JSON-like data without its secrets. With none in it, it comes back as it is."""
        written = json.dumps(value, default=str)
        redacted = self.json(written)
        return value if redacted == written else json.loads(redacted)

    def _known_in(self, text: str) -> "list[_Secret | _Kind]":
        # All that is written comes through here: which rare characters are in it decides about most shapes at once.
        rare = [char for char in _RARE if char in text]
        kinds = [kind for char in rare for kind in _RARE[char] if kind.may_be_in(text)]
        return [*(secret for secret in self._secrets.values() if secret.may_be_in(text)), *kinds]


def is_credential(name: str) -> bool:
    """Whether a variable or header of that name holds a secret."""
    return _CREDENTIAL.search(name.upper()) is not None and not name.upper().endswith(_NOT_SECRET_ITSELF)


def secrets_of(variables: Mapping[str, Any]) -> Iterator[str]:
    """The values of credentials among variables or headers, and passwords in the URLs of the others."""
    for name, value in variables.items():
        if not isinstance(value, str) or "${" in value:
            continue  # the CLI fills it in from its environment, whose values are known
        if is_credential(name):
            yield value
            yield value.split()[-1] if value.split() else ""  # "Bearer …": what is secret is the token
        elif password := _URL_PASSWORD.search(value):
            yield password[1]


def secrets_of_servers(servers: Mapping[str, Any]) -> Iterator[str]:
    """The credentials in the headers and variables of MCP servers' configurations."""
    for server in servers.values():
        parts = (server.get("headers"), server.get("env")) if isinstance(server, Mapping) else ()
        for part in parts:
            if isinstance(part, Mapping):
                yield from secrets_of(part)


_CREDENTIAL = re.compile(
    r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|AUTH(?:ORIZATION)?)S?(?![A-Z])"
)
#: Names of where a secret is, of what a key is for.
_NOT_SECRET_ITSELF = ("_FILE", "_PATH", "_DIR", "_SOCK")
_URL_PASSWORD = re.compile(r"://[^\s/:@]*:([^\s/@]+)@")


@dataclass(frozen=True, slots=True)
class _Secret:
    """A value known to be secret. Recognised by its ends: text is cut (the tail of an output, a stream so far)."""

    value: str

    def may_be_in(self, text: str) -> bool:
        return self.value[:MIN_SECRET_CHARS] in text or self.value[-MIN_SECRET_CHARS:] in text

    def replaced(self, text: str, *, first: bool, last: bool) -> str:
        parts = text.split(self.value)
        begin = self._cut_at_begin(parts[0]) if first else 0
        parts[0] = parts[0][begin:]
        end = self._cut_at_end(parts[-1]) if last else 0
        parts[-1] = parts[-1][: len(parts[-1]) - end]
        return (MARKER if begin else "") + MARKER.join(parts) + (MARKER if end else "")

    def _cut_at_begin(self, text: str) -> int:
        """How many characters of the secret's end the text begins with."""
        sizes = range(min(len(self.value) - 1, len(text)), MIN_SECRET_CHARS - 1, -1)
        return next((size for size in sizes if text.startswith(self.value[-size:])), 0)

    def _cut_at_end(self, text: str) -> int:
        sizes = range(min(len(self.value) - 1, len(text)), MIN_SECRET_CHARS - 1, -1)
        return next((size for size in sizes if text.endswith(self.value[:size])), 0)


class _Kind:
    """Shapes of keys with a sign in common, which is in every text that one of them matches.

    It begins with a character that most texts lack: to look for that alone takes next to no time.
    """

    def __init__(self, sign: str, *shapes: str) -> None:
        self.rare = sign[0]
        self._sign = re.compile(sign)
        # A match takes in the rest of its word, so that what is left cannot be taken for a key the next time.
        self._shapes = [re.compile(rf"(?:{shape})[\w-]*+", re.ASCII) for shape in shapes]

    def may_be_in(self, text: str) -> bool:
        return self.rare in text and self._sign.search(text) is not None

    def replaced(self, text: str, **_: bool) -> str:
        for shape in self._shapes:
            text = shape.sub(_kept, text)
        return text


def _kept(match: re.Match[str]) -> str:
    """What a shape names ``keep`` stays: that it was a bearer token may be known."""
    return (match.groupdict().get("keep") or "") + MARKER


def _without(known: "Iterable[_Secret | _Kind]", text: str) -> str:
    for each in known:
        # A marker is never taken apart or made part of a secret: what is between them is looked at.
        pieces = text.split(MARKER)
        end = len(pieces) - 1
        text = MARKER.join(each.replaced(piece, first=i == 0, last=i == end) for i, piece in enumerate(pieces))
    return text


def _json_string(known: "Iterable[_Secret | _Kind]", match: re.Match[str]) -> str:
    header, written = match["header"] or "", match["string"]
    if not header and not any(each.may_be_in(written) for each in known):
        return match[0]
    value = json.loads(written)
    here = [each for each in known if each.may_be_in(value)]
    # As with variables: the CLI fills in what is in braces. A marker says that it was redacted before.
    redacted = MARKER if header and "${" not in value and MARKER not in value else _without(here, value)
    return match[0] if redacted == value else header + json.dumps(redacted, ensure_ascii=written.isascii())


def _forms(value: str) -> set[str]:
    """The value as it is, in JSON, in JSON within JSON, and in a URL."""
    forms = {value}
    for _ in range(2):
        forms |= {json.dumps(form, ensure_ascii=ascii_)[1:-1] for form in forms for ascii_ in (True, False)}
    return forms | {quote(value, safe="", errors="replace")}


# A name and its value in a header, a dictionary's repr, JSON within JSON.
_SEP = r"""(?:["'\\]{0,4}\s{0,4}[:=]|["'],)\s{0,4}(?:b?["'\\]{1,4})?"""
# Not just any word after "bearer": it has a digit early on, or is long.
_RANDOM = r"(?=[A-Za-z._~+/=%-]{0,23}[0-9]|[\w.~+/=%-]{24})[\w.~+/=%-]{8,}+"
_BLANK = r"(?:[ \t]{1,4}|%20)"
_SCHEME = rf"(?i:bearer|basic|token){_BLANK}"


def _header(name: str, scheme: str = "") -> str:
    """The header's value: any word after a scheme, without one what looks like a key."""
    value = r"[\w.~+/=%-]++" if scheme else _RANDOM
    return rf"(?P<keep>{name}{_SEP}{scheme}){value}"


# Literal beginnings, bounds and lookbehinds keep each fast and linear: no run of characters is scanned from more
# than a few starts. None looks at what follows its match.
_KINDS = (
    _Kind(r"-(?<=sk-ant-)", r"sk-ant-[\w-]{5,}"),
    _Kind(rf"-(?<={RUN_TOKEN_PREFIX})", rf"{RUN_TOKEN_PREFIX}[\w-]{{16,}}"),
    _Kind(r"-(?<=glpat-)", r"glpat-[\w-]{20,}"),
    _Kind(r"-(?:(?<=xox[a-z]-)|(?<=xapp-))", r"x(?:ox[a-z]|app)-[\w-]{10,}"),  # Slack
    _Kind(r"-(?<=[aA][pP][iI]-)(?=[kK])", _header(r"-(?<=[aA][pP][iI]-)[kK][eE][yY]")),
    # The end may be missing; what cannot be part of a key (a quote, a parenthesis) ends it then.
    _Kind(
        r"-(?<=-----)(?=BEGIN )",
        r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
        r"(?:[\w+/=:,.\s]|\\+[nr]|-(?!----))*+(?:-----END [A-Z0-9 ]{0,60}-----)?",
    ),
    _Kind(r"_(?<=gh[pousr]_)", r"gh[pousr]_[A-Za-z0-9]{30,}"),
    _Kind(r"_(?<=github_pat_)", r"github_pat_\w{20,}"),
    _Kind(r"_(?<=k_live_)", r"sk_live_[A-Za-z0-9]{16,}", r"rk_live_[A-Za-z0-9]{16,}"),  # Stripe
    _Kind(r"A(?=KIA|SIA)", r"A(?:KI|SI)A[A-Z0-9]{16}"),  # AWS
    _Kind(r"A(?=Iza)", r"AIza[\w-]{35}"),  # Google
    _Kind(r"J(?<=T3BlbkFJ)", r"sk-(?<![\w-]sk-)[\w-]{10,200}T3BlbkFJ[\w-]{10,}"),  # OpenAI
    _Kind(r"J(?<=eyJ)", r"eyJ(?<![\w-]eyJ)[\w-]{8,}+\.eyJ[\w-]{8,}+\.[\w-]{8,}"),  # JSON web tokens
    _Kind(r"z(?<=uthoriz)", _header("uthorization", _SCHEME), _header("uthorization")),
    _Kind(r"Z(?<=UTHORIZ)", _header("UTHORIZATION", _SCHEME), _header("UTHORIZATION")),
    _Kind(r"b(?=earer)", rf"(?P<keep>bearer{_BLANK}){_RANDOM}"),
    _Kind(r"B(?=earer|EARER)", rf"(?P<keep>B(?:earer|EARER){_BLANK}){_RANDOM}"),
)
_RARE = {kind.rare: [each for each in _KINDS if each.rare == kind.rare] for kind in _KINDS}

# Strings one by one, so that no depth of nesting is too much; the value of such a header is a secret of any shape.
_JSON_STRING = re.compile(
    r'(?P<header>"(?i:(?:proxy-)?authorization|(?:x-)?(?:goog-)?api-key)"\s{0,4}:\s{0,4})?'
    r'(?P<string>"[^"\\]*+(?:\\.[^"\\]*+)*+")',
    re.ASCII | re.DOTALL,
)
