"""`minga predict`: one request to a served model, from a file."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from minga.cli.output import print_json, print_table

if TYPE_CHECKING:
    from minga.inference.client import InferenceClient
    from minga.inference.credentials import Credentials
    from minga.inference.grpc_client import GrpcClient
    from minga.inference.protocol import InferResponse
    from minga.inference.tensors import Array

File = Annotated[Path, Parameter(allow_leading_hyphen=True)]  # a hyphen alone is standard input


def predict(
    model: str,
    /,
    *,
    input: File | None = None,  # noqa: A002 - the option's name
    csv: File | None = None,
    url: str | None = None,
    grpc: Annotated[bool, Parameter(negative=())] = False,
    key_file: Path | None = None,
    ca: Path | None = None,
    model_version: str | None = None,
    explain: Annotated[bool, Parameter(negative=())] = False,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Send one request to a served model and show its outputs.

    JSON is rows ([[1, 2, 3], [4, 5, 6]]), rows by input name ({"input": [[1, 2, 3]]}), or a whole
    request of the Open Inference Protocol ({"inputs": [...]}). CSV is one row per line, its
    columns in the model's order, with or without a line of names.

    Example: echo '[[0.1, 0.2, 0.3]]' | minga predict machine-failure --input -

    Example: minga predict machine-failure --csv new.csv --json

    Example: minga predict machine-failure --csv new.csv --url grpc://127.0.0.1:8001

    An API key comes from a file or from MINGA_API_KEY, never from the command line, where other
    users of the machine would see it. MINGA_API_KEY_FILE and MINGA_API_CA stand for the options;
    MINGA_API_CERTIFICATE and MINGA_API_CERTIFICATE_KEY name a client certificate.

    Example: minga predict machine-failure --csv new.csv --url https://models.plant --ca ca.pem

    Args:
        model: The model's name.
        input: A JSON file; - reads standard input.
        csv: A CSV file; - reads standard input.
        url: The server, as `minga serve` or `minga device run` prints it; by default
            http://127.0.0.1:8000.
        grpc: Ask over gRPC; without a URL at grpc://127.0.0.1:8001.
        key_file: A file whose first line is the API key.
        ca: Who signs the server's certificate, PEM; by default whom this machine trusts.
        model_version: The version to ask; by default the server's.
        explain: Show what each feature adds to the outputs instead of the outputs: the output
            minus the output with that feature alone at its mean in the training data.
        as_json: Write the outputs as one JSON object.
    """
    from minga.inference.errors import BadRequestError
    from minga.inference.protocol import InferRequest
    from minga.inference.rows import read_csv, read_json

    if (input is None) == (csv is None):
        raise BadRequestError("give the rows with either --input FILE or --csv FILE")
    with _client(url, grpc=grpc, credentials=_credentials(key_file, ca)) as client:
        metadata = client.metadata(model, version=model_version)
        if input is not None:
            inputs = read_json(read_file(input), metadata)
        else:
            assert csv is not None
            inputs = read_csv(read_file(csv).decode(errors="replace"), metadata)
        request = InferRequest(inputs=inputs, binary_outputs=True)
        verb: Literal["infer", "explain"] = "explain" if explain else "infer"
        response = client.request(model, request, version=model_version, verb=verb)
    if as_json:
        print_json(_summary(response))
    else:
        _print(response)


def _credentials(key_file: Path | None, ca: Path | None) -> "Credentials":
    """Take from the environment what no option gives."""
    from minga.inference.credentials import Credentials, read_key

    found = Credentials.from_environment()
    if key_file is not None:
        found = replace(found, key=read_key(key_file))
    return found if ca is None else replace(found, ca=ca)


def _client(
    url: str | None, *, grpc: bool, credentials: "Credentials"
) -> "InferenceClient | GrpcClient":
    """Open a client of the kind that the URL's scheme, or the flag, asks for."""
    from minga.inference.errors import ClientError

    if url is None:
        url = "grpc://127.0.0.1:8001" if grpc else "http://127.0.0.1:8000"
    if url.startswith(("grpc://", "grpcs://")):
        from minga.inference.grpc_client import GrpcClient

        return GrpcClient(url, credentials=credentials)
    if grpc:
        raise ClientError(f"{url!r} is no gRPC server's URL; write one like grpc://127.0.0.1:8001")
    from minga.inference.client import InferenceClient

    return InferenceClient(url, credentials=credentials)


def read_file(file: Path) -> bytes:
    """Read a file that the command line names; - is standard input.

    Raises:
        BadRequestError: it cannot be read.
    """
    from minga.inference.errors import BadRequestError

    if str(file) == "-":
        return sys.stdin.buffer.read()
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadRequestError(f"cannot read {file}: {error.strerror}") from error


def _summary(response: "InferResponse") -> dict[str, Any]:
    return {
        "model_name": response.model_name,
        "model_version": response.model_version,
        "outputs": {name: array.tolist() for name, array in response.outputs.items()},
    }


def _print(response: "InferResponse") -> None:
    """Show a line per row of the batch and a column per output."""
    outputs = response.outputs
    num_rows = max((len(array) if array.ndim else 1 for array in outputs.values()), default=0)
    rows = [
        [str(row), *(_cell(array, row) for array in outputs.values())] for row in range(num_rows)
    ]
    print_table(["row", *outputs], rows)


def _cell(array: "Array", row: int) -> str:
    if array.ndim == 0:
        return str(array) if row == 0 else ""
    if row >= len(array):
        return ""
    values = array[row].ravel().tolist() if array.ndim > 1 else [array[row].item()]
    return "  ".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in values)
