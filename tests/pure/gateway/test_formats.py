"""What is read out of HTML and PDF."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.formats import MAX_TEXT_BYTES, Text, Unreadable, decode_html, read_html, read_pdf
from tests.pdfs import NOTHING, pdf, protected, words

PAGE = """<!doctype html><html><head><title>Harbour &amp; tides</title><style>p { color: red }</style></head>
<body><nav><ul><li>Home</ul></nav>
<main><h1>The  Harbour</h1><p>The <b>harbour</b> master<br>keeps <a href="/x">seventeen</a>
lanterns.</p><h2>Tides</h2><ul><li>High<ul><li>very</ul><li><p>Low</p></ul>
<pre><code># no heading
x  = 1
</code></pre>
<table><tr><th>name<th>count<tr><td><p>lantern</p><td>17</table>
<p hidden>secret</p><script>alert("<p>x</p>")</script><p># no heading either
</main><footer>Imprint</footer></body></html>"""

MARKDOWN = """# The Harbour

The harbour master
keeps seventeen lanterns.

## Tides

- High
  - very
- Low

```
# no heading
x  = 1
```

name | count
lantern | 17

\\# no heading either"""


# --- HTML --------------------------------------------------------------------------------------


def test_a_page_becomes_markdown_without_what_surrounds_its_content() -> None:
    """Headings, lists, code and rows stay what they are; navigation, scripts and hidden parts go."""
    assert read_html(PAGE.encode()) == Text(MARKDOWN, "The Harbour")


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<h1></h1><p>After.", "After."),
        ("<h2><img src=logo.png></h2><ul><li>One</ul>", "- One"),
        ("<h1>&#8203;</h1><h2>&nbsp;</h2><p>After.", "After."),
        ("<ul><li></li></ul><p>After.", "After."),
        ("<table><tr></tr></table><p>One<p>Two", "One\n\nTwo"),
        ("<h1><div>Head</div></h1><p>After.", "# Head\n\nAfter."),
        ("<ul><li><div></div><div>One</div></li></ul><p>After.", "- One\n\nAfter."),
    ],
)
def test_an_empty_tag_makes_nothing_of_what_follows(page: str, text: str) -> None:
    """An empty heading is none: pages have them where a logo stands."""
    assert read_html(page.encode()).text == text


@pytest.mark.parametrize(
    ("page", "title"),
    [
        ("<title>Tides</title><nav><h1>Menu</h1></nav><main><p>x</main>", "Tides"),
        ("<title>Tides</title><header><h1>The Site</h1></header><main><h1>Low tide</h1><p>x</main>", "Low tide"),
        ("<title>Tides</title><header><h1>The Site</h1></header><main><p>x</main>", "Tides"),
        ("<title>Tides</title><div role=navigation><h1>Menu</h1></div><p>x", "Tides"),
        ("<title>Tides</title><h1 hidden>Not shown</h1><p>x", "Tides"),
        ("<title>Tides</title><h1 style='color:red; display : none'>Not shown</h1><p>x", "Tides"),
        ("<title>Tides</title><h1></h1><p>x", "Tides"),
        ("<title>Tides</title><h1> </h1><h1>Low tide</h1>", "Low tide"),
        ("<h1>Low<script>var x</script><br>tide<a href=#tide>\N{PILCROW SIGN}</a></h1><p>x", "Low tide"),
        ("<svg><title>Icon</title></svg><p>x", ""),
        ("<header><h1>By header</h1></header><p>x", "By header"),
    ],
)
def test_the_title_is_the_documents_own(page: str, title: str) -> None:
    """Not the menu's, not the site's above the content, not one that nobody sees, and without what is no word of it."""
    assert read_html(page.encode()).title == title


def test_a_link_to_itself_is_no_word_of_a_heading() -> None:
    """Most documentation on the web has one behind each."""
    page = '<h1>Low<br>tide<a href="#t">\N{PILCROW SIGN}</a></h1><p>See <a href="#t">#1</a>.'
    assert read_html(page.encode()).text == "# Low tide\n\nSee #1."


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>one<br># two", "one\n\\# two"),
        ("<p>```<p># x", "\\```\n\n\\# x"),
        ("<p>one<br>====<p>two<br>--", "one\n\\====\n\ntwo\n\\--"),
        ("<p>#1 of 3 - two<p>- dash", "#1 of 3 - two\n\n- dash"),
    ],
)
def test_text_cannot_become_a_heading_or_code(page: str, text: str) -> None:
    """A fence in a paragraph would hide all headings after it."""
    assert read_html(page.encode()).text == text


def test_a_page_without_a_heading_is_called_by_its_title() -> None:
    """Otherwise by its first heading: titles carry the name of the site."""
    assert read_html(b"<title> The\ntitle </title><p>x").title == "The title"
    assert read_html(b"<p>x").title == ""


@pytest.mark.parametrize("page", [b"", b"<html></html>", b"<script>1</script><p> </p>", b"<img src=x>"])
def test_a_page_without_text_is_refused(page: bytes) -> None:
    """An empty document would be found by nothing."""
    with pytest.raises(Unreadable, match="holds no text"):
        read_html(page)


def test_an_empty_main_part_is_no_empty_page() -> None:
    """Some pages are filled around it."""
    assert read_html(b"<main></main><p>x").text == "x"


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("Käse".encode(), "Käse"),
        ("Käse".encode("cp1252"), "Käse"),
        (b"<meta charset=iso-8859-1>" + "Käse: 2 €".encode("cp1252"), "Käse: 2 €"),
        (b'<meta http-equiv="c" content="text/html; charset=shift_jis">' + "日本語".encode("shift_jis"), "日本語"),
        (b"\xef\xbb\xbf" + "Käse".encode(), "Käse"),
        ("Käse".encode("utf-16"), "Käse"),
        (b'<?xml version="1.0" encoding="koi8-r"?>' + "сыр".encode("koi8-r"), "сыр"),
    ],
)
def test_the_encoding_is_found(page: bytes, text: str) -> None:
    """Byte order mark, UTF-8, the name in the page, else Windows-1252, as browsers do."""
    assert read_html(page).text == text


@pytest.mark.parametrize("name", [b"utf-8", b"nosuch", b"shift_jis", b"rot13", b"hex"])
def test_a_page_that_is_not_what_it_says_is_refused(name: bytes) -> None:
    """Better left out than indexed as nonsense."""
    with pytest.raises(Unreadable, match=rf"not the {name.decode()} text that it says it is"):
        read_html(b"<meta charset=" + name + b"><p>\xff\xfe\xff")


def test_a_deeply_nested_page_is_read() -> None:
    """Tags that are never closed nest; nothing here calls itself for each."""
    assert read_html(b"<b><p>" * 2_000 + b"x").text == "x"


def test_a_page_of_too_much_text_is_refused() -> None:
    """The gateway would not take it."""
    with pytest.raises(Unreadable, match="more than 1 MiB of text"):
        read_html(b"x " * MAX_TEXT_BYTES)


@given(st.binary(max_size=200).map(lambda data: b"<p>" + data) | st.text(alphabet="<>/pre litd&#x0;b", max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes | str) -> None:
    """Never an error of another kind, and never a character that JSON or a prompt cannot hold."""
    try:
        text = read_html(data if isinstance(data, bytes) else data.encode()).text
    except Unreadable:
        return
    assert text.strip()
    assert "\0" not in text
    text.encode()


def test_utf_8_wins_over_what_the_page_says() -> None:
    """Pages that were converted often keep their old label."""
    assert decode_html(b"<meta charset=latin-1>" + "é".encode()).endswith("é")


# --- PDF ---------------------------------------------------------------------------------------


def read(folder: Path, data: bytes) -> Text:
    path = folder / "file.pdf"
    path.write_bytes(data)
    return read_pdf(path)


def test_a_pdf_becomes_text_page_by_page(tmp_path: Path) -> None:
    """Lines stay lines, pages stand apart, the title is the file's own."""
    read_text = read(
        tmp_path, pdf(words("Seventeen lanterns", "hang in the shed."), words("Low tide."), title="Harbour")
    )
    assert read_text == Text("Seventeen lanterns\nhang in the shed.\n\nLow tide.", "Harbour")


def test_a_title_that_is_no_text_is_no_reason_to_do_without_the_rest(tmp_path: Path) -> None:
    """Programs that cut titles cut characters in half."""
    half = "\xfe\xff\x00A\xd8\x00\x00B"  # UTF-16: A, half of a pair, B
    assert read(tmp_path, pdf(words("Low tide."), title=half)) == Text("Low tide.")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no PDF, or a damaged one"),
        (b"%PDF-1.7 and then nothing", "no PDF, or a damaged one"),
        (b"<html>not found</html>", "no PDF, or a damaged one"),
        (pdf(NOTHING, NOTHING), "holds no text on 2 pages: scanned, perhaps; run OCR on it first"),
        (protected(), "protected by a password: save it without one"),
    ],
    ids=["empty", "cut short", "html", "images", "password"],
)
def test_a_pdf_without_text_to_be_had_is_refused_with_a_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    """A reason that a person can act on."""
    with pytest.raises(Unreadable) as refusal:
        read(tmp_path, data)
    assert str(refusal.value) == reason


def test_a_pdf_of_too_much_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted page by page, so that a book of a million pages is not read to its end."""
    monkeypatch.setattr("gateway.formats.MAX_TEXT_BYTES", 20)
    assert read(tmp_path, pdf(words("Seventeen"), words("lanterns."))).text == "Seventeen\n\nlanterns."
    with pytest.raises(Unreadable, match="more than 1 MiB of text"):
        read(tmp_path, pdf(words("Seventeen"), words("lanterns."), words("And more.")))


def test_a_broken_page_is_told_and_the_others_are_read(tmp_path: Path) -> None:
    """One bad page of three hundred is no reason to do without the rest."""
    data = pdf(words("One."), words("Two."), words("Three."))
    read_text = read(tmp_path, data.replace(b"7 0 obj\n<< /Type /Page ", b"7 0 obj\n[] /Type /Page ", 1))
    assert read_text.text == "One.\n\nThree."
    assert read_text.note == "1 of 3 pages could not be read"
