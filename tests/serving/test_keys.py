"""API keys at rest: made, listed, revoked, expired, and never kept."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from minga.inference.access import Bucket, KeyFile
from minga.inference.errors import AccessError
from minga.inference.keys import KeyIndex, KeyRing, Permission, Role
from minga.serving.key_store import KeyStore

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


@pytest.fixture
def file(tmp_path):
    """Where keys are kept; the folder is made with the first."""
    return tmp_path / "state" / "keys.json"


def find(file, text, now=None):
    """Look a key up as a server does."""
    return KeyIndex(KeyRing.read(file)).find(text, now)


def test_a_key_opens_and_is_not_kept(file):
    """The file holds a hash, for its owner's eyes only; the key's own words are in none of it."""
    text, record = KeyStore(file).create("shop", role=Role.OPERATOR)
    assert find(file, text) == record
    content = file.read_text()
    assert text.split("_", 2)[2] not in content
    assert text not in content
    assert file.stat().st_mode & 0o777 == 0o600
    assert record.hash not in repr(record)


def test_keys_and_their_hashes_never_repeat(file, tmp_path):
    """Each key is drawn anew, and one secret has another hash in another file."""
    store = KeyStore(file)
    texts = {store.create(f"shop-{number}")[0] for number in range(50)}
    assert len(texts) == 50
    assert all(len(text) > 50 for text in texts)
    KeyStore(tmp_path / "other.json").create("shop")
    rings = KeyRing.read(file), KeyRing.read(tmp_path / "other.json")
    assert rings[0].hash_of("secret") != rings[1].hash_of("secret")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: "minga",
        lambda text: text[:-1],
        lambda text: text + "x",
        lambda text: text.upper(),
        lambda text: text.replace("minga_", "mingo_"),
        lambda text: text.rpartition("_")[0] + "_",
        lambda text: "minga_" + "0" * 12 + "_" + text.split("_", 2)[2],
        lambda text: text.split("_", 2)[2],
        lambda text: "é" + text,
    ],
    ids=[
        "empty",
        "prefix",
        "cut",
        "longer",
        "case",
        "other-prefix",
        "no-secret",
        "other-id",
        "secret-alone",
        "not-ascii",
    ],
)
def test_what_is_no_key_opens_nothing(change, file):
    """A key counts whole and unchanged, or not at all."""
    text, _ = KeyStore(file).create("shop")
    assert find(file, change(text)) is None


def test_a_key_counts_until_it_expires(file):
    """The last moment counts no more."""
    text, record = KeyStore(file, now=lambda: NOON).create("shop", days=2)
    assert record.expires_at == NOON + timedelta(days=2)
    assert find(file, text, NOON + timedelta(days=1.99))
    assert find(file, text, NOON + timedelta(days=2)) is None


def test_a_revoked_key_counts_no_more_and_stays_listed(file):
    """By name or id; its name is free again."""
    store = KeyStore(file, now=lambda: NOON)
    old, record = store.create("shop")
    assert store.revoke(record.id).revoked_at == NOON
    new, _ = store.create("shop")
    assert find(file, old, NOON) is None
    assert find(file, new, NOON)
    assert [state for _, state in store.list()] == ["revoked", "valid"]
    store.revoke("shop")
    assert [state for _, state in store.list()] == ["revoked", "revoked"]
    with pytest.raises(AccessError, match="no key 'shop' to revoke"):
        store.revoke("shop")


@pytest.mark.parametrize("name", ["", " ", "a\nb", "\x1b[2J", "n" * 101], ids=ascii)
def test_a_name_that_cannot_be_listed_is_refused(file, name):
    """A listing shows names, so none of them may end its line or speak to the terminal."""
    with pytest.raises(AccessError, match="is no name for a key"):
        KeyStore(file).create(name)
    assert not file.exists()


def test_two_keys_with_one_name_are_refused(file):
    """Who revokes by name must hit the key that is meant; an expired one blocks nothing."""
    KeyStore(file, now=lambda: NOON).create("shop", days=1)
    with pytest.raises(AccessError, match="already"):
        KeyStore(file, now=lambda: NOON).create("shop")
    KeyStore(file, now=lambda: NOON + timedelta(days=1)).create("shop")


def test_processes_that_make_keys_at_once_lose_none(file):
    """Changes take turns between processes too."""
    code = (
        "import sys; from pathlib import Path; from minga.serving.key_store import KeyStore\n"
        "for number in range(10): KeyStore(Path(sys.argv[1])).create(f'{sys.argv[2]}-{number}')"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(file), str(one)]) for one in range(3)
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(KeyStore(file).list()) == 30


@pytest.mark.parametrize("content", [b"", b"{}", b'{"version":2}', b"\xff"])
def test_a_file_that_is_none_is_refused_without_its_content(content, file):
    """The error names the file and shows nothing of it."""
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(AccessError, match="is no file of keys") as refused:
        KeyRing.read(file)
    assert "version" not in str(refused.value)


def test_a_file_that_is_not_there_is_one_clear_error(file):
    """With the command that makes it."""
    with pytest.raises(AccessError, match="minga key create"):
        KeyRing.read(file)


def test_a_server_notices_new_and_revoked_keys_within_a_second(file):
    """The file is looked at once a second, and read when it has changed."""
    seconds = [0.0]
    store = KeyStore(file)
    first, _ = store.create("first")
    keys = KeyFile(file, clock=lambda: seconds[0])
    second, _ = store.create("second")
    store.revoke("first")
    assert keys.find(first)
    seconds[0] = 1.0
    assert keys.find(first) is None
    assert keys.find(second)


@pytest.mark.parametrize("harm", ["gone", "broken"])
def test_without_a_readable_file_nobody_is_let_in(harm, file, caplog):
    """Who cannot be checked is not let in; with the file back, keys count again."""
    seconds = [0.0]
    text, _ = KeyStore(file).create("shop")
    keys = KeyFile(file, clock=lambda: seconds[0])
    content = file.read_bytes()
    if harm == "gone":
        file.unlink()
    else:
        file.write_text("{")
    seconds[0] = 1.0
    assert keys.find(text) is None
    assert "no key is let in" in caplog.text
    file.write_bytes(content)
    seconds[0] = 2.0
    assert keys.find(text)


def test_roles_may_what_their_names_say():
    """Callers ask, monitors look on, operators do both and manage."""
    assert Role.CALLER.permissions == {Permission.ASK}
    assert Role.MONITOR.permissions == {Permission.WATCH, Permission.METRICS}
    assert Role.OPERATOR.permissions == set(Permission)


def test_a_bucket_lets_its_rate_through_and_its_burst_at_once():
    """After a pause a burst, then the rate; a refusal tells the wait and costs nothing."""
    bucket = Bucket(requests_per_s=2, burst=3)
    assert [bucket.take(10.0) for _ in range(3)] == [0, 0, 0]
    assert bucket.take(10.0) == pytest.approx(0.5)
    assert bucket.take(10.4) == pytest.approx(0.1)
    assert bucket.take(10.5) == 0
    taken = sum(bucket.take(11 + step / 100) == 0 for step in range(1000))
    assert taken == pytest.approx(2 * 10 + 1, abs=1)
    assert [bucket.take(100.0) for _ in range(4)][:3] == [0, 0, 0]


def test_the_commands_make_list_and_revoke(file, capsys):
    """`minga key`: the key alone on stdout, listings without hashes, JSON for programs."""
    from minga.cli.app import main

    def run(*words):
        with pytest.raises(SystemExit) as ending:
            main(["key", *words, "--file", str(file)])
        return ending.value.code, capsys.readouterr()

    code, said = run("create", "shop", "--days", "90", "--rate", "2.5")
    assert not code
    text = said.out.strip()
    record = find(file, text)
    assert (record.name, record.requests_per_s, record.burst) == ("shop", 2.5, 3)
    assert "not shown again" in said.err
    _, said = run("list", "--json")
    (row,) = json.loads(said.out)
    assert (row["name"], row["state"], row["role"]) == ("shop", "valid", "caller")
    assert record.hash not in said.out
    _, said = run("list")
    assert "shop" in said.out
    code, said = run("revoke", "shop")
    assert not code
    assert find(file, text) is None
    code, said = run("revoke", "shop")
    assert code == 50
    assert "minga key list" in said.err
    assert text not in said.err
