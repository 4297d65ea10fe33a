"""What tests of the offline root share."""

from pathlib import Path

import pytest

from minga.federation.coordinator.authority import Authority
from minga.federation.coordinator.root import Root
from tests.federation.identity.roots import appointed


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """An offline root without a passphrase."""
    return Root.create(tmp_path / "root", "")


@pytest.fixture
def first(tmp_path: Path, root: Root) -> Authority:
    """A coordinator's authority under the root."""
    return appointed(tmp_path / "first", root)


@pytest.fixture
def second(tmp_path: Path, root: Root, first: Authority) -> Authority:
    """What takes the first one's place."""
    return appointed(tmp_path / "second", root)
