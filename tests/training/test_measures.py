"""Entropy, information, columns and labels that look wrong, and the page that shows them."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minga.training import Split, Splits
from minga.training.config import DataConfig
from minga.training.data import DataReport, check, digest_of, profile_of
from minga.training.data.measures import (
    codes_of,
    entropy,
    measure_split,
    mutual_information,
    suspected_labels,
)
from minga.training.data.report import render
from minga.training.data.tables import matrix
from minga.training.schema import infer_schema
from minga.training.selection.features import Feature, FeatureReport

CREDIT = Path(__file__).parents[3] / "shared" / "data" / "credit_default_tw.csv.gz"

codes = arrays(np.int64, st.integers(2, 60), elements=st.integers(0, 5))


@pytest.mark.parametrize(
    ("counts", "bits"),
    [((1, 1), 1), ((1, 1, 1, 1), 2), ((5,), 0), ((3, 1), 2 - 0.75 * math.log2(3))],
)
def test_entropy_is_that_of_the_textbook(counts, bits):
    """A fair coin has 1 bit, four equal sides 2, a certain outcome none, 3 to 1 has 0.811."""
    numbered = np.repeat(np.arange(len(counts)), np.array(counts) * 100)
    assert entropy(numbered) == pytest.approx(bits)


@given(codes)
def test_entropy_is_within_its_bounds(numbered):
    """Entropy is at least 0 and at most the logarithm of the number of bins."""
    assert -1e-12 <= entropy(numbered) <= math.log2(len(np.unique(numbered))) + 1e-9


def test_information_of_a_noisy_channel():
    """A fair bit over a channel that flips 11 % of the time carries 1 - H(0.11) bits."""
    generator = np.random.default_rng(0)
    sent = generator.integers(0, 2, 200_000)
    received = sent ^ (generator.random(200_000) < 0.11)
    noise = -(0.11 * math.log2(0.11) + 0.89 * math.log2(0.89))
    assert mutual_information(sent, received) == pytest.approx(1 - noise, abs=0.01)


def test_independent_columns_carry_nothing():
    """Without the correction independent columns would seem to tell something."""
    generator = np.random.default_rng(0)
    told = [
        mutual_information(generator.integers(0, 20, 2000), generator.integers(0, 2, 2000))
        for _ in range(50)
    ]
    assert np.mean(told) < 0.002


def test_a_copy_tells_everything():
    """A column tells all of itself; missing values are a value of their own."""
    values = np.array([1.0, 2.0, np.nan, 2.0] * 100)
    assert len(np.unique(codes_of(values))) == 3
    numbered = codes_of(values)
    assert mutual_information(numbered, numbered) == pytest.approx(entropy(numbered), abs=0.01)


@pytest.fixture(scope="module")
def split():
    """Informative, useless, constant and doubled columns; 20 of 600 labels are wrong."""
    generator = np.random.default_rng(3)
    targets = generator.integers(0, 2, 600)
    signal = generator.normal(size=600) + 4 * targets
    columns = [signal, generator.normal(size=600), np.zeros(600), 5 - 2 * signal]
    columns[2][:3] = 1
    return Split(inputs=np.column_stack(columns), targets=targets.astype(np.float32))


NAMES = ("signal", "noise", "constant", "copy")


def test_columns_that_look_wrong_are_found(split):
    """Near-constant columns and doubles are named; only the signal tells of the target."""
    measures = measure_split(split, NAMES, look_for_noise=False)
    assert measures.near_constant == ("constant",)
    assert measures.duplicates == (("signal", "copy"),)
    told = {item.name: item.share_of_target for item in measures.columns}
    assert told["signal"] > 0.8
    assert told["noise"] < 0.02
    assert measures.target_entropy_bits == pytest.approx(1, abs=0.01)


def test_wrong_labels_are_found(split):
    """Of 20 flipped labels nearly all are suspected, and few others are."""
    flipped = np.random.default_rng(0).permutation(600)[:20]
    labels = split.targets.copy()
    labels[flipped] = 1 - labels[flipped]
    found, note = suspected_labels(Split(inputs=split.inputs, targets=labels))
    suspects = {item.index for item in found}
    assert len(suspects & set(flipped)) >= 17
    assert len(suspects - set(flipped)) <= 20
    first = found[0]
    assert first.confidence == max(item.confidence for item in found)
    assert first.given != first.likely
    assert "among 600 examples" in note


def test_noise_needs_classes(split):
    """Regression targets and classes of a few examples are not looked at, and it is said why."""
    values = Split(inputs=split.inputs, targets=split.inputs[:, 0])
    assert suspected_labels(values) == ((), "the target is no class")
    rare = split.targets.copy()
    rare[0] = 7
    assert "fewer than 10" in suspected_labels(Split(inputs=split.inputs, targets=rare))[1]


@pytest.mark.skipif(not CREDIT.exists(), reason="../shared/data is not there")
def test_real_data_is_measured():
    """In Taiwan's credit defaults of 2005 the last payment's delay tells the most."""
    import pandas as pd
    import pyarrow as pa

    frame = pd.read_csv(CREDIT)
    names = tuple(frame.columns[1:-1])
    inputs = matrix(pa.Table.from_pandas(frame), names)
    split = Split(inputs=inputs, targets=frame[frame.columns[-1]].to_numpy())
    measures = measure_split(split, names, look_for_noise=False)
    best = max(measures.columns, key=lambda item: item.information_bits)
    assert best.name == "PAY_0"
    assert 0.05 < best.share_of_target < 0.2


def report_of(task, splits):
    """Check and measure as the command does."""
    schema, profile = infer_schema(splits.train, task.columns), profile_of(task, splits.train)
    found = DataReport(
        task="<b>plant</b>",
        source="a.csv",
        digest=digest_of(splits),
        num_examples={"train": len(splits.train), "validation": 1, "test": len(splits.test)},
        data_schema=schema,
        profile=profile,
        violations=check(splits, schema, profile, DataConfig(source="a.csv")),
        reference="itself",
    )
    return found, measure_split(splits.train, task.columns)


def test_page_shows_the_columns_that_models_need(blobs, splits):
    """A proposal is a table of its own on the page; without one there is none."""
    found = report_of(blobs, splits)
    feature = Feature(
        name="x0", information_bits=0.1, worth=0.25, num_useful=5, proposed=True, note="<i>"
    )
    proposal = FeatureReport(
        metric="accuracy",
        num_folds=5,
        features=(feature,),
        with_all=0.9,
        with_proposed=0.91,
        behind=-0.01,
        error=0.02,
    )
    page = render(*found, splits, proposal)
    assert "Columns that models need" in page
    assert "<td>+0.2500</td><td>5 of 5</td><td>yes, &lt;i&gt;</td>" in page
    assert "Columns that models need" not in render(*found, splits)


def test_page_is_whole_and_loads_nothing(blobs, splits):
    """The page has a picture of each column, escapes what it is given, and refers to nothing."""
    page = render(*report_of(blobs, splits), splits)
    assert page.count("<svg") == 5
    assert "&lt;b&gt;plant&lt;/b&gt;" in page
    assert "<b>plant</b>" not in page
    for outside in ("http://", "https://", "<script", "<link", "@import", "url("):
        assert outside not in page


def test_suspect_images_are_shown(blobs):
    """Of images those with suspect labels are in the page, as PNG."""
    generator = np.random.default_rng(0)
    labels = np.arange(120) % 2
    images = generator.integers(0, 60, (120, 1, 8, 8)).astype(np.uint8)
    images[labels == 1] += 120
    labels[:3] = 1 - labels[:3]
    part = Split(inputs=images, targets=labels)
    splits = Splits(train=part, validation=part, test=part)
    found, measures = report_of(blobs, splits)
    assert {item.index for item in measures.suspected_labels} >= {0, 1, 2}
    assert render(found, measures, splits).count("data:image/png;base64,") >= 3
