"""Addresses that strangers name: every spelling of our own network is refused, what is public is taken."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from pipeline.addresses import MAX_CHARS, BadUrl, is_public, read_url

INWARD = [
    # loopback, plainly
    "http://127.0.0.1/", "http://127.0.0.1:8080/", "https://127.255.255.254/", "http://localhost/", "http://LocalHost/",
    "http://localhost./", "http://a.localhost/", "http://localhost.localdomain/", "http://[::1]/", "http://[0:0:0:0:0:0:0:1]/",
    # loopback as other readers of addresses spell it
    "http://127.1/", "http://127.0.1/", "http://2130706433/", "http://0x7f000001/", "http://0x7f.1/", "http://0x7F.0.0.0x1/",
    "http://0177.0.0.1/", "http://017700000001/", "http://127.0.0.1./", "http://127.000.000.001/", "http://0/", "http://0.0.0.0/",
    "http://[::]/", "http://1.0x7f/", "http://127.0.0.0x1/", "http://4294967295/", "http://127.0.0.1..../",
    # other characters that some readers take for these
    "http://\uff11\uff12\uff17.0.0.1/", "http://\u2460\u2461\u2466.0.0.1/", "http://127\u30020\u30020\u30021/",
    "http://\u24dbocalhost/", "http://%31%32%37.0.0.1/",
    "http://127.0.0.1%00.example.com/", "http://127.0.0.1%2f.example.com/", "http://exa\u00admple.com/",
    # an IPv4 address inside an IPv6 one
    "http://[::ffff:127.0.0.1]/", "http://[::ffff:7f00:1]/", "http://[0:0:0:0:0:ffff:7f00:1]/", "http://[::127.0.0.1]/",
    "http://[64:ff9b::7f00:1]/", "http://[64:ff9b::127.0.0.1]/", "http://[64:ff9b:1::7f00:1]/", "http://[2002:7f00:1::]/",
    "http://[2002:a9fe:a9fe::1]/", "http://[2001:0:7f00:1::]/", "http://[::ffff:0:127.0.0.1]/", "http://[::ffff:8.8.8.8]/",
    # link-local, with and without a zone; where clouds keep their secrets
    "http://169.254.169.254/latest/meta-data/", "http://[fe80::1]/", "http://[fe80::1%25eth0]/", "http://[fe80::1%eth0]/",
    "http://[::ffff:169.254.169.254]/", "http://[fd00:ec2::254]/", "http://2852039166/", "http://0xa9fea9fe/",
    "http://metadata.google.internal/", "http://100.100.100.200/", "http://168.63.129.16/", "http://192.0.0.192/",
    # private and reserved
    "http://10.0.0.1/", "http://172.16.0.1/", "http://172.31.255.255/", "http://192.168.1.1/", "http://100.64.0.1/",
    "http://192.0.2.1/", "http://198.18.0.1/", "http://203.0.113.7/", "http://192.88.99.1/", "http://224.0.0.1/",
    "http://240.0.0.1/", "http://255.255.255.255/", "http://[fc00::1]/", "http://[fd12:3456::1]/", "http://[fec0::1]/",
    "http://[ff02::1]/", "http://[2001:db8::1]/", "http://[3fff::1]/", "http://[5f00::1]/", "http://[100::1]/",
    # names that mean something inside only
    "http://redis/", "http://redis:6379/", "http://gateway.local/", "http://db.internal/", "http://router.home.arpa/",
    # another host than it seems
    "http://example.com@127.0.0.1/", "http://127.0.0.1@example.com/", "http://user:password@example.com/", "http://@example.com/",
    "http://example.com\\@127.0.0.1/", "http://127.0.0.1\\.example.com/", "http://127.0.0.1#.example.com/",
    "http:/\\127.0.0.1/", "http:127.0.0.1/", "http:///127.0.0.1/", "http:\\\\127.0.0.1\\", "//127.0.0.1/",
    "http://example.com\t/", "http://example.com\n/", " http://example.com/",
    "http://example.com/\r\nHost: inside", "http://exam ple.com/",
    # other protocols, by scheme and by port
    "file:///etc/passwd", "gopher://example.com:70/_", "ftp://example.com/", "dict://example.com:11211/", "data:,x",
    "redis://example.com/", "unix:///run/redis.sock", "javascript:1", "http+unix://%2Frun%2Fx/", "ws://example.com/",
    "http://example.com:22/", "http://example.com:25/", "http://example.com:6000/", "http://example.com:0/",
    "http://example.com:65536/", "http://example.com:-1/", "http://example.com:99999/", "http://example.com:8 0/",
    # no address at all
    "", "example.com", "http://", "http://.", "http://..", "http://-example.com/", "http://example-.com/",
    "http://exa..mple.com/", "http://example.com:/x y",
    "http://[/", "http://[]/", "http://[::1/", "http://::1/", "http://[1.2.3.4]/", "http://[::g]/",
    "http://" + "a" * 64 + ".com/", "http://" + "a." * 127 + "com/", "http://example.com/" + "a" * MAX_CHARS,
]  # fmt: skip

OUTWARD = [
    "https://example.com", "https://example.com/", "https://example.com/hooks/penstock?tenant=a&x=%20b", "HTTPS://Example.COM/",
    "http://hooks.example.co.uk:8080/in", "https://example.com:443/", "http://example.com:80/", "https://xn--bcher-kva.example.net/",
    "https://a-b.example.com/~me/(x);v=1,2/*!$'", "https://under_score.example.com/", "https://1.example.com/", "https://8.8.8.8/",
    "https://1.1.1.1:8443/x", "https://[2606:4700:4700::1111]/", "https://[2A00:1450:4001::200E]:8443/x", "https://example.com:1024/",
    "https://127.0.0.1.example.com/", "https://localhost.example.com/", "https://example.com/@user", "https://example.com?x=a@b",
]  # fmt: skip


@pytest.mark.parametrize("text", INWARD)
def test_a_way_into_our_network_is_refused(text: str) -> None:
    """By its form, before anybody asks what it means, and the person hears why."""
    with pytest.raises(BadUrl) as caught:
        read_url(text)
    assert str(caught.value)


@pytest.mark.parametrize("text", OUTWARD)
def test_an_ordinary_public_url_is_taken(text: str) -> None:
    """Nobody is asked, nothing is called."""
    url = read_url(text)
    assert url.scheme in {"http", "https"}
    assert url.host == url.host.lower()


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("http://localhost:8080/x", "localhost", 8080),
        ("http://receiver/", "receiver", 80),
        ("http://[::1]:22/", "::1", 22),
        ("https://127.0.0.1/", "127.0.0.1", 443),
    ],
)
def test_for_development_any_address_is_taken(text: str, host: str, port: int) -> None:
    """And its form is looked at all the same."""
    url = read_url(text, allow_private=True)
    assert (url.host, url.port) == (host, port)


@pytest.mark.parametrize(
    "text", ["http://127.1/", "http://2130706433/", "http://a@localhost/", "ftp://localhost/", "http://[fe80::1%25lo]/"]
)
def test_odd_spellings_are_refused_for_development_too(text: str) -> None:
    """What works there must work in production, but for where it leads."""
    with pytest.raises(BadUrl):
        read_url(text, allow_private=True)


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1", "0.0.0.0", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::808:808", "fe80::1%eth0",
     "2606:4700::1%1", "2002:808:808::1", "2001:0:808:808::1", "169.254.169.254", "fd00::1", "ff0e::1", "::"],
)  # fmt: skip
def test_an_address_that_a_name_leads_to_may_be_refused(text: str) -> None:
    """Where a public address is only carried inside, the machine between decides where it leads."""
    assert not is_public(ip_address(text))


@pytest.mark.parametrize(
    "text", ["8.8.8.8", "1.1.1.1", "223.255.255.255", "172.32.0.1", "100.128.0.1", "2606:4700::1", "2a00:1450:4001::1"]
)
def test_a_public_address_is_one(text: str) -> None:
    """Those beside the reserved ones too."""
    assert is_public(ip_address(text))
