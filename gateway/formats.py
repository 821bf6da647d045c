"""Text out of HTML and PDF files, with the structure that chunks are cut by: headings, paragraphs, lists, code, rows.

HTML becomes Markdown; what a page shows beside its content (navigation, scripts, hidden parts) is left out. A PDF
becomes plain text, page by page. Both libraries take whatever they are given, and some files make them take for ever
or fill the memory, so `gateway.extractor` calls this in a process of its own.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from selectolax.lexbor import LexborNode

MAX_TEXT_BYTES: Final = 1 << 20
"""Text of one document, at most: what the gateway takes in one request."""

HEADINGS: Final = {f"h{level}": level for level in range(1, 7)}
_BLOCKS: Final = frozenset(
    """
    address article aside blockquote body caption center dd details div dl dt fieldset figcaption figure form header hr
    li main ol p section summary table tbody tfoot thead tr ul
    """.split()  # noqa: SIM905 - thirty words in quotes and commas are no easier to read
)
_INLINE_IN_CELLS: Final = frozenset({"div", "p"})  # there they wrap a word or two; a row stays one line
_LEFT_OUT: Final = frozenset(
    """
    audio button canvas dialog footer head iframe input nav noscript object script select style svg template textarea
    video
    """.split()  # noqa: SIM905 - likewise
)
_PERMALINKS: Final = frozenset({"¶", "#", "§", "🔗"})  # all that many pages put behind a heading is a link to itself
_UNSEEN: Final = re.compile(r"(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*hidden)\b", re.IGNORECASE)
_MEANS_MORE: Final = re.compile(r"#{1,6}(?:\s|$)|`{3}|~{3}|(?:=+|-{2,})$")
"""How a line begins that Markdown takes for a heading, or for a fence: all up to the next one would be code."""
_BLANKS: Final = dict.fromkeys(map(ord, "\u200b\u2060\ufeff"))  # of no width: to `str.split` they are letters
_META_CHARSET: Final = re.compile(
    rb"""<(?:meta|\?xml)[^>]*?(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE
)
_SNIFFED: Final = 2048  # bytes in which a page names its encoding; HTML asks for 1024
_WESTERN: Final = "windows-1252"
_AS_WESTERN: Final = frozenset({_WESTERN, "iso-8859-1", "latin1", "latin-1", "ascii", "us-ascii"})  # as browsers do
_BOMS: Final = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_CONTROLS: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]")
_BROKEN_WORD: Final = re.compile("[\u00ad\ufffe\x02]\n?")  # what PDFium writes for a hyphen at the end of a line


class Unreadable(Exception):
    """There is no text to be had from the file; the message says why."""


@dataclass(frozen=True, slots=True)
class Text:
    """What a file says.

    Attributes:
        title: as the file names itself; empty where it does not.
        note: what is missing from the text, for people; empty where nothing is.
        digest: SHA-256 of the file as it was read; empty where nobody looked.
    """

    text: str
    title: str = ""
    note: str = ""
    digest: str = ""


# --- HTML --------------------------------------------------------------------------------------


def read_html(data: bytes) -> Text:
    """Return the content of a page as Markdown.

    Raises:
        Unreadable: it is in no encoding we can make out, or holds no text.
    """
    from selectolax.lexbor import LexborHTMLParser

    page = LexborHTMLParser(decode_html(data))
    text, title = "", ""
    for content in filter(None, (page.css_first("main, [role=main]"), page.body)):
        text, title = _markdown(content)
        if text:
            break
    if not text:
        raise Unreadable("holds no text")
    named = page.css_first("head > title")
    return Text(_bounded(text), title or (" ".join(named.text().split()) if named is not None else ""))


def decode_html(data: bytes) -> str:
    """Return a page as text: as its byte order mark says, else UTF-8 where it is that, else as it says itself.

    Windows-1252 is what browsers take where nothing is said.

    Raises:
        Unreadable: it is not in the encoding that it names.
    """
    encoding = next((encoding for mark, encoding in _BOMS if data.startswith(mark)), "")
    if not encoding:
        try:
            return data.decode()
        except UnicodeDecodeError:
            named = _META_CHARSET.search(data[:_SNIFFED])
            encoding = named[1].decode("ascii", "replace").lower() if named else _WESTERN
    try:
        return data.decode(_WESTERN, "replace") if encoding in _AS_WESTERN else data.decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise Unreadable(f"not the {encoding[:40]} text that it says it is") from error


def _markdown(root: LexborNode) -> tuple[str, str]:
    """Return what stands below *root*, and its first `h1`.

    Without recursion, since pages may be nested as deep as they like.
    """
    sheet = _Sheet()
    node: LexborNode | None = root
    depth = 0
    while node is not None:
        inner = node.child if sheet.enter(node) else None
        if inner is not None:
            node, depth = inner, depth + 1
            continue
        sheet.leave(node)
        while depth and node.next is None:
            node = node.parent
            assert node is not None
            depth -= 1
            sheet.leave(node)
        if not depth:
            break
        node = node.next
    return sheet.text(), sheet.title


class _Sheet:
    """Markdown in the making: finished blocks, and the words of the one at hand.

    Attributes:
        title: the first `h1` that holds words.
    """

    def __init__(self) -> None:
        self.title = ""
        self._blocks: list[tuple[str, str]] = []
        self._words: list[str] = []
        self._prefix = ""
        self._kind = ""
        self._lists = self._pre = self._cells = 0

    def enter(self, node: LexborNode) -> bool:
        """Note that *node* begins; say whether to look into it."""
        tag = node.tag or ""
        if node.is_text_node:
            self._words.append(node.text_content or "")
            return False
        if not node.is_element_node or tag in _LEFT_OUT or _is_hidden(node) or _is_permalink(node):
            return False
        if tag == "br":
            self._words.append("\n" if self._pre else "\v")
        elif tag == "pre":
            self._end_block()
            self._pre += 1
        elif tag in {"td", "th"}:
            self._cells += 1
            if any(word.strip() for word in self._words):
                self._words.append(" | ")
        elif self._is_block(tag):
            self._end_block()
            self._begin_block(tag)
        return True

    def leave(self, node: LexborNode) -> None:
        """Note that *node* ends."""
        tag = node.tag or ""
        if not node.is_element_node or tag in _LEFT_OUT or _is_hidden(node):
            return
        if tag == "pre":
            self._end_block()
            self._pre -= 1
        elif tag in {"td", "th"}:
            self._cells -= 1
        elif self._is_block(tag):
            self._end_block()
            if tag in {"ul", "ol"}:
                self._lists -= 1
            elif tag in HEADINGS or tag in {"li", "tr"}:
                self._prefix, self._kind = "", ""  # of an empty one: what follows is no heading and no item

    def text(self) -> str:
        """Return all of it."""
        self._end_block()
        parts: list[str] = []
        before = ""
        for kind, block in self._blocks:
            if parts:
                parts.append("\n" if kind and kind == before else "\n\n")  # items of a list and rows stand together
            parts.append(block)
            before = kind
        return "".join(parts)

    def _is_block(self, tag: str) -> bool:
        if self._pre:
            return False
        if self._cells and tag in _INLINE_IN_CELLS:
            self._words.append(" ")
            return False
        return tag in _BLOCKS or tag in HEADINGS

    def _begin_block(self, tag: str) -> None:
        if tag in HEADINGS:
            self._prefix, self._kind = "#" * HEADINGS[tag] + " ", ""
        elif tag in {"ul", "ol"}:
            self._lists += 1
        elif tag == "li":
            self._prefix, self._kind = "  " * max(0, self._lists - 1) + "- ", "item"
        elif tag == "tr":
            self._kind = "row"

    def _end_block(self) -> None:
        words, self._words = "".join(self._words), []
        if self._pre:
            text = _CONTROLS.sub("", words).strip("\n")
            if text.strip():
                fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
                self._blocks.append(("", f"{fence}\n{text}\n{fence}"))
            return
        lines = (" ".join(_CONTROLS.sub("", line).translate(_BLANKS).split()) for line in words.split("\v"))
        if self._prefix.startswith("#"):
            text = " ".join(line for line in lines if line)  # a heading is one line
            self.title = self.title or (text if self._prefix == "# " else "")
        else:
            text = "\n".join("\\" + line if _MEANS_MORE.match(line) else line for line in lines if line)
        if text:
            self._blocks.append((self._kind, self._prefix + text))
            self._prefix, self._kind = "", ""


def _is_hidden(node: LexborNode) -> bool:
    attributes = node.attributes
    return bool(attributes) and (
        "hidden" in attributes
        or attributes.get("aria-hidden") == "true"
        or attributes.get("role") == "navigation"
        or bool(_UNSEEN.search(attributes.get("style") or ""))
    )


def _is_permalink(node: LexborNode) -> bool:
    return node.tag == "a" and node.text(strip=True) in _PERMALINKS


# --- PDF ---------------------------------------------------------------------------------------


def read_pdf(path: Path) -> Text:
    """Return the text of a PDF, its pages apart by a blank line.

    Raises:
        Unreadable: no PDF, damaged, protected, or without text (scanned pages, say).
    """
    import pypdfium2
    from pypdfium2 import raw

    try:
        document = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        if error.err_code in {raw.FPDF_ERR_PASSWORD, raw.FPDF_ERR_SECURITY}:
            raise Unreadable("protected by a password: save it without one") from error
        raise Unreadable("no PDF, or a damaged one") from error
    pages: list[str] = []
    broken = size = 0
    for number in range(len(document)):
        try:
            text = _page_text(document, number)
        except pypdfium2.PdfiumError:
            broken += 1
            continue
        size += len(text)
        if size > MAX_TEXT_BYTES:
            _refuse_length()
        if text:
            pages.append(text)
    if not pages and broken:
        raise Unreadable(f"none of its {len(document)} pages can be read")
    if not pages:
        raise Unreadable(f"holds no text on {len(document)} pages: scanned, perhaps; run OCR on it first")
    try:
        title = " ".join(_CONTROLS.sub("", document.get_metadata_value("Title")).split())
    except UnicodeDecodeError:  # half a character: no reason to do without the text
        title = ""
    note = f"{broken} of {len(document)} pages could not be read" if broken else ""
    return Text(_bounded("\n\n".join(pages)), title, note)


def _page_text(document: object, number: int) -> str:
    page = document[number]  # type: ignore[index]  # pypdfium2 ships no types
    try:
        words = page.get_textpage()
        try:
            text = str(words.get_text_bounded())
        finally:
            words.close()
    finally:
        page.close()
    text = _BROKEN_WORD.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _CONTROLS.sub("", text).strip()


def _bounded(text: str) -> str:
    if len(text) > MAX_TEXT_BYTES:
        _refuse_length()
    return text


def _refuse_length() -> None:
    raise Unreadable("more than 1 MiB of text: split it")
