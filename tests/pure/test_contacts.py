"""Addresses and numbers: what is taken can be written down as one, and what is not says why without repeating it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.contacts import MAX_ADDRESS_BYTES, BadContact, is_service, read_mailbox, read_number, read_sender

LETTERS = "abzAZ09 .,;:@<>()[]\\\"'+-_=?&%#üß☃é漢\u0301\u200b\u00a0\r\n\0\t"


@pytest.mark.parametrize(
    ("text", "name", "address"),
    [
        ("ann@example.com", "", "ann@example.com"),
        ("<ann@example.com>", "", "ann@example.com"),
        ("ann.lee+tag=1@sub.example.com", "", "ann.lee+tag=1@sub.example.com"),
        ("o'neil!#$%&*/?^`{|}~@example.com", "", "o'neil!#$%&*/?^`{|}~@example.com"),
        ("Ann Lee <ann@example.com>", "Ann Lee", "ann@example.com"),
        ("Dr. Ann Lee (sales) <ann@example.com>", "Dr. Ann Lee (sales)", "ann@example.com"),
        ("Änne<ann@example.com>", "Änne", "ann@example.com"),
        ('"Lee, Ann" <ann@example.com>', "Lee, Ann", "ann@example.com"),
        (r'"Ann \"the\" \\ Lee" <ann@example.com>', r'Ann "the" \ Lee', "ann@example.com"),
        ('"ann@example.com" <ann@example.com>', "ann@example.com", "ann@example.com"),
        ("jürgen@example.com", "", "jürgen@example.com"),
        ("ann@münchen.example", "", "ann@xn--mnchen-3ya.example"),
        ("ann@faß.example", "", "ann@xn--fa-hia.example"),
        ("ann@例え。テスト", "", "ann@xn--r8jz45g.xn--zckzah"),
        ("root@localhost", "", "root@localhost"),
        ("verify@penstock-verify.invalid", "", "verify@penstock-verify.invalid"),
        ("x" * 64 + "@example.com", "", "x" * 64 + "@example.com"),
    ],
)
def test_one_address_is_taken_apart(text: str, name: str, address: str) -> None:
    """The name as people read it, the address as it goes over the line."""
    box = read_mailbox(text)
    assert (box.name, box.address) == (name, address)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "ann", "@", "ann@", "@example.com", "ann@@example.com", "ann@b@example.com",
        # quotes, comments, literals: rarely meant, and not every server takes them
        '"ann lee"@example.com', '"ann"@example.com', "ann(comment)@example.com", "ann@[127.0.0.1]", "ann@[IPv6:::1]",
        # several
        "ann@example.com,ben@example.com", "ann@example.com; ben@example.com", "ann@example.com ben@example.com",
        "Ann <ann@example.com>, Ben <ben@example.com>", "Ann <ann@example.com> <ben@example.com>",
        "friends: ann@example.com;", "Lee, Ann <ann@example.com>", "ben@example.com <ann@example.com>",
        "<ann@example.com> SIZE=1", "ann@example.com SIZE=1", "Ann <ann@example.com", "ann@example.com>",
        # line breaks and their kin
        "ann@example.com\r\nBcc: eve@example.com", "ann@example.com\n", "ann\0@example.com", "A\x85 <ann@example.com>",
        "Ann\u2028 <ann@example.com>", "Ann\u202e <ann@example.com>", "ann@exa\u200bmple.com", "ann@example.com\x7f",
        # dots, blanks and what looks like one
        ".ann@example.com", "ann.@example.com", "a..b@example.com", " ann@example.com", "ann @example.com",
        "ann\u00a0lee@example.com", "ann\u3000@example.com",
        # domains
        "ann@-example.com", "ann@example-.com", "ann@.example.com", "ann@example.com.", "ann@example..com",
        "ann@exa_mple.com", "ann@" + "x" * 64 + ".com", "ann@☃.example", "ann@ü" + "x" * 60 + ".example",
        "ann@\u0301a.example", "ann@\uff20example.com",
        # too long
        "x" * 65 + "@example.com", "ü" * 33 + "@example.com", "a@" + "x.y." * 63 + "com", f'"{"n" * 201}" <a@b.c>',
        "x" * 400,
        # what mail programs would decode into something else
        "=?utf-8?q?eve?=@example.com", "=?utf-8?q?=3Ceve=40example.com=3E?= <ann@example.com>",
    ],
)  # fmt: skip
def test_what_is_not_one_address_says_why(text: str) -> None:
    """Without a word of it: errors stand in logs."""
    with pytest.raises(BadContact) as refused:
        read_mailbox(text)
    assert "eve" not in str(refused.value)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("text", ["Ann <ann@example.com>", "<ann@example.com>", '"A" <ann@example.com>'])
def test_a_name_is_refused_where_only_an_address_will_do(text: str) -> None:
    """It says what to leave out."""
    with pytest.raises(BadContact, match="without a name"):
        read_mailbox(text, may_be_named=False)


@given(st.text(LETTERS, max_size=60) | st.text(max_size=340))
def test_whatever_is_taken_is_one_address_of_a_good_length(text: str) -> None:
    """Read again it is the same; it ends no line, and fits where it is written."""
    try:
        box = read_mailbox(text)
    except BadContact:
        return
    assert read_mailbox(box.address, may_be_named=False).address == box.address
    assert box.domain.isascii()
    assert len(box.address.encode()) <= MAX_ADDRESS_BYTES
    assert box.name.isprintable()
    assert not set(box.address) & set(' <>,;:"()[]\\\r\n\0')
    assert repr(box).find(box.local) < 0 or len(box.local) < 3


@pytest.mark.parametrize("text", ["+15005550006", "+1234567", "+123456789012345"])
def test_a_number_is_one_of_e164(text: str) -> None:
    """And may send, too."""
    assert read_number(text) == read_sender(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "15005550006",
        "+0123456789",
        "+123456",
        "+1234567890123456",
        "+1500 555 0006",
        "+15005550006\n",
        "+١٥٠٠٥٥٥٠٠٠٦",
    ],
)
def test_what_is_no_number_says_how_one_looks(text: str) -> None:
    """Other digits are none."""
    with pytest.raises(BadContact, match=r"E\.164"):
        read_number(text)


@pytest.mark.parametrize(
    "text", ["12345", "My Shop", "A&B-1_2.3", "MG" + "0a" * 16, "MG" + "0A" * 16, "MG" + "aB" * 16, "MG12"]
)
def test_a_sender_may_be_a_short_code_a_name_or_a_service(text: str) -> None:
    """Twilio's ids have capital letters in front, and hexadecimal digits of either kind behind."""
    assert read_sender(text) == text
    assert is_service(text) == (len(text) == 34)


@pytest.mark.parametrize(
    "text", ["", "12", "123456789", "A name of many letters", "Änne", "mg" + "0a" * 16, "MG" + "0g" * 16]
)
def test_who_cannot_send_is_refused(text: str) -> None:
    """A service's id that is misspelt is no name either: it is too long."""
    with pytest.raises(BadContact, match="MG"):
        read_sender(text)
