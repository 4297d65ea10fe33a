"""Schema, profile, checks and digest of data."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minga.training import Split, Splits
from minga.training.config import DataConfig
from minga.training.data import DataReport, check, digest_of, profile_of
from minga.training.data.tfdv import to_tfdv
from minga.training.errors import SchemaError
from minga.training.profile import profile_columns, stability_index
from minga.training.schema import infer_schema

CONFIG = DataConfig(source="1")

columns = arrays(np.float32, st.tuples(st.integers(1, 60)), elements=st.floats(-1e6, 1e6, width=32))


def violations(blobs, splits, reference=None):
    """Check splits against a training split, their own by default."""
    train = (reference or splits).train
    return check(splits, infer_schema(train), profile_of(blobs, train), CONFIG)


def kinds(found):
    """What was found, in short."""
    return {(item.severity, item.kind, item.path.partition(".")[0]) for item in found}


def with_column(split, index, values):
    """The same split with other values in one column."""
    inputs = split.inputs.copy()
    inputs[:, index] = values
    return Split(inputs=inputs, targets=split.targets)


def test_columns_are_described():
    """A column of few whole numbers is a category, any other a number with its range."""
    inputs = np.column_stack([[0, 1, 1, 2], [0.5, -1.5, 2.5, np.nan]])
    schema = infer_schema(Split(inputs=inputs, targets=np.zeros(4)), ("gear", "torque"))
    gear, torque = schema.columns
    assert (gear.name, gear.kind, gear.categories) == ("gear", "category", (0, 1, 2))
    assert (torque.kind, torque.low, torque.high, torque.missing) == ("number", -1.5, 2.5, 0.25)


def test_images_are_one_column():
    """What is no table is described as one column of all values."""
    split = Split(inputs=np.random.default_rng(0).random((5, 1, 8, 8)), targets=np.zeros(5))
    schema = infer_schema(split)
    assert schema.input_shape == (1, 8, 8)
    assert [column.name for column in schema.columns] == ["values"]


def test_schema_break_is_named():
    """Fewer columns, or others, break what a client was written for."""
    wide = infer_schema(Split(inputs=np.zeros((3, 3)), targets=np.zeros(3)))
    narrow = infer_schema(Split(inputs=np.zeros((3, 2)), targets=np.zeros(3)))
    assert wide.breaks(wide) == ()
    assert any("input_shape is (2,), was (3,)" in found for found in wide.breaks(narrow))


@given(columns)
def test_shares_of_a_profile_are_a_distribution(values):
    """Shares are one more than edges and sum to 1; values do not drift from themselves."""
    (profile,) = profile_columns(values)
    assert len(profile.shares) == len(profile.edges) + 1
    assert sum(profile.shares) == pytest.approx(1)
    assert stability_index(profile, values.astype(np.float64)) == pytest.approx(0, abs=1e-9)


@given(columns, columns)
def test_stability_index_is_never_negative(values, others):
    """Any two samples have an index of 0 or more."""
    (profile,) = profile_columns(values)
    assert stability_index(profile, others.astype(np.float64)) >= -1e-12


def test_stability_index_sees_a_shift():
    """A shift by one deviation is far above the conventional 0.25, resampling far below."""
    generator = np.random.default_rng(0)
    (profile,) = profile_columns(generator.normal(size=2000).astype(np.float32))
    assert stability_index(profile, generator.normal(size=2000)) < 0.05
    assert stability_index(profile, generator.normal(size=2000) + 1) > 0.5


def test_sound_data_has_no_violation(blobs, splits):
    """Data drawn from one distribution passes."""
    assert violations(blobs, splits) == ()


@given(st.sampled_from(["train", "validation", "test"]), st.integers(0, 99), st.integers(0, 3))
def test_digest_names_every_value(part, row, column):
    """Changing any one value of any split changes the digest."""
    generator = np.random.default_rng(0)
    parts = {
        name: Split(inputs=generator.random((100, 4)), targets=np.zeros(100))
        for name in ("train", "validation", "test")
    }
    before = Splits(**parts)
    inputs = parts[part].inputs.copy()
    inputs[row, column] += 1
    after = replace(before, **{part: Split(inputs=inputs, targets=parts[part].targets)})
    assert digest_of(before) == digest_of(Splits(**parts))
    assert digest_of(before) != digest_of(after)


def test_missing_values_stop_a_run(blobs, splits):
    """Values that are missing where the reference had none are an error."""
    holes = replace(splits, test=with_column(splits.test, 1, np.nan))
    assert ("error", "missing", "test") in kinds(violations(blobs, holes, splits))


def test_values_out_of_range_warn(blobs, splits):
    """A column far outside of what was learned from is a warning, and drifts."""
    far = replace(splits, test=with_column(splits.test, 2, 1e6))
    found = kinds(violations(blobs, far, splits))
    assert {("warning", "range", "test"), ("warning", "drift", "test")} <= found


def test_unknown_category_is_named(blobs, splits):
    """A category that the reference did not have stops training, and warns elsewhere."""
    gears = replace(splits, **{p: with_column(splits[p], 3, 1.0) for p in ("train", "test")})
    other = replace(gears, **{p: with_column(splits[p], 3, 7.0) for p in ("train", "test")})
    found = violations(blobs, other, gears)
    assert {("error", "category", "train"), ("warning", "category", "test")} <= kinds(found)
    named = next(item for item in found if item.kind == "category")
    assert (named.path, named.expected, named.seen, named.count) == (
        "train.x3",
        "one of 1",
        "7",
        300,
    )


def test_wrong_shape_and_emptiness_stop_a_run(blobs, splits):
    """Splits of another shape, or without a row, are errors, and are not looked at further."""
    odd = Splits(
        train=splits.train,
        validation=Split(inputs=np.zeros((5, 3)), targets=np.zeros(5)),
        test=Split(inputs=np.zeros((0, 4)), targets=np.zeros(0)),
    )
    assert kinds(violations(blobs, odd)) == {
        ("error", "shape", "validation"),
        ("error", "empty", "test"),
    }


def test_learned_examples_in_the_test_split_warn(blobs, splits):
    """A test split that is part of the training split is noticed."""
    leaked = replace(splits, test=splits.train)
    assert ("warning", "overlap", "test") in kinds(violations(blobs, leaked))


def test_report_refuses_with_the_first_error(blobs, splits):
    """A report with errors raises one line; it survives the way through JSON."""
    holes = replace(splits, test=with_column(splits.test, 1, np.nan))
    report = DataReport(
        task="blobs",
        source="a.csv",
        digest=digest_of(holes),
        num_examples={"train": 300, "validation": 100, "test": 200},
        data_schema=infer_schema(splits.train),
        profile=profile_of(blobs, splits.train),
        violations=violations(blobs, holes, splits),
        reference="itself",
    )
    assert DataReport.model_validate_json(report.model_dump_json()) == report
    with pytest.raises(
        SchemaError, match=r"a.csv: test.x1: missing is 100.00%, should be <= 0.00%"
    ):
        report.require_valid()


def test_kept_words_name_categories():
    """Declared categories take the place of those seen, and texts name them in messages."""
    split = Split(inputs=np.array([[0.0], [2.0]]), targets=np.zeros(2))
    schema = infer_schema(split, ("type",), {"type": ("L", "M", "H")})
    assert schema.columns[0].categories == (0, 1, 2)
    assert schema.columns[0].named(2) == "H"


def test_repeated_identifiers_warn(blobs, splits):
    """A column that identified each example must go on doing so."""
    numbered = replace(splits, train=with_column(splits.train, 0, np.arange(300)))
    repeated = replace(splits, train=with_column(splits.train, 0, np.arange(300) // 3))
    found = violations(blobs, repeated, numbered)
    duplicate = next(item for item in found if item.kind == "duplicate")
    assert (duplicate.path, duplicate.count) == ("train.x0", 200)


def test_fractions_among_whole_numbers_warn(blobs, splits):
    """A column of whole numbers that gets fractions has changed its type."""
    counts = np.random.default_rng(0).integers(0, 1000, 300)
    whole = replace(splits, train=with_column(splits.train, 0, counts))
    halves = replace(splits, train=with_column(splits.train, 0, counts + 0.5))
    assert ("warning", "type", "train") in kinds(violations(blobs, halves, whole))


def test_target_among_the_inputs_warns(blobs, splits):
    """A column from which the target follows is no input."""
    leaking = replace(splits, train=with_column(splits.train, 2, 5 - 3 * splits.train.targets))
    found = violations(blobs, leaking)
    assert {(item.kind, item.path) for item in found} >= {("leak", "train.x2")}


def test_too_little_data_warns(blobs, splits):
    """A training split of less than half of the reference's size is noticed."""
    few = Split(inputs=splits.train.inputs[:149], targets=splits.train.targets[:149])
    found = violations(blobs, replace(splits, train=few), splits)
    volume = next(item for item in found if item.kind == "volume")
    assert (volume.expected, volume.seen) == ("150 rows or more", "149 rows")


def test_unknown_targets_stop_a_run(blobs, splits):
    """A label that the reference did not have is an error in training data."""
    labels = splits.train.targets.copy()
    labels[:7] = 3
    odd = replace(splits, train=Split(inputs=splits.train.inputs, targets=labels))
    found = violations(blobs, odd, splits)
    category = next(item for item in found if item.path == "train.targets")
    assert (category.severity, category.kind, category.count) == ("error", "category", 7)


def test_holes_may_vary_by_chance(blobs, splits):
    """A column with 10 % of holes may have 13 % another time, but not 30 %."""
    generator = np.random.default_rng(0)

    def with_holes(share):
        values = splits.train.inputs[:, 0].copy()
        values[generator.permutation(300)[: round(300 * share)]] = np.nan
        return replace(splits, train=with_column(splits.train, 0, values))

    reference = with_holes(0.1)
    assert ("error", "missing", "train") not in kinds(
        violations(blobs, with_holes(0.13), reference)
    )
    assert ("error", "missing", "train") in kinds(violations(blobs, with_holes(0.3), reference))


def test_strict_makes_warnings_errors(blobs, splits):
    """Whoever wants no warning to pass says so in the settings."""
    far = replace(splits, test=with_column(splits.test, 2, 1e6))
    strict = DataConfig(source="1", strict=True)
    found = check(far, infer_schema(splits.train), profile_of(blobs, splits.train), strict)
    assert found
    assert {item.severity for item in found} == {"error"}


def test_schema_is_read_by_tensorflow_data_validation():
    """The exported text is TFDV's own message: types, domains, presence, drift."""
    schema_pb2 = pytest.importorskip("tensorflow_metadata.proto.v0.schema_pb2")
    from google.protobuf import text_format

    inputs = np.column_stack([[0, 1, 1, 2], [0.5, -1.5, 2.5, np.nan], [3.0, 1.0, 2.0, 1.0]])
    split = Split(inputs=inputs, targets=np.array([0.5, 0.25, 1.0, 0.0]))
    schema = infer_schema(split, ("type", "torque", "gear"), {"type": ("L", "M", "H")})
    read = text_format.Parse(to_tfdv(schema, CONFIG), schema_pb2.Schema())
    kind, torque, gear, target = read.feature
    assert (kind.type, list(kind.string_domain.value)) == (schema_pb2.BYTES, ["L", "M", "H"])
    assert (torque.float_domain.min, torque.float_domain.max) == (-1.5, 2.5)
    assert torque.presence.min_fraction == pytest.approx(0.75)
    assert (gear.type, gear.int_domain.max) == (schema_pb2.INT, 3)
    assert target.name == "target"
    assert 0 < target.drift_comparator.jensen_shannon_divergence.threshold < 0.1
