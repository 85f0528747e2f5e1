"""Web addresses: split into scheme, host and path."""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache

import idna

_SCHEME = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:)?//")
_PATH = re.compile(r"(?=[/\\?#])")
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")


def split_url(url: str) -> tuple[str, str, str]:
    """(scheme with its ://, user, host and port as written, path with query and fragment); absent parts are ''."""
    scheme = _SCHEME.match(url)
    begin = scheme.end() if scheme else 0
    authority, *path = _PATH.split(url[begin:], maxsplit=1)
    return url[:begin], authority, "".join(path)


@lru_cache(maxsize=1 << 16)
def parts(url: str) -> tuple[str, str, str] | None:
    """(scheme in lower case, host, path) of an address with or without a scheme; None if the text is no address.

    The host has no user, port, final dot or brackets. It is in lower case and in its DNS form (xn--), and '' if the address has
    none, as in /a/path and file:///a/path.
    """
    scheme, authority, path = split_url(url.strip())
    host = _host(authority)
    is_word = host and not scheme and "." not in host and ":" not in host
    if is_word or (not host and (authority or not path.startswith("/"))):
        return None
    return scheme.lower(), host or "", path


def _host(authority: str) -> str | None:
    host = re.sub(r":[0-9]*$", "", authority.rpartition("@")[2])
    try:
        if host.startswith("[") and host.endswith("]"):
            return str(ipaddress.IPv6Address(host[1:-1]))
        host = (host if host.isascii() else _ascii(host)).lower().removesuffix(".")
        labels = host.split(".")
        if labels[-1].isdecimal():
            return str(ipaddress.IPv4Address(host))
    except (ValueError, UnicodeError):
        return None
    return host if len(host) <= 253 and all(map(_LABEL.fullmatch, labels)) else None


def _ascii(host: str) -> str:
    try:
        return idna.encode(host, uts46=True).decode()
    except idna.IDNAError:  # IDNA 2008 forbids some names that are in use: emoji, underscores
        return host.encode("idna").decode()
