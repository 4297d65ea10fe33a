"""The set of served versions: replaced as a whole, or not at all."""

from dataclasses import replace

import pytest

from minga.inference.errors import ModelError, UnavailableError, UnknownModelError
from minga.inference.repository import ModelRepository


@pytest.fixture
def refs(models, write_model):
    """Three versions of a model that scales, by 1, 2 and 3."""
    return [write_model(models["scaling"](k), version=str(k)) for k in (1, 2, 3)]


def test_nothing_is_served_before_the_first_apply():
    """An empty repository is not ready, and says "later", not "never"."""
    repository = ModelRepository()
    assert not repository.is_ready
    with pytest.raises(UnavailableError):
        repository.get("scaling")


def test_the_first_version_listed_is_the_default(refs):
    """A name stands for its first version; the others answer by number."""
    repository = ModelRepository()
    repository.apply([refs[1], refs[0]])
    assert repository.get("scaling").ref == refs[1]
    assert repository.get("scaling", "1").ref == refs[0]
    assert repository.versions("scaling") == ("2", "1")
    assert repository.names() == ("scaling",)
    assert repository.is_ready


def test_a_swap_leaves_running_requests_on_their_version(refs):
    """Whoever holds a version goes on with it after it has left the repository."""
    repository = ModelRepository()
    repository.apply(refs[:1])
    held = repository.get("scaling")
    repository.apply(refs[1:2])
    assert held.ref == refs[0]
    assert repository.get("scaling").ref == refs[1]
    with pytest.raises(UnknownModelError, match="only 2"):
        repository.get("scaling", "1")


def test_what_is_served_already_is_not_loaded_again(refs):
    """Declaring the same version again keeps the very same session."""
    repository = ModelRepository()
    repository.apply(refs[:1])
    before = repository.get("scaling")
    repository.apply(refs[:2])
    assert repository.get("scaling") is before


def test_a_bad_version_changes_nothing(refs):
    """If one version cannot be loaded, all that was served before is served still."""
    repository = ModelRepository()
    repository.apply(refs[:1])
    bad = replace(refs[1], sha256="0" * 64)
    for attempt in (repository.apply, repository.prepare):
        with pytest.raises(ModelError):
            attempt([refs[2], bad])
        assert repository.refs == (refs[0],)


def test_what_was_prepared_is_served_without_its_file(refs, tmp_path):
    """After prepare, apply needs nothing that can fail."""
    repository = ModelRepository()
    repository.prepare(refs[:2])
    for path in tmp_path.iterdir():
        path.unlink()
    assert not repository.is_ready
    repository.apply(refs[:2])
    assert repository.refs == tuple(refs[:2])


def test_one_version_with_two_files_is_refused(refs):
    """A version is one file; two files under one number are a mistake of the caller."""
    repository = ModelRepository()
    with pytest.raises(ModelError, match="twice"):
        repository.apply([refs[0], replace(refs[1], version="1")])
    assert not repository.is_ready


def test_an_empty_declaration_unloads_everything(refs):
    """Applying nothing serves nothing."""
    repository = ModelRepository()
    repository.apply(refs)
    repository.apply([])
    assert repository.refs == ()
    assert not repository.is_ready
