"""The HTTP client of the API path: it looks at the environment a CLI would have had, and not at ours."""

import ssl
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # missing from typeshed only

from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    import httpx2

CONNECT_SECONDS = 10.0


def custom_headers(env: Mapping[str, str]) -> dict[str, str]:
    """Headers a gateway asks for, as the CLI takes them: ``Name: value``, one a line."""
    lines = [line.partition(":") for line in env.get("ANTHROPIC_CUSTOM_HEADERS", "").splitlines()]
    return {name.strip(): value.strip() for name, colon, value in lines if colon}


def http_client(env: Mapping[str, str], base_url: str, timeout_s: float) -> "httpx2.AsyncClient":
    """An HTTP client that looks at the conversation's environment and not at ours."""
    import httpx2  # noqa: PLC0415

    return httpx2.AsyncClient(
        timeout=httpx2.Timeout(timeout_s, connect=CONNECT_SECONDS),
        trust_env=False,
        proxy=proxy(env, httpx2.URL(base_url)),
        verify=certificates(env),
    )


def proxy(env: Mapping[str, str], url: "httpx2.URL") -> str | None:
    variables = {name.lower(): env[name] for name in sorted(env)}
    named = {name.removesuffix("_proxy"): value for name, value in variables.items() if name.endswith("_proxy")}
    if proxy_bypass_environment(url.host, named):
        return None
    return named.get(url.scheme) or named.get("all")


def certificates(env: Mapping[str, str]) -> ssl.SSLContext | bool:
    file, folder, more = (env.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "NODE_EXTRA_CA_CERTS"))
    if not (file or folder or more):
        return True
    try:
        context = ssl.create_default_context(cafile=file or None, capath=folder or None)
        if more:
            context.load_verify_locations(more)
    except OSError as error:
        raise ConfigError(f"SSL_CERT_FILE or NODE_EXTRA_CA_CERTS cannot be used: {error}") from error
    return context
