"""`minga explain`: what a version goes by, over many rows and for a single one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from minga.cli.output import print_json, print_line, print_table
from minga.cli.predict import read_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from minga.cluster.project import Project
    from minga.training.explanation import Explanation

_SHOWN = 10


def explain(
    which: str = "champion",
    *,
    input: Annotated[Path | None, Parameter(allow_leading_hyphen=True)] = None,  # noqa: A002
    csv: Annotated[Path | None, Parameter(allow_leading_hyphen=True)] = None,
    rows: Annotated[int, Parameter(validator=Number(gte=1))] = 200,
    method: Literal["auto", "gradients", "occlusion"] = "auto",
    bundle: Path | None = None,
    project: Path = Path(),
    name: str = "",
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Explain a version's answers: each column's share in them.

    Without rows of your own it shows what the version goes by over examples of the test split.
    With --input or --csv it explains each of your rows; they are read as `minga predict` reads
    them. A share says how much a value, instead of the training data's mean, moved the answer: the
    model's raw output, or its largest one where it has several.

    Example: minga explain champion

    Example: echo '[[50, 21, 77, 0, 28, 0, 27, 48, 22]]' | minga explain --input -

    Example: minga explain --bundle ./version-3 --csv new.csv

    Args:
        which: A version's number or alias.
        input: A JSON file of rows; - reads standard input.
        csv: A CSV file of rows; - reads standard input.
        rows: How many examples of the test split to take.
        method: `gradients` integrates gradients through the network and adds up exactly; it needs
            torch and captum. `occlusion` takes values away from the ONNX model one by one, and
            needs neither. `auto` takes the first that is possible.
        bundle: A version's folder instead of a project: needs no registry, data or torch.
        project: The project folder.
        name: The model, if the registry has several.
        as_json: Print JSON.
    """
    from minga.cluster.project import load
    from minga.training.bundle import has_weights
    from minga.training.explanation import (
        can_use_gradients,
        explain_by_gradients,
        explain_by_occlusion,
        open_model,
    )

    loaded = None if bundle else load(project)
    folder = bundle or _fetch(loaded, name, which)
    own = _own_rows(open_model(folder), input, csv)
    inputs = own if own is not None else _test_rows(loaded, rows)
    if loaded is None:
        _refuse_gradients(method)
        found = explain_by_occlusion(folder, inputs)
    elif method == "gradients" or (
        method == "auto"
        and can_use_gradients()
        and has_weights(folder)
        and inputs.dtype.kind == "f"
    ):
        found = explain_by_gradients(loaded.loaded_task, loaded.splits.train, folder, inputs)
    else:
        found = explain_by_occlusion(folder, inputs)
    if as_json:
        print_json(found)
    else:
        _show(found, each_row=own is not None)


def _fetch(project: "Project | None", name: str, which: str) -> Path:
    assert project is not None
    return project.registry().fetch(name or project.loaded_task.name, which)


def _refuse_gradients(method: str) -> None:
    from minga.inference.errors import BadRequestError

    if method == "gradients":
        raise BadRequestError(
            "gradients need the network, which the project's Task builds: leave out --bundle, or "
            "explain by occlusion"
        )


def _own_rows(model: Any, input: Path | None, csv: Path | None) -> "NDArray[Any] | None":  # noqa: A002
    from minga.inference.rows import read_csv, read_json

    specs = [
        {"name": spec.name, "datatype": str(spec.datatype), "shape": list(spec.shape)}
        for spec in model.inputs
    ]
    metadata = {"name": model.ref.name, "inputs": specs}
    if input is not None:
        return next(iter(read_json(read_file(input), metadata).values()))
    if csv is not None:
        text = read_file(csv).decode(errors="replace")
        return next(iter(read_csv(text, metadata).values()))
    return None


def _test_rows(project: "Project | None", num_rows: int) -> "NDArray[Any]":
    from minga.inference.errors import BadRequestError

    if project is None:
        raise BadRequestError("a bundle has no data: give rows with --input FILE or --csv FILE")
    return project.splits.test.inputs[:num_rows]


def _show(found: "Explanation", *, each_row: bool) -> None:
    if not each_row:
        print_line(f"mean absolute share of each column, by {found.method}:")
        ranked = [(name, f"{share:.4g}") for name, share in found.importance.items()]
        print_table(("column", "share"), ranked[:_SHOWN])
        return
    for number, row in enumerate(found.rows, start=1):
        ranked_row = sorted(zip(found.columns, row, strict=True), key=lambda one: -abs(one[1]))
        print_line(f"row {number}, by {found.method}:")
        print_table(("column", "share"), [(n, f"{s:+.4g}") for n, s in ranked_row[:_SHOWN]])
