"""A schema as TensorFlow Data Validation reads it.

Source: tensorflow/metadata, tensorflow_metadata/proto/v0/schema.proto. Only the message is needed,
not TensorFlow: `pip install 'minga[tfdv]'`.
"""

import math
from typing import Any

from minga.training.config import DataConfig
from minga.training.schema import Column, Schema


def to_tfdv(schema: Schema, config: DataConfig) -> str:
    """Write a schema as the text of a `tensorflow.metadata.v0.Schema`.

    Inputs keep their names; the target is the feature `target`. A column's share of present
    values becomes its presence, its categories the values of an integer's or a string's domain.
    Drift is a Jensen-Shannon divergence there: to second order the stability index times
    1 / (8 ln 2), in bits.

    Raises:
        ModuleNotFoundError: tensorflow-metadata is not installed.
    """
    from google.protobuf import text_format
    from tensorflow_metadata.proto.v0 import schema_pb2

    message = schema_pb2.Schema()
    for column in schema.columns:
        _describe(message.feature.add(), column, config)
    for column in schema.targets:
        name = column.name if column.name == "target" else f"target_{column.name}"
        _describe(message.feature.add(), column.model_copy(update={"name": name}), config)
    return str(text_format.MessageToString(message))


def _describe(feature: Any, column: Column, config: DataConfig) -> None:
    from tensorflow_metadata.proto.v0 import schema_pb2

    feature.name = column.name
    feature.value_count.min = feature.value_count.max = 1
    feature.presence.min_fraction = 1 - max(config.max_missing, column.missing)
    divergence = config.max_drift / (8 * math.log(2))
    feature.drift_comparator.jensen_shannon_divergence.threshold = divergence
    if column.names:
        feature.type = schema_pb2.BYTES
        feature.string_domain.value.extend(column.names)
    elif column.whole:
        feature.type = schema_pb2.INT
        feature.int_domain.min, feature.int_domain.max = int(column.low), int(column.high)
        feature.int_domain.is_categorical = column.kind == "category"
    else:
        feature.type = schema_pb2.FLOAT
        feature.float_domain.min, feature.float_domain.max = column.low, column.high
