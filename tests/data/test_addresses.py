"""Which part of an address is the host."""

import pytest

from metajax.data.annotators import annotate


@pytest.mark.fault(15)
@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://user:pw@example.com/x", "example.com"),
        ("user:pw@example.com/x", "example.com"),
        ("https://a@b@c.org", "c.org"),
        ("archive.org/web/2020/http://inner.com/", "archive.org"),
        ("https://web.archive.org/web/2020/http://user:pw@inner.com/", "web.archive.org"),
        ("a.org?next=http://b.org/", "a.org"),
        ("HTTPS://WWW.Example.COM:443", "www.example.com"),
        ("http://example.com./", "example.com"),
        ("//cdn.example.com/x", "cdn.example.com"),
        (" http://a.org/ \n", "a.org"),
        ("http://a.org\\@b.org", "a.org"),
        ("http://[2001:DB8:0::1]:8080/x", "2001:db8::1"),
        ("http://user@[::1]/", "::1"),
        ("192.168.0.1:8080/x", "192.168.0.1"),
        ("http://MÜNCHEN.de/", "xn--mnchen-3ya.de"),
        ("http://xn--mnchen-3ya.de/", "xn--mnchen-3ya.de"),
        ("http://i❤.ws", "xn--i-7iq.ws"),
        ("http://my_site.example.org", "my_site.example.org"),
    ],
)
def test_hosts(url, host):
    assert annotate("url|host", [url]) == [host]


@pytest.mark.fault(15)
@pytest.mark.parametrize(
    "text",
    [
        "some words.",
        "word",
        "",
        "3.14",
        "http://",
        "http://:80/",
        "http://[broken",
        "http://a..b/",
        "http://256.1.1.1/",
        "javascript:alert(1)",
        "Dr. Who/x",
    ],
)
def test_text_that_is_no_address_has_no_parts(text):
    assert [annotate(f"url|{part}", [text]) for part in ("scheme", "host", "domain", "tld", "path")] == [[None]] * 5


def test_addresses_without_a_host_have_a_path():
    assert annotate("url|path", ["file:///a/b", "/a/b"]) == ["/a/b", "/a/b"]
    assert annotate("url|host", ["file:///a/b", "/a/b"]) == [None, None]
