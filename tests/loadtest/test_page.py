"""The load tester's page as a browser shows it, on a desk and on a phone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from loadtest.page import page
from tests.browser.chromium import needs_chromium, tab
from tests.pure.loadtest.test_shown import a_report

if TYPE_CHECKING:
    from pathlib import Path

FITS = """[document.documentElement, ...document.querySelectorAll('.scroll')]
    .every(part => part.scrollWidth <= part.clientWidth)"""


@needs_chromium
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
async def test_a_browser_without_an_outside_shows_the_whole_page(width: int, height: int, tmp_path: Path) -> None:
    """Nothing is asked for, nothing is complained of, and no table has columns out of sight."""
    file = tmp_path / "report.html"
    file.write_text(page(a_report(2_000, "01932f0c-7d1e-7000-8000-0123456")), encoding="utf-8")
    async with tab() as browser:
        await browser.open(file.as_uri(), width=width, height=height)
        assert browser.requests == [file.as_uri()]
        assert await browser.value("document.querySelectorAll('svg').length") == 3
        assert await browser.value(FITS)
        assert browser.complaints == []
