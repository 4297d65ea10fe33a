"""`minga data report`: one HTML page about a Task's data, with its pictures inside.

The page loads nothing: no script, no font, no image from elsewhere. It shows distributions, never
rows of a table; of images it shows those whose labels are suspect.
"""

import base64
import io
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from minga.training.data.checks import DataReport
from minga.training.data.measures import ColumnMeasure, Measures, SuspectedLabel
from minga.training.schema import Column, iterate_columns
from minga.training.task import Split, Splits

if TYPE_CHECKING:
    from minga.training.selection.features import FeatureReport

TEMPLATE = Path(__file__).with_name("report.html.j2")

NUM_BARS = 24
WIDTH, HEIGHT = 240, 80
MAX_SUSPECTS = 12
MAX_PICTURES = 12
PICTURE_PIXELS = 96
TAIL = 0.005
"""Share of the values at each end that a histogram leaves out: outliers would flatten it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A bar of a histogram: places in the picture, in pixels."""

    x: float
    width: float
    height: float
    other_height: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnPicture:
    """A column as the page shows it."""

    column: Column
    measure: ColumnMeasure | None
    bars: tuple[Bar, ...]
    low: str
    high: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspectPicture:
    """A suspect example, with its image if it is one."""

    suspect: SuspectedLabel
    image: str


def render(
    found: DataReport,
    measures: Measures,
    splits: Splits,
    proposal: "FeatureReport | None" = None,
) -> str:
    """Write the page.

    Args:
        found: what the check came to.
        measures: of the training split.
        splits: the data itself.
        proposal: the columns that models should go by, if that was asked.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    suspects = measures.suspected_labels
    return template.render(
        report=found,
        measures=measures,
        proposal=proposal,
        columns=_columns(found, measures, splits),
        targets=_pictures(found.data_schema.targets, {}, _table(splits.train), _table(splits.test)),
        ranked=sorted(measures.columns, key=lambda item: -item.information_bits),
        suspects=[
            SuspectPicture(
                suspect=suspect,
                image=_image(splits.train.inputs[suspect.index]) if place < MAX_PICTURES else "",
            )
            for place, suspect in enumerate(suspects[:MAX_SUSPECTS])
        ],
        width=WIDTH,
        height=HEIGHT,
    )


def _columns(found: DataReport, measures: Measures, splits: Splits) -> tuple[ColumnPicture, ...]:
    known = {item.name: item for item in measures.columns}
    return _pictures(found.data_schema.columns, known, splits.train.inputs, splits.test.inputs)


def _table(split: Split) -> NDArray[Any]:
    return split.targets[:, None] if split.targets.ndim == 1 else split.targets


def _pictures(
    columns: tuple[Column, ...],
    known: dict[str, ColumnMeasure],
    train: NDArray[Any],
    test: NDArray[Any],
) -> tuple[ColumnPicture, ...]:
    names = [column.name for column in columns]
    pairs = zip(iterate_columns(train, names), iterate_columns(test, names), strict=True)
    pictures = []
    for column, ((_, learned), (_, judged)) in zip(columns, pairs, strict=True):
        bars, low, high = _bars(column, learned, judged)
        pictures.append(
            ColumnPicture(
                column=column, measure=known.get(column.name), bars=bars, low=low, high=high
            )
        )
    return tuple(pictures)


def _bars(
    column: Column, train: NDArray[np.float64], test: NDArray[np.float64]
) -> tuple[tuple[Bar, ...], str, str]:
    """Draw the training split's distribution, and the test split's over it."""
    train, test = train[np.isfinite(train)], test[np.isfinite(test)]
    if not len(train):
        return (), "", ""
    if column.kind == "category":
        values = np.array(column.categories)
        labels = [column.named(value) for value in column.categories]
        counts = [np.array([(part == value).sum() for value in values]) for part in (train, test)]
    else:
        low, high = np.quantile(train, [TAIL, 1 - TAIL])
        edges = np.linspace(low, high if high > low else low + 1, NUM_BARS + 1)
        labels = [f"{a:.4g} to {b:.4g}" for a, b in pairwise(edges)]
        counts = [np.histogram(part, edges)[0] for part in (train, test)]
    shares = [count / max(count.sum(), 1) for count in counts]
    tallest = max(float(np.max(shares)), 1e-12)
    width = WIDTH / len(labels)
    bars = tuple(
        Bar(
            x=round(place * width, 2),
            width=round(max(width - 1, 1), 2),
            height=round(float(mine) / tallest * HEIGHT, 2),
            other_height=round(float(other) / tallest * HEIGHT, 2),
            label=f"{label}: {mine:.1%} of train, {other:.1%} of test",
        )
        for place, (label, mine, other) in enumerate(zip(labels, *shares, strict=True))
    )
    if column.kind == "category":
        return bars, labels[0], labels[-1]
    return bars, f"{edges[0]:.4g}", f"{edges[-1]:.4g}"


def _image(example: NDArray[Any]) -> str:
    """Give an example as a PNG in a data URI; nothing if it is no image."""
    if example.ndim not in (2, 3) or min(example.shape[-2:]) < 4:
        return ""
    from PIL import Image

    pixels = example if example.ndim == 2 else np.moveaxis(example, 0, -1)
    if pixels.ndim == 3 and pixels.shape[2] not in (3,):
        pixels = pixels[:, :, 0]
    if pixels.dtype != np.uint8:
        low, high = float(pixels.min()), float(pixels.max())
        pixels = ((pixels - low) / (high - low or 1) * 255).astype(np.uint8)
    image = Image.fromarray(pixels).resize((PICTURE_PIXELS, PICTURE_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
