"""Enrolment tokens: their text, their uses, and both stores under one contract."""

import base64
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Barrier

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minga.federation.coordinator.authority import Authority
from minga.federation.coordinator.token_table import MemoryTokens, TokenTable
from minga.federation.coordinator.tokens import Refusal, TokenIssuer, TokenStore
from minga.federation.enrolment_token import PREFIX, EnrolmentToken
from minga.federation.errors import EnrolmentError
from minga.federation.identity import utc_now

DIGEST, ALICE, BOB = b"t" * 32, b"a" * 32, b"b" * 32


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> TokenStore:
    """Each implementation of the store."""
    if request.param == "memory":
        return MemoryTokens()
    return TokenTable(sqlite3.connect(tmp_path / "tokens.db"))


def issuer_of(store: TokenStore, authority: Authority, **options: object) -> TokenIssuer:
    """Make an issuer over a store."""
    return TokenIssuer(
        store=store,
        enrol_address="127.0.0.1:7001",
        device_address="127.0.0.1:7002",
        authority_der=authority.pinned_der,
        **options,  # type: ignore[arg-type]
    )


# -- the store's contract ---------------------------------------------------------------------


def test_a_token_has_one_use(store: TokenStore) -> None:
    """The second key is refused; the first one may come again."""
    store.put(DIGEST, "plant-a", 100.0, 1)
    assert store.redeem(DIGEST, ALICE, 1.0) == "plant-a"
    assert store.redeem(DIGEST, BOB, 2.0) is Refusal.USED
    assert store.redeem(DIGEST, ALICE, 3.0) == "plant-a"


def test_a_token_expires(store: TokenStore) -> None:
    """At its end it is refused to everybody, used or not."""
    store.put(DIGEST, "plant-a", 100.0, 2)
    assert store.redeem(DIGEST, ALICE, 99.9) == "plant-a"
    assert store.redeem(DIGEST, ALICE, 100.0) is Refusal.EXPIRED
    assert store.redeem(DIGEST, BOB, 100.0) is Refusal.EXPIRED


def test_an_unknown_token_is_refused(store: TokenStore) -> None:
    """A hash that was never put."""
    assert store.redeem(DIGEST, ALICE, 1.0) is Refusal.UNKNOWN


def test_a_token_with_more_uses_counts_keys(store: TokenStore) -> None:
    """Two uses are two keys, however often they come."""
    store.put(DIGEST, "plant-a", 100.0, 2)
    for redeemer in (ALICE, ALICE, BOB, ALICE):
        assert store.redeem(DIGEST, redeemer, 1.0) == "plant-a"
    assert store.redeem(DIGEST, b"c" * 32, 1.0) is Refusal.USED


def test_redemptions_survive_a_restart(tmp_path: Path) -> None:
    """What SQLite acknowledged is known to the next process."""
    with sqlite3.connect(tmp_path / "tokens.db") as connection:
        table = TokenTable(connection)
        table.put(DIGEST, "plant-a", 100.0, 1)
        table.redeem(DIGEST, ALICE, 1.0)
    connection.close()
    again = TokenTable(sqlite3.connect(tmp_path / "tokens.db"))
    assert again.redeem(DIGEST, BOB, 2.0) is Refusal.USED
    assert again.redeem(DIGEST, ALICE, 2.0) == "plant-a"


@pytest.mark.parametrize("autocommit", [True, False], ids=["autocommit", "transactions"])
def test_of_two_at_once_one_wins(tmp_path: Path, autocommit: bool) -> None:
    """Sixteen connections redeem the last use of a token at the same time; one gets it."""
    path = tmp_path / "tokens.db"
    level = None if autocommit else "DEFERRED"
    TokenTable(sqlite3.connect(path)).put(DIGEST, "plant-a", 100.0, 1)
    barrier = Barrier(16)

    def redeem(number: int) -> str | Refusal:
        table = TokenTable(sqlite3.connect(path, timeout=30.0, isolation_level=level))
        barrier.wait()
        return table.redeem(DIGEST, bytes([number]) * 32, 1.0)

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(redeem, range(16)))
    assert results.count("plant-a") == 1
    assert results.count(Refusal.USED) == 15


# -- issuing and redeeming --------------------------------------------------------------------


def test_the_store_never_sees_the_secret(tmp_path: Path, authority: Authority) -> None:
    """The database holds a hash of it."""
    path = tmp_path / "tokens.db"
    text = issuer_of(TokenTable(sqlite3.connect(path)), authority).mint("a", timedelta(hours=1))
    secret = EnrolmentToken.parse(text).secret
    content = path.read_bytes()
    assert secret not in content
    assert secret.hex().encode() not in content
    assert base64.b64encode(secret) not in content


def test_a_refused_token_tells_why_and_what_to_do(store: TokenStore, authority: Authority) -> None:
    """Wrong, used and expired are three messages; none holds the secret."""
    issuer = issuer_of(store, authority)
    secret = EnrolmentToken.parse(issuer.mint("plant-a", timedelta(hours=1))).secret
    assert issuer.redeem(secret, ALICE) == "plant-a"
    later = issuer_of(store, authority, clock=lambda: utc_now() + timedelta(hours=2))
    for refused_by, attempt, message in [
        (issuer, b"x" * 32, "knows no such"),
        (issuer, secret, "was used already"),
        (later, secret, "has expired"),
    ]:
        with pytest.raises(EnrolmentError, match=message + ".*; ask the operator") as caught:
            refused_by.redeem(attempt, BOB)
        assert secret.hex() not in str(caught.value)


@pytest.mark.parametrize(
    ("group", "lifetime_s", "uses"),
    [("Plant A", 60, 1), ("a", 0, 1), ("a", -1, 1), ("a", 60, 0), ("a", 60, 10_001)],
)
def test_an_impossible_token_is_not_made(
    store: TokenStore, authority: Authority, group: str, lifetime_s: int, uses: int
) -> None:
    """Each wish is named with its value."""
    with pytest.raises(EnrolmentError):
        issuer_of(store, authority).mint(group, timedelta(seconds=lifetime_s), uses)


# -- the text ---------------------------------------------------------------------------------


@pytest.fixture
def text(authority: Authority) -> str:
    """A token's text."""
    return issuer_of(MemoryTokens(), authority).mint("plant-a", timedelta(hours=1))


def test_a_token_holds_all_that_a_device_needs(text: str, authority: Authority) -> None:
    """Addresses, secret and authority read back; blanks from copying do not matter."""
    token = EnrolmentToken.parse("\n  ".join([text[:70], text[70:200], text[200:]]) + "\n")
    assert token.enrol_address == "127.0.0.1:7001"
    assert token.device_address == "127.0.0.1:7002"
    assert token.authority == authority.certificate
    assert token.to_text() == text
    assert "secret" not in repr(token)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None
)
@given(data=st.data())
def test_a_changed_token_is_told(text: str, data: st.DataObject) -> None:
    """Any one character changed, lost or doubled is noticed before anything is dialled."""
    index = data.draw(st.integers(0, len(text) - 1))
    change = data.draw(st.sampled_from(["replace", "drop", "double", "truncate"]))
    other = data.draw(st.characters(codec="ascii", exclude_characters=text[index]))
    changed = {
        "replace": text[:index] + other + text[index + 1 :],
        "drop": text[:index] + text[index + 1 :],
        "double": text[:index] + text[index] + text[index:],
        "truncate": text[:index],
    }[change]
    with pytest.raises(EnrolmentError, match="token"):
        EnrolmentToken.parse(changed)


def encoded(json_text: str) -> str:
    """Dress a text up as a token."""
    return PREFIX + base64.urlsafe_b64encode(json_text.encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "minga-enrol-v2.abc",
        PREFIX,
        PREFIX + "!!!!",
        encoded("[]"),
        encoded("{}"),
        encoded('{"check": 1}'),
        encoded('"text"'),
        encoded("{" * 2000),
        PREFIX + "A" * 20_000,
    ],
)
def test_what_is_no_token_is_told(bad: str) -> None:
    """The message says what to do."""
    with pytest.raises(EnrolmentError, match="copy it again"):
        EnrolmentToken.parse(bad)


@pytest.mark.parametrize(
    "change",
    [{"secret": b"short"}, {"authority_der": b"\x30\x00"}],
    ids=["secret", "authority"],
)
def test_a_token_made_wrong_is_told(text: str, change: dict[str, bytes]) -> None:
    """Its check sum fits, but the secret is short or the certificate is none."""
    wrong = replace(EnrolmentToken.parse(text), **change)  # type: ignore[arg-type]
    with pytest.raises(EnrolmentError, match=r"garbled|pins no authority"):
        EnrolmentToken.parse(wrong.to_text())
