"""Approval by a second person, and the ways of getting around it, on a real MLflow database."""

import json

import pytest

from minga.training.approvals import KIND, TAG, Approval, Policy
from minga.training.errors import ApprovalError, GateError
from minga.training.registry import CHAMPION, Registry
from minga.training.signing import Keyring, keyid_of


@pytest.fixture(scope="session")
def people(tmp_path_factory, key_file):
    """Keys of four people who all trust each other; Ann is whose key registers versions."""
    folder = tmp_path_factory.mktemp("people")
    files = {"ann": key_file} | {name: folder / f"{name}.pem" for name in ("bob", "eve", "zoe")}
    keys = [Keyring.open(file).public_key for file in files.values()]
    return {name: Keyring.open(file, keys) for name, file in files.items()}


@pytest.fixture
def as_person(tracking_uri, people):
    """Opens the registry as one of them does."""

    def open_as(name, needed=1, approvers=()):
        policy = Policy(needed=needed, approvers=approvers)
        return Registry(tracking_uri, keyring=lambda: people[name], approvals=policy)

    return open_as


def put(registry, version, envelope, name="0123456789abcdef"):
    """Set an approval's tag by hand, as anybody who can write to MLflow may."""
    registry._client.set_model_version_tag("blobs", str(version.version), TAG + name, envelope)


def test_a_second_person_lets_it_pass(as_person, register):
    """Without an approval nobody promotes; with one of another person whoever wants to may."""
    version = register()
    with pytest.raises(ApprovalError, match=r"has 0 of 1 approvals.*minga model approve 1"):
        as_person("ann").promote("blobs", version.version)
    found = as_person("bob").approve("blobs", version.version, comment="read the card")
    assert [one.comment for one in found.counted.values()] == ["read the card"]
    assert as_person("ann").promote("blobs", version.version).aliases == (CHAMPION,)
    (decision,) = as_person("zoe").decisions("blobs")
    assert decision.approved_by == found.people


def test_each_key_counts_once(as_person, register, people):
    """Two approvals are those of two keys, however often one of them approves."""
    version = register()
    bob = as_person("bob", needed=2)
    bob.approve("blobs", version.version)
    bob.approve("blobs", version.version, comment="once more")
    again = bob.get("blobs", version.version).tags[TAG + keyid_of(people["bob"].public_key)]
    put(bob, version, again)
    with pytest.raises(ApprovalError, match="has 1 of 2 approvals"):
        bob.promote("blobs", version.version)
    as_person("zoe", needed=2).approve("blobs", version.version)
    assert bob.promote("blobs", version.version).aliases == (CHAMPION,)


def test_nobody_approves_what_they_registered(as_person, register, people):
    """The registrar's own approval is refused when it is given, and not counted if forced in."""
    version = register()
    ann = as_person("ann")
    with pytest.raises(ApprovalError, match="somebody else has to approve it"):
        ann.approve("blobs", version.version)
    put(ann, version, signed(people["ann"], version))
    with pytest.raises(ApprovalError, match="the key also registered or judged the version"):
        ann.promote("blobs", version.version)


def test_judging_it_anew_through_a_colleague_helps_nobody(as_person, register, people):
    """Who registered the same model before counts as its author, whoever judged it last."""
    first = register()
    authors = frozenset({people["ann"].public_key})
    version = register(by=people["bob"], authors=authors)
    for name in ("ann", "bob"):
        with pytest.raises(ApprovalError, match="somebody else"):
            as_person(name).approve("blobs", version.version)
    as_person("zoe").approve("blobs", version.version)
    assert as_person("zoe").promote("blobs", version.version).version == first.version + 1


def signed(keyring, of, **changes):
    """An approval of a version in its envelope, or of what is changed about it."""
    approval = Approval(
        model="blobs",
        version=of.version,
        bundle_sha256=of.digests.bundle,
        by="bob",
        at="2026-11-23",
    ).model_copy(update=changes)
    return keyring.sign(KIND, approval.model_dump_json().encode())


@pytest.mark.parametrize("attack", ["number", "files", "model", "kind", "altered", "stranger"])
def test_what_is_not_an_approval_of_this_version_does_not_count(
    as_person, register, people, attack, tmp_path
):
    """Approvals of another version, other files, another model, other statements, forgeries."""
    version, other = register(), register()
    bob, registry = people["bob"], as_person("ann")
    if attack == "kind":
        approval = json.loads(signed(bob, version))
        envelope = bob.sign("application/vnd.minga.promotion+json", approval["payload"].encode())
    elif attack == "altered":
        parts = json.loads(signed(bob, other))
        parts["payload"] = json.loads(signed(bob, version))["payload"]
        envelope = json.dumps(parts)
    elif attack == "stranger":
        envelope = signed(Keyring.open(tmp_path / "stranger.pem"), version)
    else:
        changes = {
            "number": {"version": other.version},
            "files": {"bundle_sha256": "0" * 64},
            "model": {"model": "other"},
        }[attack]
        envelope = signed(bob, version, **changes)
    put(registry, version, envelope)
    with pytest.raises(ApprovalError, match=r"has 0 of 1 approvals; not counted: "):
        registry.promote("blobs", version.version)
    put(registry, version, "no envelope at all", "other")
    with pytest.raises(ApprovalError, match="has 0 of 1 approvals"):
        registry.promote("blobs", version.version)


def test_a_revoked_key_counts_no_more(as_person, register, people, tracking_uri, key_file):
    """An approval by a key that was taken off the list since then is worth nothing."""
    version = register()
    as_person("eve").approve("blobs", version.version)
    still = [people[name].public_key for name in ("bob", "zoe")]
    keyring = Keyring.open(key_file, still)
    registry = Registry(tracking_uri, keyring=lambda: keyring, approvals=Policy(needed=1))
    with pytest.raises(ApprovalError, match="no trusted key"):
        registry.promote("blobs", version.version)


def test_only_named_approvers_count(as_person, register, people):
    """A machine's key that is trusted for verdicts approves nothing if approvers are named."""
    version = register()
    named = (people["zoe"].public_key,)
    with pytest.raises(ApprovalError, match="none of"):
        as_person("bob", approvers=named).approve("blobs", version.version)
    as_person("bob").approve("blobs", version.version)
    with pytest.raises(ApprovalError, match="has 0 of 1"):
        as_person("ann", approvers=named).promote("blobs", version.version)
    as_person("zoe", approvers=named).approve("blobs", version.version)
    assert as_person("ann", approvers=named).promote("blobs", version.version).aliases


def test_no_reason_stands_for_an_approval(as_person, register):
    """Neither overriding the gates nor having been champion before replaces a second person."""
    refused = register(blessed=False)
    with pytest.raises(ApprovalError):
        as_person("ann").promote("blobs", refused.version, override="it is urgent")
    as_person("bob").approve("blobs", refused.version)
    with pytest.raises(GateError, match="did not pass its gates"):
        as_person("ann").promote("blobs", refused.version)
    assert as_person("ann").promote("blobs", refused.version, override="urgent").aliases
    unapproved = register(champion=refused.version)
    as_person("eve", needed=0).promote("blobs", unapproved.version)
    as_person("ann").promote("blobs", refused.version, override="back")
    with pytest.raises(ApprovalError):
        as_person("ann").promote("blobs", unapproved.version)


def test_without_a_rule_nothing_is_asked(registry, register):
    """`approvals = 0` is the default."""
    assert registry.promote("blobs", register().version).aliases == (CHAMPION,)
