"""`minga model` as people run it, on one small registry."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from minga.cli.app import main
from minga.inference.engine import ModelRef
from minga.serving.service_record import ServiceRecord
from minga.training.signing import Keyring
from tests.training.conftest import TASKS


@pytest.fixture
def minga(tmp_path, tracking_uri, key_file, monkeypatch, capsys):
    """Runs `minga model ...` in a project of the registry; gives exit code, stdout and stderr."""
    monkeypatch.setenv("MINGA_TRACKING_URI", tracking_uri)
    monkeypatch.setenv("MINGA_SIGNING_KEY", str(key_file))
    (tmp_path / "minga.toml").write_text('task = "blobs.py:Blobs"\n[data]\nsource = "1"\n')
    (tmp_path / "blobs.py").write_text((TASKS / "blobs.py").read_text())

    def run(*words):
        with pytest.raises(SystemExit) as left:
            main(["model", *words, "--project", str(tmp_path)])
        said = capsys.readouterr()
        return left.value.code or 0, said.out, said.err

    run.settings = tmp_path / "minga.toml"
    return run


def test_refused_version_is_promoted_for_a_reason(register, minga):
    """Without a reason it is exit code 15; with one it is champion, and history has the reason."""
    register(blessed=False)
    code, _, err = minga("promote", "1")
    assert (code, "did not pass its gates" in err) == (15, True)
    assert minga("history", "--json")[1] == "[]\n"
    code, out, _ = minga("promote", "1", "--override", "ticket 1207")
    assert (code, out) == (0, "blobs version 1 is champion\n")
    (entry,) = json.loads(minga("history", "--json")[1])
    assert (entry["version"], entry["kind"], entry["reason"]) == (1, "promoted", "ticket 1207")
    (row,) = json.loads(minga("list", "--json")[1])
    assert (row["aliases"], row["blessed"], row["overridden"]) == (["champion"], False, True)


def test_overtaken_version_is_told(register, minga):
    """Of two that were judged against one champion the second is exit code 46, until overridden."""
    register()
    assert minga("promote", "1")[0] == 0
    register(champion=1)
    register(champion=1)
    assert minga("promote", "2")[0] == 0
    code, _, err = minga("promote", "3")
    assert (code, "minga model judge" in err) == (46, True)
    assert minga("promote", "3", "--override", "compared by hand")[0] == 0
    assert minga("promote", "2")[0] == 0  # who was champion may come back


def test_stranger_is_believed_once_trusted(register, minga, tmp_path, monkeypatch, key_file):
    """A verdict by an unknown key is exit code 47, for any reason; `minga model key` ends that."""
    theirs = tmp_path / "theirs.pem"
    register(by=Keyring.open(theirs))
    for words in ((), ("--override", "we know them")):
        code, _, err = minga("promote", "1", *words)
        assert (code, "trusted_keys" in err) == (47, True)
    monkeypatch.setenv("MINGA_SIGNING_KEY", str(theirs))
    code, key, _ = minga("key")
    assert (code, key.strip()) == (0, Keyring.open(theirs).public_key)
    monkeypatch.setenv("MINGA_SIGNING_KEY", str(key_file))
    assert minga("key")[1] != key
    settings = minga.settings.read_text() + f'[gates]\ntrusted_keys = ["{key.strip()}"]\n'
    minga.settings.write_text(settings)
    assert minga("promote", "1")[0] == 0


def test_retired_version_stays_retired(register, minga):
    """A retired version is promoted for a reason alone; the champion cannot be retired."""
    register()
    register(champion=1)
    assert minga("promote", "1")[0] == 0
    code, _, err = minga("retire", "1", "--reason", "old")
    assert (code, "is champion" in err) == (15, True)
    code, out, _ = minga("retire", "2", "--reason", "a broken sensor")
    assert (code, out) == (0, "blobs version 2 is retired\n")
    code, _, err = minga("promote", "2")
    assert (code, "a broken sensor" in err) == (15, True)
    kinds = [
        (e["version"], e["kind"], e["reason"]) for e in json.loads(minga("history", "--json")[1])
    ]
    assert ("a broken sensor" in str(kinds), len(kinds)) == (True, 2)
    assert minga("promote", "2", "--override", "the sensor was sound")[0] == 0


def test_what_served_at_a_moment(register, minga, tracking_uri):
    """`served --at` names what answered then, and nothing before it began or after it ended."""
    version = register()
    record = ServiceRecord(tracking_uri, "http://127.0.0.1:8123")
    ref = ModelRef(name="blobs", version="1", path="x", sha256=version.digests.onnx)
    record.note([ref])
    during = datetime.now(UTC)

    def served(moment):
        code, out, _ = minga("served", "--at", moment.isoformat(), "--json")
        assert code == 0
        return [(one["version"], one["place"].rpartition(":")[2]) for one in json.loads(out)]

    assert served(during + timedelta(seconds=1)) == [("1", "8123")]
    assert served(during - timedelta(hours=1)) == []
    record.close()
    assert served(during + timedelta(hours=1)) == []
