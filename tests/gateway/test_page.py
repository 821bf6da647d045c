"""The documentation page: everything is in it, and it asks nobody outside."""

from __future__ import annotations

import re

import pytest

from gateway import page
from gateway.app import operations
from tests.browser.chromium import needs_chromium, tab
from tests.gateway.conftest import Running
from tests.gateway.fake import completed

DESCRIBED = [(row.method, row.path) for row in operations() if row.path not in {"/openapi.json", "/docs"}]
OPERATIONS_SHOWN = """
[...document.querySelectorAll("main summary")].filter(line => line.querySelector("b"))
    .map(line => [line.querySelector("b").innerText, line.querySelector("code").innerText])
"""
FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"


async def test_the_policy_forbids_whatever_is_not_in_the_page(gateway: Running) -> None:
    """Style and script are named by their hashes, nothing may be loaded, nobody may frame it."""
    reply = await gateway.http.get("/docs")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
    assert (policy.pop("default-src"), policy.pop("connect-src")) == ("'none'", "'self'")
    assert all(re.fullmatch("'sha256-[^']+'", policy.pop(kind)) for kind in ("style-src", "script-src"))
    assert set(policy.values()) == {"'none'"}
    assert "frame-ancestors" in policy
    assert re.findall(r'\b(?:src|srcset|data)=|url\(|@import|href="(?![/#])', reply.text) == []


async def test_the_page_names_every_operation_and_every_model(gateway: Running) -> None:
    """It is made from the description, and needs no script for it."""
    text = (await gateway.http.get("/docs")).text
    described = (await gateway.http.get("/openapi.json")).json()
    for path, methods in described["paths"].items():
        for operation in methods.values():
            assert f'id="{operation["operationId"]}"' in text
        assert f"<code>{path}</code>" in text
    links = set(re.findall(r'href="#(\w+)"', text))
    assert links == {name for name in described["components"]["schemas"] if name in links}
    assert {"QueryRequest", "QueryAnswer", "ErrorAnswer"} <= links
    assert set(described["components"]["schemas"]) <= set(re.findall(r'id="(\w+)"', text))


def test_text_of_the_description_cannot_become_markup() -> None:
    """Whatever a docstring, a name or an example holds is shown as it is."""
    bad = "<script>x</script>"
    schema = {"type": "string", "default": bad, "description": bad, "pattern": bad}
    operation = {
        "operationId": bad,
        "summary": bad,
        "description": f"{bad}\n\n`{bad}`",
        "tags": [bad],
        "parameters": [{"name": bad, "in": "path", "required": True, "description": bad, "schema": schema}],
        "requestBody": {"content": {"application/json": {"schema": {"enum": [bad]}, "example": {"a": bad}}}},
        "responses": {"200": {"description": bad, "content": {bad: {"schema": {}}}}},
    }
    made = page.render(
        {
            "info": {"title": bad, "version": bad, "description": bad},
            "paths": {bad: {"get": operation}},
            "components": {"schemas": {bad: {"description": bad, "properties": {bad: schema}}}},
        }
    ).decode()
    assert bad not in made
    assert made.count("&lt;script&gt;x&lt;/script&gt;") > 15


@needs_chromium
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["desktop", "phone"])
async def test_a_browser_without_an_outside_shows_the_page(gateway: Running, width: int, height: int) -> None:
    """Every operation stands there, nothing is asked for but the page, nothing is refused, and it fits its window."""
    address = str(gateway.http.base_url.join("/docs"))
    async with tab() as browser:
        await browser.open(address, width=width, height=height)
        assert sorted(map(tuple, await browser.value(OPERATIONS_SHOWN))) == sorted(DESCRIBED)
        assert await browser.value("getComputedStyle(document.body).maxWidth") == "960px", "the style is not applied"
        assert browser.requests == [address]
        await browser.value("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert await browser.value(FITS)
        assert browser.complaints == []


@needs_chromium
async def test_an_operation_can_be_tried_from_the_page(gateway: Running) -> None:
    """The form sends its example to this gateway and shows the answer."""
    gateway.front.answer = completed
    async with tab() as browser:
        await browser.open(str(gateway.http.base_url.join("/docs")))
        await browser.value("asking = document.getElementById('post_query'); asking.querySelector('button').click()")
        await browser.until("asking.querySelector('output').textContent.startsWith('200')")
        assert "asyncio.Queue is a queue" in await browser.value("asking.querySelector('output').textContent")
        await browser.value("looking = document.getElementById('get_query_job_id'); null")
        await browser.value("looking.querySelector('input').value = 'a/b'; looking.querySelector('button').click()")
        await browser.until("looking.querySelector('output').textContent.startsWith('404')")
        assert browser.requests[-1].endswith("/query/a%2Fb")
    (live,) = gateway.front.jobs.values()
    assert live.job.payload == {"query": "What happens to a job when its worker dies?"}
