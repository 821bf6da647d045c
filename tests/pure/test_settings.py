"""Settings: every wrong field is named at once, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from pipeline.errors import ConfigError
from pipeline.settings import ALIASES, PREFIX, Settings, load, names


def complaint(environ: dict[str, str]) -> str:
    """Return what the operator is told."""
    with pytest.raises(ConfigError) as caught:
        load(environ)
    return str(caught.value)


def test_defaults_work_and_are_the_promised_ones() -> None:
    """An empty environment, and one with names that are no business of ours."""
    settings = load({"PATH": "/bin", "PENSTOCKADE": "x", "penstock_redis__url": "x"})
    assert settings == Settings()
    assert settings.worker.lease_s == 10
    assert settings.worker.renew_s == 0.9
    assert settings.worker.max_deliveries == 3
    assert settings.worker.completion_ttl_s == 60
    assert settings.retry.max_retries == 3
    assert settings.llm.slots == 16
    assert settings.lifetimes.query_s == 60
    assert settings.lifetimes.message_s == 24 * 3600


ADDRESSES = {"urls", "qdrant_url", "embeddings_url", "api_url", "public_url"}
FITTING = {
    "PENSTOCK_HISTORY__URL": "sqlite:///other",
    "PENSTOCK_IMAGES__URL": "http://other",
    "PENSTOCK_IMAGES__SIZE": "1x1",
    "PENSTOCK_HTTP_PROVIDER__URL": "http://other",
    "PENSTOCK_TWILIO__ACCOUNT_SID": "AC" + "0" * 32,
    "PENSTOCK_TWILIO__API_KEY_SID": "SK" + "0" * 32,
    "PENSTOCK_TWILIO__API_URL": "https://other",
}
ACCOUNT = {"PENSTOCK_TWILIO__ACCOUNT_SID": "AC" + "0" * 32}
NEEDED_BESIDE = {
    "PENSTOCK_ENCODER__EMBEDDINGS_URL": {"PENSTOCK_ENCODER__EMBEDDINGS_MODEL": "x"},
    "PENSTOCK_SMTP__USERNAME": {"PENSTOCK_SMTP__PASSWORD": "x"},
    "PENSTOCK_SMTP__PASSWORD": {"PENSTOCK_SMTP__USERNAME": "x"},
    "PENSTOCK_TWILIO__AUTH_TOKEN": ACCOUNT,
    "PENSTOCK_TWILIO__API_KEY_SID": {"PENSTOCK_TWILIO__API_KEY_SECRET": "x", **ACCOUNT},
    "PENSTOCK_TWILIO__API_KEY_SECRET": {"PENSTOCK_TWILIO__API_KEY_SID": "SK" + "0" * 32, **ACCOUNT},
}


@pytest.mark.parametrize("name", names())
def test_every_setting_is_read_from_its_name(name: str) -> None:
    """A value that no field takes is reported under that name, so the name is known."""
    section, field = name.removeprefix(PREFIX).lower().split("__")
    default = getattr(getattr(Settings(), section), field)
    if isinstance(default, (str, Path, tuple, SecretStr)) or default is None:
        if field in {"policy", "level", "format", "tls"}:
            complaint({name: "no such choice"})
        else:
            load({name: FITTING.get(name, "http://x" if field in ADDRESSES else "x")} | NEEDED_BESIDE.get(name, {}))
    else:
        assert name in complaint({name: "no number"})


def test_all_wrong_fields_are_named_at_once() -> None:
    """The operator corrects them in one go."""
    text = complaint(
        {
            "PENSTOCK_WORKER__LEASE_S": "0.1",
            "PENSTOCK_WORKER__MAX_DELIVERIES": "many",
            "PENSTOCK_LLM__TEMPERATURE": "9",
            "PENSTOCK_LLM__URLS": "http://one, ftp://two",
            "PENSTOCK_REDIS_URL": "redis://x",
            "PENSTOCK_WORKER__LEASES": "1",
            "PENSTOCK_NOTHING": "1",
        }
    )
    for name in (
        "PENSTOCK_WORKER__LEASE_S", "PENSTOCK_WORKER__MAX_DELIVERIES", "PENSTOCK_LLM__TEMPERATURE", "PENSTOCK_LLM",
        "PENSTOCK_REDIS_URL", "PENSTOCK_WORKER__LEASES", "PENSTOCK_NOTHING",
    ):  # fmt: skip
        assert name in text, name


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("PENSTOCK_REDIS_URL", "PENSTOCK_REDIS__URL"),
        ("PENSTOCK_WORKER__LEASE", "PENSTOCK_WORKER__LEASE_S"),
        ("PENSTOCK_LLM__URL", "PENSTOCK_LLM__URLS"),
        ("PENSTOCK_CONFG", "PENSTOCK_CONFIG"),
    ],
)
def test_misspelt_name_is_refused_with_the_right_one(wrong: str, meant: str) -> None:
    """A setting that silently does nothing is worse than none."""
    assert f"{wrong}: no such setting; did you mean {meant}?" in complaint({wrong: "1"})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("REDIS_URL", "redis://there:1/2", "redis://there:1/2"),
        ("OLLAMA_URL", "http://ollama:11434/v1", ("http://ollama:11434/v1",)),
        ("LLM_URLS", "http://one, http://two?slots=3,", ("http://one", "http://two?slots=3")),
        ("LLM_MODEL", "qwen", "qwen"),
        ("LLM_SLOTS", "5", 5),
        ("OPENAI_API_KEY", "sk-1", SecretStr("sk-1")),
        ("QDRANT_URL", "http://one:6333", "http://one:6333"),
        ("QDRANT_API_KEY", "key-1", SecretStr("key-1")),
        ("WORKER_NAME", "w1", "w1"),
        ("MAX_RETRIES", "7", 7),
        ("DATABASE_URL", "postgres://me@there/history", "postgres://me@there/history"),
        ("REDIS_CACHE_TTL", "60", 60.0),
        ("SYNC_MESSAGE_PROCESSING", "true", True),
        ("PENSTOCK_API_KEYS", "a:1,b:2", ("a:1", "b:2")),
        ("TELEGRAM_BOT_TOKEN", "1:a", SecretStr("1:a")),
    ],
)
def test_names_from_elsewhere_are_honoured(name: str, text: str, value: object) -> None:
    """People have them already; our own name wins over them, an empty one says nothing."""
    section, field = ALIASES[name]
    assert getattr(getattr(load({name: text}), section), field) == value
    assert load({name: ""}) == Settings()
    if field not in {"slots", "max_retries", "input_ttl_s", "sync"}:
        ours = f"{PREFIX}{section.upper()}__{field.upper()}"
        chosen = load({name: text, ours: FITTING.get(ours, "http://other" if field in ADDRESSES else "other")})
        assert getattr(getattr(chosen, section), field) != value


def test_all_aliases_are_tested() -> None:
    """The table above is complete."""
    marker = test_names_from_elsewhere_are_honoured.pytestmark[0]  # type: ignore[attr-defined]  # pytest adds it
    assert {row[0] for row in marker.args[1]} == set(ALIASES)


def test_file_is_read_and_the_environment_wins(tmp_path: Path) -> None:
    """Command line over environment over file."""
    file = tmp_path / "penstock.toml"
    file.write_text('[worker]\nlease_s = 5\ndrain_s = 6\n[llm]\nurls = ["http://one"]\nslots = 2\n')
    environ = {"PENSTOCK_CONFIG": str(file), "PENSTOCK_WORKER__DRAIN_S": "7", "LLM_SLOTS": "3"}
    settings = load(environ, {"llm": {"slots": 4, "model": None}})
    assert (settings.worker.lease_s, settings.worker.drain_s) == (5, 7)
    assert (settings.llm.urls, settings.llm.slots, settings.llm.model) == (("http://one",), 4, "default")


@pytest.mark.parametrize(
    "content",
    [b"[worker", b"[worker]\nlease = 5\n", b"[nothing]\n", b"redis = 'x'\n", b"\xff", b"worker = [1]\n", None],
)
def test_broken_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """Also one that is not there; never with a stack trace."""
    file = tmp_path / "penstock.toml"
    if content is not None:
        file.write_bytes(content)
    complaint({"PENSTOCK_CONFIG": str(file), "REDIS_URL": "redis://x", "PENSTOCK_WORKER__DRAIN_S": "1"})


@pytest.mark.parametrize("name", ["QDRANT_URL", "PENSTOCK_ENCODER__EMBEDDINGS_URL"])
@pytest.mark.parametrize(
    "address",
    [
        *["127.0.0.1:6333", "redis://127.0.0.1", "http://", "http://host:port", "http://two words", "http://host:0"],
        *["http://bob:sesame@host", "http://sesame@host", "http://host/?sesame=1", "http://host/#sesame"],
    ],
)
def test_address_that_cannot_be_used_is_refused_and_not_repeated(name: str, address: str) -> None:
    """It may hold a password, and what is said at the start stands in logs."""
    with pytest.raises(ConfigError, match=r"_URL: ") as caught:
        load({name: address, "PENSTOCK_ENCODER__EMBEDDINGS_MODEL": "m"})
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    "environ",
    [
        {"PENSTOCK_RETRY__BASE_S": "31"},
        {"PENSTOCK_ENCODER__OVERLAP_TOKENS": "300"},
        {"LLM_URLS": "http://one:80/,HTTP://ONE?slots=2"},
        {"PENSTOCK_WORKER__LEASE_S": "0.9"},
        {"PENSTOCK_ENCODER__KEYWORDS": "false"},
        {"PENSTOCK_ENCODER__EMBEDDINGS_URL": "http://one"},
        {
            "PENSTOCK_ENCODER__EMBEDDINGS_URL": "http://one",
            "PENSTOCK_ENCODER__EMBEDDINGS_MODEL": "m",
            "PENSTOCK_ENCODER__SENTENCE_TRANSFORMER": "m",
        },
    ],
)
def test_fields_that_contradict_each_other_are_refused(environ: dict[str, str]) -> None:
    """Beside the fields they bind."""
    complaint(environ)


def test_lease_is_long_enough_for_owners_to_be_back_first() -> None:
    """After an outage a claimer waits for a lease at most, and an owner for one back-off before it tries again."""
    text = complaint({"PENSTOCK_WORKER__LEASE_S": "0.6", "PENSTOCK_REDIS__RECONNECT_CAP_S": "0.4"})
    assert "PENSTOCK_WORKER__LEASE_S (0.6)" in text
    assert "PENSTOCK_REDIS__RECONNECT_CAP_S (0.4)" in text
    load({"PENSTOCK_WORKER__LEASE_S": "0.6", "PENSTOCK_REDIS__RECONNECT_CAP_S": "0.3"})


@pytest.mark.parametrize(("reply_s", "waits_s"), [("60", 0.5), ("0.2", 0.2)])
def test_renewal_waits_a_third_of_a_lease_whatever_the_others_wait(reply_s: str, waits_s: float) -> None:
    """So no reply_timeout_s can cost a lease; a shorter one holds for the renewal too."""
    settings = load({"PENSTOCK_WORKER__LEASE_S": "1.5", "PENSTOCK_REDIS__REPLY_TIMEOUT_S": reply_s})
    assert settings.renew_timeout_s == waits_s
    assert settings.worker.renew_s + settings.renew_timeout_s < settings.worker.lease_s


def test_secrets_are_not_shown() -> None:
    """Settings end up in logs."""
    settings = load({"OPENAI_API_KEY": "sk-secret", "PENSTOCK_API_KEYS": "acme:very-secret"})
    assert "-secret" not in repr(settings)


def test_settings_are_frozen() -> None:
    """Read once, at start-up."""
    with pytest.raises(ValidationError):
        Settings().worker.lease_s = 1.0  # type: ignore[misc]  # the point


def test_qdrant_server_is_named_as_people_name_it() -> None:
    """`QDRANT_URL` and `QDRANT_API_KEY` are what its other users have set."""
    settings = load({"QDRANT_URL": "http://127.0.0.1:6333", "QDRANT_API_KEY": "secret"}).retriever
    assert settings.qdrant_url == "http://127.0.0.1:6333"
    assert settings.qdrant_api_key is not None
    assert "secret" not in repr(settings)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///history.db", "sqlite:////var/lib/history.db", "sqlite+aiosqlite:///x", "postgres://host/db",
        "postgresql://me:secret@host:5433/db?sslmode=require", "postgresql:///db?host=/run/postgresql&user=me",
        "postgresql+asyncpg://host/db?application_name=x",
    ],
)  # fmt: skip
def test_addresses_of_databases_are_taken_as_people_write_them(url: str) -> None:
    """The two spellings of PostgreSQL, with the driver or without; a file for SQLite."""
    assert load({"DATABASE_URL": url}).history.url == url


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("mysql://me:secret@host/db", "postgresql://user:password@host"),
        ("secret", "postgresql://user:password@host"),
        ("postgresql+psycopg2://me:secret@host/db", "postgresql://user:password@host"),
        ("sqlite://", "a file that all processes share"),
        ("sqlite:///:memory:", "a file that all processes share"),
        ("sqlite:///x?mode=secret", "a file that all processes share"),
        ("postgresql://me:secret@host:port/db", "host:5432"),
        (
            "postgresql://me:secret@host/db?ssl_mode=secret",
            "unknown after the `?`: ssl_mode; known are application_name",
        ),
    ],
)
def test_an_address_of_no_database_of_ours_is_refused_without_repeating_it(url: str, told: str) -> None:
    """It may hold a password; what to write in its place is said."""
    text = complaint({"DATABASE_URL": url})
    assert "PENSTOCK_HISTORY__URL" in text
    assert told in text
    assert "secret" not in text
