"""The pages for whoever writes a device in another language leave out nothing that it meets."""

import re
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor import Descriptor

from minga.federation.transport import WIRE_ERRORS
from minga.federation.v1 import federation_pb2 as pb

FOLDER = Path(__file__).parents[2] / "docs" / "explanation"
WIRE = (FOLDER / "wire-protocol.md").read_text()
ROUNDS = (FOLDER / "secure-aggregation-protocol.md").read_text()

SERVICES = [s for name, s in pb.DESCRIPTOR.services_by_name.items() if name != "OperatorService"]
"""What a device calls."""


def messages_of(*roots: Descriptor) -> Iterator[Descriptor]:
    """Give some messages and all that they hold, each once."""
    seen, waiting = set[str](), list(roots)
    while waiting:
        message = waiting.pop()
        if message.full_name in seen:
            continue
        seen.add(message.full_name)
        waiting += [f.message_type for f in message.fields if f.message_type is not None]
        yield message


def words_of_code(text: str) -> set[str]:
    """Give the words of a page that are set as code."""
    spans = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^    \S.*$", text, re.MULTILINE)
    return {word for span in spans for word in re.findall(r"\w+", span)}


def test_every_error_is_in_the_table() -> None:
    """Key and status of each class of error on the wire are on the page, and no others."""
    table = WIRE.partition("## Errors")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z-]+)` \| `([A-Z_]+)` \| \S", table, re.MULTILINE)
    assert sorted(rows) == sorted((row.key, row.status.name) for row in WIRE_ERRORS)


def test_every_message_of_a_session_is_told() -> None:
    """All that goes over the control stream is in the table of who says what and when."""
    table = words_of_code(WIRE.partition("## The control stream")[2].partition("\n### ")[0])
    for session in (pb.SessionRequest, pb.SessionResponse):
        names = {field.message_type.name for field in session.DESCRIPTOR.fields}
        assert names <= table, names - table


def test_every_call_and_field_is_told() -> None:
    """No call that a device makes, and no field that it may read or write, goes without a word."""
    told = words_of_code(WIRE) | words_of_code(ROUNDS)
    methods = [method for service in SERVICES for method in service.methods]
    types = [kind for method in methods for kind in (method.input_type, method.output_type)]
    fields = {
        field.name
        for message in messages_of(*types)
        if not message.name.startswith("Session") and not message.GetOptions().map_entry
        for field in message.fields
    }
    wanted = {method.name for method in methods} | fields
    assert len(wanted) > 80
    assert wanted <= told, sorted(wanted - told)
