"""Promotions that meet, die in the middle, or are tampered with, on a real MLflow database."""

import multiprocessing
from collections import Counter

import pytest

from minga.training.errors import ConflictError, VerdictError
from minga.training.promotions import SUFFIX, Ledger
from minga.training.registry import CHAMPION, Registry
from minga.training.signing import Keyring

NUM_PEOPLE = 3
PATIENCE_S = 120


def promote_at_once(uri, key_file, version, barrier, told):
    """One person's `minga model promote`, in a process of its own."""
    keyring = Keyring.open(key_file)
    registry = Registry(uri, keyring=lambda: keyring)
    registry.get("blobs", version)  # loaded and connected
    barrier.wait(PATIENCE_S)
    try:
        registry.promote("blobs", version)
        told.put((version, "won", ""))
    except ConflictError as error:
        told.put((version, "lost", str(error)))


@pytest.mark.slow
def test_of_people_who_promote_at_once_one_wins(registry, register, tracking_uri, key_file):
    """Each of several processes promotes its own version: one wins, all others are told by whom."""
    registry.promote("blobs", register().version)
    candidates = [register(champion=1).version for _ in range(NUM_PEOPLE)]
    spawn = multiprocessing.get_context("spawn")
    barrier, told = spawn.Barrier(NUM_PEOPLE), spawn.Queue()
    people = [
        spawn.Process(target=promote_at_once, args=(tracking_uri, key_file, one, barrier, told))
        for one in candidates
    ]
    for person in people:
        person.start()
    try:
        outcomes = [told.get(timeout=PATIENCE_S) for _ in people]
    finally:
        for person in people:
            person.join(PATIENCE_S)
            person.kill()
    assert Counter(outcome for _, outcome, _ in outcomes) == {"won": 1, "lost": NUM_PEOPLE - 1}
    (winner,) = [version for version, outcome, _ in outcomes if outcome == "won"]
    assert registry.get("blobs", CHAMPION).version == winner
    assert [one.version for one in registry.decisions("blobs")] == [1, winner]
    assert all(f"ersion {winner}" in words for _, outcome, words in outcomes if outcome == "lost")


@pytest.fixture
def ledger(registry, keyring):
    """The ledger of `blobs`."""
    return Ledger(registry._client, "blobs", keyring)


def append(registry, ledger, version, *, before, seen=None):
    """Add an entry as a promotion does, without moving the alias."""
    from minga.training.promotions import Decision

    found = registry.get("blobs", version)
    promotion = Decision(
        number=0,
        previous="",
        model="blobs",
        version=version,
        bundle_sha256=found.digests.bundle,
        champion_before=before,
        by="ann",
        at="2026-11-23",
    )
    entries = ledger.entries() if seen is None else seen
    ledger.append(entries, promotion, source=registry._source(found), run_id=found.run_id)


def test_entry_that_comes_too_late_is_void(registry, register, ledger):
    """Who decided before another entry was there is told; the entry stays and counts nothing."""
    versions = [register().version for _ in range(3)]
    seen = ledger.entries()
    append(registry, ledger, versions[0], before=None, seen=seen)
    with pytest.raises(ConflictError, match="version 1 was promoted by ann in the same moment"):
        append(registry, ledger, versions[1], before=None, seen=seen)
    append(registry, ledger, versions[2], before=1)
    assert [entry.number for entry in ledger.entries()] == [1, 2, 3]
    assert [one.version for one in registry.decisions("blobs")] == [1, 3]


def test_promotion_that_died_in_the_middle_counts(registry, register, ledger):
    """An entry whose process died before the alias moved is what the next one meets."""
    first, second, third, fourth = (register(champion=judged) for judged in (None, 1, 1, 2))
    registry.promote("blobs", first.version)
    append(registry, ledger, second.version, before=1)  # and no alias
    with pytest.raises(ConflictError, match="version 2 is champion"):
        registry.promote("blobs", third.version)
    assert registry.promote("blobs", fourth.version).aliases == ("champion",)


@pytest.fixture
def stranger(tmp_path):
    """A key that nobody trusts."""
    return Keyring.open(tmp_path / "stranger.pem")


@pytest.mark.parametrize("forgery", ["stranger", "deleted", "swapped"])
def test_altered_ledger_is_noticed(registry, register, ledger, stranger, forgery):
    """An entry by a stranger, one that is gone, and one in another's place are each refused."""
    for judged in (None, 1, 2):
        registry.promote("blobs", register(champion=judged).version)
    client, name = registry._client, "blobs" + SUFFIX
    entries = ledger.entries()
    if forgery == "stranger":
        payload = (
            entries[1].read(ledger._keyring).model_copy(update={"version": 3}).model_dump_json()
        )
        forged = stranger.sign("application/vnd.minga.promotion+json", payload.encode())
        client.set_model_version_tag(name, "2", "minga.promotion", forged)
    elif forgery == "deleted":
        client.delete_model_version(name, "2")
    else:
        client.set_model_version_tag(name, "2", "minga.promotion", entries[0].envelope)
    with pytest.raises(VerdictError):
        registry.decisions("blobs")
    with pytest.raises(VerdictError):
        registry.promote("blobs", 1)


def test_ledger_is_no_model(registry, register):
    """Listings show models only."""
    registry.promote("blobs", register().version)
    assert registry.names() == ("blobs",)
