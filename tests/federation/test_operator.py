"""The folder that makes somebody an operator."""

from pathlib import Path

import pytest

from minga.federation.coordinator.authority import Authority
from minga.federation.errors import IdentityError
from minga.federation.identity import (
    KEY_FILE,
    Identity,
    Role,
    load_or_create_key,
    make_csr,
    save_identity,
)
from minga.federation.operator import ADDRESS_FILE, connect


async def test_folder_without_an_identity(tmp_path: Path) -> None:
    """A folder of somebody else's is refused with what to name instead."""
    with pytest.raises(IdentityError, match="state folder"):
        async with connect(tmp_path):
            pass


@pytest.mark.parametrize("content", [None, "", "[]", "{}", "{"], ids=repr)
async def test_folder_without_an_address(
    tmp_path: Path, authority: Authority, content: str | None
) -> None:
    """A folder that does not say where the coordinator is, is refused with the remedy."""
    folder = tmp_path / "operator"
    key = load_or_create_key(folder / KEY_FILE)
    certificate = authority.issue_client(Role.OPERATOR, "ana", make_csr(key, "ana"))
    save_identity(folder, Identity.of(key, certificate, authority.certificate))
    if content is not None:
        (folder / ADDRESS_FILE).write_text(content)
    with pytest.raises(IdentityError, match="copy the coordinator's"):
        async with connect(folder):
            pass
