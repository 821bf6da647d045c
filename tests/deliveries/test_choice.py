"""Which provider carries what, and settings that cannot work."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, RetryLater
from pipeline.settings import load
from stages import delivery, providers
from stages.providers import TYPES, Attachment
from stages.providers.console import Console
from tests.deliveries.letters import PASSWORD, an_email, assert_discreet
from tests.deliveries.twilio import ACCOUNT_SID

PAGE = Path(__file__).parents[2] / "docs" / "PROVIDERS.md"
TWILIO = {"PENSTOCK_TWILIO__ACCOUNT_SID": ACCOUNT_SID, "PENSTOCK_TWILIO__AUTH_TOKEN": PASSWORD}
SMTP = {"PENSTOCK_SMTP__HOST": "mail.example"}


async def test_the_console_shows_a_message_on_one_line() -> None:
    """All of it but the bytes of files, and nothing that is not there."""
    out = io.StringIO()
    console = Console(out)
    await console.start()
    files = (
        Attachment("a.pdf", "application/pdf", b"1234"),
        Attachment("b.png", "image/png", None, "https://b.example"),
    )
    sent = await console.send(an_email(body="two\nlines", attachments=files))
    await console.stop()
    [line] = out.getvalue().splitlines()
    assert json.loads(line) == {
        "delivery": "0123456789abcdef0123456789abcdef",
        "type": "email",
        "from": "Shop <ann@shop.example>",
        "to": "bob@home.example",
        "subject": "Your order",
        "body": "two\nlines",
        "attachments": [
            {"filename": "a.pdf", "content_type": "application/pdf", "bytes": 4},
            {"filename": "b.png", "content_type": "image/png", "url": "https://b.example"},
        ],
    }
    assert sent.provider_id == "console-0123456789abcdef0123456789abcdef"


async def test_a_console_that_nobody_reads_any_more_is_away() -> None:
    """A line that may be printed twice is no message that may arrive twice."""

    class Closed(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    with pytest.raises(RetryLater) as caught:
        await Console(Closed()).send(an_email())
    assert (caught.value.code, caught.value.charged) == ("unreachable", False)


def test_without_settings_everything_goes_to_the_console() -> None:
    """One provider for all types, made once."""
    chosen = providers.chosen(load({}))
    assert set(chosen) == set(TYPES)
    assert len({id(one) for one in chosen.values()}) == 1
    assert isinstance(chosen["sms"], Console)


def test_each_type_has_the_provider_that_the_settings_name() -> None:
    """With the rate that its own settings give."""
    environ = {"SMS": "twilio", "MMS": "twilio", "EMAIL": "smtp"}
    named = {f"PENSTOCK_DELIVERIES__{kind}": name for kind, name in environ.items()}
    chosen = providers.chosen(load({**TWILIO, **SMTP, **named, "PENSTOCK_SMTP__PER_S": "7"}))
    assert {kind: one.name for kind, one in chosen.items()} == {"sms": "twilio", "mms": "twilio", "email": "smtp"}
    assert chosen["sms"] is chosen["mms"]
    assert (chosen["sms"].per_s, chosen["email"].per_s) == (0, 7)
    assert_discreet(*chosen.values())


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        (
            {"PENSTOCK_DELIVERIES__EMAIL": "twilio", **TWILIO},
            "PENSTOCK_DELIVERIES__EMAIL is twilio, which carries sms, mms",
        ),
        ({"PENSTOCK_DELIVERIES__SMS": "smtp", **SMTP}, "PENSTOCK_DELIVERIES__SMS is smtp, which carries email only"),
        ({"PENSTOCK_DELIVERIES__SMS": "pigeon"}, r"no provider called 'pigeon': stages/providers/pigeon\.py"),
        ({"PENSTOCK_DELIVERIES__EMAIL": "smtp"}, "PENSTOCK_SMTP__HOST is empty"),
        ({"PENSTOCK_DELIVERIES__SMS": "twilio"}, "PENSTOCK_TWILIO__ACCOUNT_SID is empty"),
        (
            {"PENSTOCK_DELIVERIES__SMS": "twilio", "PENSTOCK_TWILIO__ACCOUNT_SID": ACCOUNT_SID},
            "set PENSTOCK_TWILIO__AUTH_TOKEN",
        ),
        ({"PENSTOCK_DELIVERIES__SMS": "http"}, "PENSTOCK_HTTP_PROVIDER__URL is empty"),
    ],
)
def test_a_choice_that_cannot_work_is_told_at_start(environ: dict[str, str], says: str) -> None:
    """With the name of the setting that has to change."""
    settings = load(environ)
    with pytest.raises(ConfigError, match=says):
        providers.chosen(settings)


def test_the_defaults_let_every_hand_over_end_at_a_restart() -> None:
    """Whoever carries what."""
    named = {"PENSTOCK_DELIVERIES__SMS": "twilio", "PENSTOCK_DELIVERIES__EMAIL": "smtp"}
    assert delivery.build(load({**TWILIO, **SMTP, **named}))


@pytest.mark.parametrize(
    ("environ", "least"),
    [
        ({"PENSTOCK_DELIVERIES__SMS": "twilio", "PENSTOCK_TWILIO__TIMEOUT_S": "60", **TWILIO}, 65),
        ({"PENSTOCK_DELIVERIES__EMAIL": "smtp", **SMTP}, 240),
    ],
)
def test_a_stop_that_would_cut_off_a_hand_over_is_refused_at_start(environ: dict[str, str], least: int) -> None:
    """Nobody would know whether the message went out; `http` is given it again, and so may be cut off."""
    with pytest.raises(ConfigError, match=rf"DRAIN_S \({least - 1}\) is below the {least} s"):
        delivery.build(load({**environ, "PENSTOCK_DELIVERIES__DRAIN_S": str(least - 1)}))
    assert delivery.build(load({**environ, "PENSTOCK_DELIVERIES__DRAIN_S": str(least)}))
    own = {"PENSTOCK_DELIVERIES__SMS": "http", "PENSTOCK_HTTP_PROVIDER__URL": "http://127.0.0.1:1"}
    assert delivery.build(load({**own, "PENSTOCK_DELIVERIES__DRAIN_S": "0"}))


def test_the_page_names_every_code() -> None:
    """No provider knows another one, and a gateway of one's own may say those of refusals."""
    rows = re.findall(r"^\| (`[a-z_]+`(?:, `[a-z_]+`)*) \|", PAGE.read_text(), re.MULTILINE)
    found = {code for row in rows for code in re.findall(r"`([a-z_]+)`", row)}
    assert found - {"console", "smtp", "twilio", "http"} == providers.CODES


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({**SMTP, "PENSTOCK_SMTP__CONNECT_TIMEOUT_S": "120"}, "must be below give_timeout_s"),
        ({**SMTP, "PENSTOCK_SMTP__USERNAME": "ann"}, "username and password belong together"),
        ({**SMTP, "PENSTOCK_SMTP__PASSWORD": PASSWORD}, "username and password belong together"),
        (
            {**SMTP, "PENSTOCK_SMTP__USERNAME": "a", "PENSTOCK_SMTP__PASSWORD": PASSWORD, "PENSTOCK_SMTP__TLS": "none"},
            "tls is none, but mail.example is not this machine",
        ),
        ({"PENSTOCK_SMTP__HOST": "mail.example\r\nQUIT"}, "PENSTOCK_SMTP__HOST"),
        ({"PENSTOCK_TWILIO__AUTH_TOKEN": PASSWORD}, "account_sid is missing"),
        ({**TWILIO, "PENSTOCK_TWILIO__API_KEY_SID": "SK" + "0" * 32}, "api_key_sid and api_key_secret belong together"),
        ({**TWILIO, "PENSTOCK_TWILIO__API_KEY_SECRET": PASSWORD}, "api_key_sid and api_key_secret belong together"),
        ({**TWILIO, "PENSTOCK_TWILIO__API_URL": "http://api.twilio.com"}, "api_url is no https address"),
        ({**TWILIO, "PENSTOCK_TWILIO__API_URL": ""}, "api_url is empty"),
        ({"PENSTOCK_TWILIO__ACCOUNT_SID": "AC12/../.."}, "PENSTOCK_TWILIO__ACCOUNT_SID"),
        (
            {"PENSTOCK_HTTP_PROVIDER__URL": "http://gw.example", "PENSTOCK_HTTP_PROVIDER__API_KEY": PASSWORD},
            "url is no https address",
        ),
        ({"PENSTOCK_HTTP_PROVIDER__URL": f"https://ann:{PASSWORD}@gw.example"}, "must not hold a password"),
        ({"PENSTOCK_DELIVERIES__PUBLIC_URL": "https://us.example/?a=1"}, "nothing may follow the path"),
        ({"PENSTOCK_DELIVERIES__SMS": "../x"}, "PENSTOCK_DELIVERIES__SMS"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(environ: dict[str, str], says: str) -> None:
    """And no secret is shown."""
    with pytest.raises(ConfigError, match=says) as caught:
        load(environ)
    assert_discreet(caught.value)


def test_a_password_may_go_in_the_clear_within_this_machine() -> None:
    """A relay on loopback has no certificate."""
    for host in ("localhost", "127.0.0.1", "::1"):
        given = {"HOST": host, "USERNAME": "ann", "PASSWORD": PASSWORD, "TLS": "none"}
        assert load({f"PENSTOCK_SMTP__{name}": value for name, value in given.items()}).smtp.tls == "none"


@pytest.mark.parametrize(
    ("name", "public_url", "expected"),
    [
        ("twilio", "https://us.example/base/", "https://us.example/base/api/v1/webhooks/twilio?delivery=abc"),
        ("twilio", "", None),
        ("console", "https://us.example", None),
    ],
)
def test_a_provider_that_calls_back_is_told_where(name: str, public_url: str, expected: str | None) -> None:
    """If we can be reached at all."""
    assert providers.callback_url(providers.build(name, load(TWILIO)), "abc", public_url) == expected
