"""PDF files made by hand, so that each says exactly what its test needs."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

NOTHING = b"0 0 m 10 10 l S"  # a line: a page as scanners make it, with something on it and no text


def words(*lines: str) -> bytes:
    """Return the content of a page that shows *lines*."""
    shown = b" T* ".join(b"(" + line.encode("latin-1") + b") Tj" for line in lines)
    return b"BT /F1 12 Tf 14 TL 72 720 Td " + shown + b" ET"


def pdf(*contents: bytes, title: str = "", trailer: bytes = b"", filters: Sequence[bytes] = ()) -> bytes:
    """Return a PDF with one page for each of *contents*.

    Args:
        filters: what the contents are packed with.
        trailer: more of the trailer's dictionary.
    """
    count = len(contents)
    pages = b" ".join(b"%d 0 R" % (5 + 2 * number) for number in range(count))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Count %d /Kids [%s] >>" % (count, pages),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        b"<< /Title (%s) >>" % title.encode("latin-1"),
    ]
    packed = b"/Filter [" + b" ".join(filters) + b"] " if filters else b""
    for number, content in enumerate(contents):
        objects += [
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % (6 + 2 * number),
            b"<< %s/Length %d >>\nstream\n%s\nendstream" % (packed, len(content), content),
        ]
    data = bytearray(b"%PDF-1.4\n")
    places = []
    for number, text in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, text)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    start = len(data)
    data += b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, table)
    data += b"trailer\n<< /Size %d /Root 1 0 R /Info 4 0 R %s >>\n" % (len(objects) + 1, trailer)
    return bytes(data + b"startxref\n%d\n%%%%EOF\n" % start)


def protected() -> bytes:
    """Return a PDF that asks for a password."""
    secret = b"<" + b"5a" * 32 + b">"
    lock = b"/Encrypt << /Filter /Standard /V 1 /R 2 /O %s /U %s /P -4 >> /ID [%s %s]"
    return pdf(words("secret"), trailer=lock % (secret, secret, secret, secret))


def bomb(inflated_mib: int) -> bytes:
    """Return a small PDF whose one page grows to so many MiB when it is unpacked."""
    packer = zlib.compressobj(1)
    zeros = bytes(1 << 20)
    packed = b"".join(packer.compress(zeros) for _ in range(inflated_mib)) + packer.flush()
    return pdf(zlib.compress(packed), filters=(b"/FlateDecode", b"/FlateDecode"))
