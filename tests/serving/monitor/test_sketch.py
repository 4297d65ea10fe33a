"""Sketches of traffic: exact sums in any order, and what they count."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from minga.inference.errors import ModelError
from minga.inference.monitor.reference import MAX_COLUMNS, Reference, Role
from minga.inference.monitor.sketch import Sketch
from tests.serving.watched import logits, reference, rows

TABLES = arrays.arrays(
    np.float32,
    st.tuples(st.integers(0, 12), st.just(4)),
    elements=st.floats(-6, 6, width=32) | st.sampled_from([np.nan, np.inf, 1e30, 2.0]),
)


def sketch_of(table: np.ndarray, *, with_outputs: bool = True) -> Sketch:
    """Count a table in one go."""
    sketch = Sketch(reference())
    sketch.add(table, logits(table) if with_outputs else None)
    return sketch


def column(role: str, name: str, **changes) -> dict:
    """Describe a column of two bins."""
    plain = {"role": role, "name": name, "edges": [0.0], "shares": [0.5, 0.5]}
    return {**plain, "num_examples": 100, **changes}


def described(*columns: dict, **more) -> Reference:
    """Make a reference by hand."""
    given = {"layout": 1, "num_held_out": 100, "columns": list(columns), **more}
    return Reference.parse(json.dumps(given))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@given(st.lists(TABLES, min_size=1, max_size=6), st.randoms())
def test_parts_in_any_order_are_the_whole(tables, chance):
    """Sketches of parts, shuffled and joined in any tree, are the sketch of all rows at once."""
    whole = sketch_of(np.concatenate(tables))
    parts = [sketch_of(table) for table in tables]
    while len(parts) > 1:
        chance.shuffle(parts)
        one = parts.pop()
        parts[0].merge(one)
    assert parts[0].to_json() == whole.to_json()
    assert whole.rows == sum(map(len, tables))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@given(TABLES, TABLES)
def test_sum_does_not_depend_on_sides(left, right):
    """Adding A to B gives what adding B to A gives."""
    one, other = sketch_of(left), sketch_of(left)
    one.merge(sketch_of(right))
    swapped = sketch_of(right)
    swapped.merge(other)
    assert one.to_json() == swapped.to_json()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@given(TABLES)
def test_sketch_survives_the_wire(table):
    """A sketch that went through JSON is the same, and cannot become one of other bins."""
    sketch = sketch_of(table)
    wired = json.loads(json.dumps(sketch.to_json()))
    assert Sketch.from_json(reference(), wired).to_json() == sketch.to_json()
    with pytest.raises(ValueError, match="another reference"):
        Sketch.from_json(described(column("input", "x")), wired)
    with pytest.raises(ValueError, match="do not add up"):
        sketch.merge(Sketch(described(column("input", "x"))))


def test_every_kind_of_value_is_counted():
    """Missing, infinite, outside, unknown and usual values each have their count."""
    table = np.array([[np.nan, 0, 0, 1], [np.inf, 0, 0, 7], [1e6, 0, 0, 2]], np.float32)
    sketch = sketch_of(table, with_outputs=False)
    assert sketch.missing.tolist()[:4] == [2, 0, 0, 0]
    assert sketch.outside.tolist()[:4] == [1, 0, 0, 0]
    assert sketch.unknown.tolist()[:4] == [0, 0, 0, 1]
    assert sketch.outliers == 1
    assert [counts.sum() for counts in sketch.counts[:4]] == [1, 3, 3, 3]
    assert sum(counts.sum() for counts in sketch.counts[4:]) == 0


def test_training_data_falls_into_its_own_bins():
    """Rows like those of training have the reference's shares, and outputs have theirs."""
    sketch = sketch_of(rows(20_000, 9))
    for place, known in enumerate(reference().columns):
        counts = sketch.counts[place]
        assert counts.sum() == 20_000
        assert np.allclose(counts / 20_000, known.shares, atol=0.02)
    assert sketch.outliers / 20_000 == pytest.approx(0.01, abs=0.006)


def test_images_give_one_value_a_row():
    """The cells of one image are no independent draws: one of them counts, whichever the order."""
    images = np.random.default_rng(4).random((500, 8, 8, 3)).astype(np.float32)
    known = described(column("input", "values", edges=[0.25, 0.5, 0.75], shares=[0.25] * 4))
    whole, turned = Sketch(known), Sketch(known)
    whole.add(images, None)
    turned.add(images[::-1], None)
    assert whole.to_json() == turned.to_json()
    assert np.allclose(whole.counts[0] / 500, 0.25, atol=0.08)
    wide = Sketch(known)
    wide.add(np.zeros((3, MAX_COLUMNS + 1), np.float32), None)
    assert wide.counts[0].sum() == 3


def test_tables_of_text_are_read_as_their_model_reads_them():
    """Categories by their names, numbers written out, empty cells as missing."""
    known = described(
        column("input", "kind", edges=[0.5], categories=[0.0, 1.0], names=["no", "yes"]),
        column("input", "size", low=-1.0, high=1.0),
    )
    sketch = Sketch(known)
    cells = [["yes", "0.5"], ["no", "-0.5"], ["?", "9"], ["", ""], ["yes", "what"]]
    sketch.add(np.array(cells, object), None)
    assert [counts.tolist() for counts in sketch.counts] == [[2, 2], [1, 2]]
    assert sketch.missing.tolist() == [1, 2]
    assert sketch.unknown.tolist() == [1, 0]
    assert sketch.outside.tolist() == [0, 1]


@pytest.mark.parametrize(
    "broken",
    [
        "no JSON",
        '{"layout": 9, "num_held_out": 1, "columns": []}',
        '{"layout": 1, "columns": []}',
        '{"layout": 1, "num_held_out": 1e999, "columns": []}',
        "[" * 100_000,
        '{"layout": 1, "num_held_out": 1, "columns": [{"role": "input", "name": "x", '
        '"edges": [1, 0], "shares": [0.2, 0.3, 0.5], "num_examples": 5}]}',
        '{"layout": 1, "num_held_out": 1, "columns": [{"role": "input", "name": "x", '
        '"edges": [0], "shares": [0.2, 0.3], "num_examples": 5}]}',
        '{"layout": 1, "num_held_out": 1, "columns": [], "answers": {"kind": "yes-no", '
        '"rates": [0.5]}}',
    ],
    ids=range(8),
)
def test_broken_references_are_refused(broken):
    """What is no reference is refused with a reason, and a model with one is just not watched."""
    with pytest.raises(ModelError, match="reference cannot be read"):
        Reference.parse(broken)
    assert Reference.of_metadata({"minga.reference": broken}) is None
    assert Reference.of_metadata({}) is None


def test_roles_are_found():
    """The reference of a yes or no has inputs, an output and a score."""
    roles = [known.role for known in reference().columns]
    assert roles == [Role.INPUT] * 4 + [Role.OUTPUT, Role.SCORE]
    assert reference().only(Role.ANSWER) is None
