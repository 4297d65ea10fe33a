"""Following a source of models: deploy what changes, once, and lose nothing on the way."""

import logging
import threading

import pytest

from minga.inference.engine import ModelRef
from minga.inference.errors import ModelError
from minga.serving.errors import (
    HostError,
    NoChampionError,
    RegistryUnreachableError,
    VersionRefusedError,
)
from minga.serving.watcher import MemorySource, Watcher, current_versions


def ref(version: int, name: str = "a") -> ModelRef:
    """A version that nobody loads in these tests."""
    return ModelRef(name=name, version=str(version), path="/nowhere", sha256="0")


class Deployments:
    """Records what was deployed; refuses what it is told to, as a host does."""

    def __init__(self, heard=None):
        self.done = []
        self.failures = {}
        self.heard = heard or threading.Event()

    def counts(self):
        return []

    def deploy(self, refs, comparisons=()):
        assert not comparisons
        for wanted in refs:
            if wanted in self.failures:
                raise self.failures[wanted]
        self.done.append(tuple(refs))
        self.heard.set()


class BrokenSource:
    """A source that cannot tell until it is repaired."""

    def __init__(self, source):
        self._source = source
        self.is_broken = True

    def current(self, name):
        if self.is_broken:
            raise RegistryUnreachableError("no answer")
        return self._source.current(name)


def test_nothing_is_deployed_while_nothing_changes():
    """A source that says what is served already causes no deployment."""
    deploy = Deployments()
    watcher = Watcher(MemorySource([ref(1)]), [ref(1)], deploy)
    watcher.check()
    assert deploy.done == []


def test_a_new_version_is_deployed_once_with_the_other_models():
    """A change of one model is deployed with the others as they are, and not again."""
    source, deploy = MemorySource([ref(1), ref(1, "b")]), Deployments()
    watcher = Watcher(source, [ref(1), ref(1, "b")], deploy)
    source.set(ref(2))
    watcher.check()
    watcher.check()
    assert deploy.done == [(ref(2), ref(1, "b"))]
    assert watcher.served == (ref(2), ref(1, "b"))


@pytest.mark.parametrize("error", [ModelError("bad"), VersionRefusedError("bad")])
def test_a_refused_version_is_not_tried_again(error, caplog):
    """A refusal is final for that version, and does not hold up the other models."""
    source, deploy = MemorySource([ref(2), ref(2, "b")]), Deployments()
    deploy.failures[ref(2)] = error
    watcher = Watcher(source, [ref(1), ref(1, "b")], deploy)
    watcher.check()
    watcher.check()
    assert deploy.done == [(ref(1), ref(2, "b"))]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    source.set(ref(3))
    watcher.check()
    assert watcher.served == (ref(3), ref(2, "b"))


def test_a_host_that_fails_is_asked_again():
    """A failure that is not the version's own fault is tried again at the next look."""
    source, deploy = MemorySource([ref(2)]), Deployments()
    deploy.failures[ref(2)] = HostError("no replica is running")
    watcher = Watcher(source, [ref(1)], deploy)
    watcher.check()
    deploy.failures.clear()
    watcher.check()
    assert watcher.served == (ref(2),)


def test_a_source_that_cannot_tell_changes_nothing_and_is_reported_once(caplog):
    """While the registry is away, what is served stays, and the log does not fill."""
    source, deploy = BrokenSource(MemorySource([ref(2)])), Deployments()
    watcher = Watcher(source, [ref(1)], deploy)
    for _ in range(3):
        watcher.check()
    assert watcher.served == (ref(1),)
    assert len(caplog.records) == 1
    source.is_broken = False
    watcher.check()
    assert watcher.served == (ref(2),)


def test_a_model_that_loses_its_champion_is_served_on():
    """An alias that is taken away is no reason to stop answering."""
    deploy = Deployments()
    watcher = Watcher(MemorySource(), [ref(1)], deploy)
    watcher.check()
    assert watcher.served == (ref(1),)
    assert deploy.done == []


def test_running_follows_the_source_until_told_to_stop():
    """The loop deploys a change by itself and ends with its event."""
    source, stop = MemorySource([ref(1)]), threading.Event()
    deployed = threading.Event()
    watcher = Watcher(source, [ref(1)], Deployments(deployed))
    thread = threading.Thread(target=watcher.run, args=(stop, 0.01))
    thread.start()
    source.set(ref(2))
    assert deployed.wait(10)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("names", [[], ["a", "b"]])
def test_models_without_a_version_cannot_be_served(names):
    """No model at all, or one without a champion, is an error that says what to run."""
    with pytest.raises(NoChampionError, match="minga run"):
        current_versions(MemorySource([ref(1)]), names)


def test_current_versions_keep_the_order_of_the_names():
    """Versions come in the order in which their models were named."""
    source = MemorySource([ref(1), ref(2, "b")])
    assert current_versions(source, ["b", "a"]) == (ref(2, "b"), ref(1))
