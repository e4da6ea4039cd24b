"""Child: ask the hub for one small file of the job's repository, as its own library would. Standard library only.

    hub_access.py REPOSITORY SECONDS

The endpoint and the token are read here, from the environment and the token file (huggingface_hub/constants.py and
utils/_auth.py). The token goes to the endpoint's own origin and nowhere else, and no line that is printed holds it.
Prints one JSON line: status (null without an answer) and detail, which begins with the kind of failure and a colon.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from email.message import Message
from pathlib import Path
from typing import IO

DEFAULT = "https://huggingface.co"
YES = ("1", "ON", "YES", "TRUE")


def read_token() -> str:
    """The token in the library's own order; empty: none."""
    if os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in YES:
        return ""
    named = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    if not named:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
        path = os.environ.get("HF_TOKEN_PATH") or f"{home}/token"
        with contextlib.suppress(OSError, RuntimeError, UnicodeDecodeError):
            named = Path(os.path.expandvars(path)).expanduser().read_text(encoding="utf-8")
    return (named or "").replace("\r", "").replace("\n", "").strip()


def certificates() -> ssl.SSLContext:
    """The authorities that the library trusts: those of the variables, else certifi's, else the system's."""
    named = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if named:
        folder = Path(named).is_dir()
        return ssl.create_default_context(cafile=None if folder else named, capath=named if folder else None)
    if not os.environ.get("SSL_CERT_FILE") and not os.environ.get("SSL_CERT_DIR"):
        with contextlib.suppress(ImportError, OSError):
            import certifi

            return ssl.create_default_context(cafile=certifi.where())
    return ssl.create_default_context()


def origin(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc


class OwnOrigin(urllib.request.HTTPRedirectHandler):
    """Follow a repository that was renamed; never carry the token to another host. Such an answer ends as it is."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        if origin(newurl) != origin(req.full_url):
            return None
        return urllib.request.Request(newurl, headers=dict(req.header_items()), method="HEAD")  # noqa: S310 (same scheme)


def ask(endpoint: str, repository: str, token: str, seconds: float) -> tuple[int, str]:
    """(status, detail) of a HEAD request."""
    url = f"{endpoint}/{urllib.parse.quote(repository)}/resolve/main/model_index.json"
    headers = {"User-Agent": "xflux-doctor", "Accept-Encoding": "identity"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    if not url.startswith(("http://", "https://")):
        raise ValueError("HF_ENDPOINT does not begin with http:// or https://")
    request = urllib.request.Request(url, headers=headers, method="HEAD")  # noqa: S310 (looked at above)
    opener = urllib.request.build_opener(OwnOrigin, urllib.request.HTTPSHandler(context=certificates()))
    try:
        with opener.open(request, timeout=seconds) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        said = (error.headers.get("X-Error-Code"), error.headers.get("X-Error-Message"))
        return error.code, ": ".join(word for word in said if word)[:300]


def failure(error: Exception, endpoint: str) -> str:
    """The kind of a failure, and its words."""
    reason = getattr(error, "reason", error)
    words = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    parts = urllib.parse.urlsplit(endpoint)
    with contextlib.suppress(Exception):
        if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname or ""):
            return f"proxy: {words}"
    if isinstance(reason, ssl.SSLError):
        return f"tls: {getattr(reason, 'verify_message', '') or words}"
    if isinstance(reason, TimeoutError):
        return "timeout: no answer in time"
    if isinstance(reason, socket.gaierror):
        return f"name: {parts.hostname} has no address: {words}"
    return f"network: {words}"


def main() -> None:
    repository, seconds = sys.argv[1], float(sys.argv[2])
    token = read_token()
    endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT).rstrip("/")
    status = None
    try:
        token.encode("latin-1")
        status, detail = ask(endpoint, repository, token, seconds)
    except UnicodeEncodeError:
        detail = "token: the token holds characters that no token has"
    except (OSError, http.client.HTTPException, ValueError) as error:
        detail = failure(error, endpoint)
    if token:  # a header or a message may give it back
        detail = detail.replace(token, "***")
    print(json.dumps({"status": status, "detail": detail}))


if __name__ == "__main__":
    main()
