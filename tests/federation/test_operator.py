"""The folder that makes somebody an operator."""

from pathlib import Path

import pytest

from minga.federation.coordinator.authority import Authority
from minga.federation.coordinator.store import DATABASE_FILE, Store
from minga.federation.errors import IdentityError
from minga.federation.identity import (
    KEY_FILE,
    Identity,
    Role,
    load_or_create_key,
    make_csr,
    save_identity,
)
from minga.federation.limits import PAGE_DEVICES
from minga.federation.operator import ADDRESS_FILE, connect
from tests.federation.fleet import Fleet


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


async def test_large_fleet_is_listed_in_pages(tmp_path: Path) -> None:
    """Every device of a group is listed once and by name, however many messages that takes."""
    async with Fleet(tmp_path) as fleet:
        store = Store(tmp_path / "coordinator" / DATABASE_FILE)
        names = [f"site-{index:05}" for index in range(2 * PAGE_DEVICES + 1)]
        with store.transaction():
            for index, name in enumerate(reversed(names)):
                group = "line-1" if index % 2 else "line-2"
                store.register_device(name, group, name.encode(), 0.0)
        store.close()
        assert [device.device_id for device in await fleet.operator.devices()] == names
        assert len(await fleet.operator.devices("line-1")) == PAGE_DEVICES
        assert (await fleet.operator.status()).num_devices == len(names)
