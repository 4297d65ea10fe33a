"""Frozen bytes: a change here means that old and new devices no longer understand each other."""

from hashlib import sha256

import numpy as np
import pytest

from minga.federation import wire
from minga.federation.analytics import Part, Question
from minga.federation.plain import update_to_bytes
from minga.federation.secagg import agreement
from minga.federation.secagg.device import Step
from minga.federation.secagg.encoding import encode
from minga.federation.secagg.graph import neighbours
from minga.federation.secagg.packing import pack
from minga.federation.secagg.plan import RoundPlan, context_digest
from minga.federation.secagg.rotation import rotate
from minga.federation.secagg.shamir import split
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.work import Evaluation, Method

from .simulator import Simulation, make_plan, names, seeded_bytes

MODEL = bytes(range(32))
MEASURE = Evaluation(metrics=("auc", "loss"), clip=2.0)
ASK = Question(
    parts=(
        Part(column="heat", low=-50.0, high=150.0),
        Part(column="load", low=0.0, high=1.0, edges=(0.0, 0.5, 1.0)),
    )
)


def test_encoding():
    """Type, length, value: nothing else."""
    assert encode("p", b"\xff", "a", True, -12, 0.5) == (
        b"s\0\0\0\x0fminga secagg v1s\0\0\0\x01px\0\0\0\x01\xffs\0\0\0\x01a"
        b"b\0\0\0\x01\x01i\0\0\0\x03-12f\0\0\0\x08\x3f\xe0\0\0\0\0\0\0"
    )


def test_digests():
    """The digests of a plan and of a context."""
    assert (
        make_plan().digest.hex()
        == "3a74797f2723e268b60da40a2d7b5a2f4bd6ad061cf3268ab17acef5da4e9dae"
    )
    context = context_digest(bytes(32), {"lr": 0.1, "epochs": 2, "resume": False, "loss": "mse"})
    assert context.hex() == "e33f49d37bbe90c731443b578372f6bfa9fbbf0c0fe9f9d3c5fa37efd7963dd3"


def test_subjects():
    """What a plan binds of how a model is learnt, and of what is asked in the place of training."""
    heads = Method(personal=("head.*", "norm")).subject(MODEL)
    assert [
        digest.hex()
        for digest in (
            Method().subject(MODEL),
            heads,
            Method(scaffold=True).subject(MODEL),
            MEASURE.subject(MODEL),
            MEASURE.subject(heads),
            ASK.subject(b""),
        )
    ] == [
        MODEL.hex(),
        "345ba11aa2f5d2c0a5e4b0913075b838c915f9a618bb4600c10490318ec227ff",
        "54bc28db3ff0621b89e18c33b353bf4af99a9775f5cdfbd01d95d096f9f5110d",
        "a29225f829983e3c085b4c76662bd610634ff5dbff1376782f6e49d9ef9980a3",
        "290a9e0569195763aa5642b453a9ad1f6189eb574879535515c76a1a200b5850",
        "a2dc621177f0e07d9d2c08a1f184be8342f46500a55805b77cb7d7c4f4ca69ff",
    ]


@pytest.mark.parametrize(
    ("asked", "digest"),
    [
        ({}, "7cce0b56cbf24f4b8de7f7ca44e8f55dbdd5bfd5a6828bd28f094adb019c0022"),
        (
            {"personal": ["head.*", "norm"], "scaffold": True},
            "6e9c3aa78e44dcafb39f093f0162b269f83257bd2e6894bb377f80da61c6c1e6",
        ),
        (
            {"evaluation": {"metrics": ["auc", "loss"], "clip": 2.0}},
            "351556637a86abfacea21daf63baac11c802c6dd43943a450d0a4f69295ce522",
        ),
        (
            {"private_update": {"max_norm": 4.0}},
            "9c9e718173e3e3a645497ca72b187361bcb962872bd602511aacbec1ea766e3d",
        ),
        (
            {"private_update": {"max_norm": 4.0, "variance": 1000}},
            "ee51644658df91d96021327fb1b5e932e49c1d8fbc1c4d5c8de0fb255dad2687",
        ),
        (
            {"private_update": {"max_norm": 4.0, "variance": 1000, "bit_level": 20}},
            "eed4be4ba1b5507f8ef9e8c5f89e637a0113ec203e47d0ddd60cebb75a89ad18",
        ),
    ],
)
def test_contexts(asked: dict[str, object], digest: str):
    """What a plan binds of an invitation: the subject, the training, and how updates are hidden."""
    plan = make_plan()
    invite = pb.RoundInvite(
        round_id=plan.round_id.hex(),
        plan=wire.plan_to_wire(plan),
        model_digest=MODEL,
        training=wire.config_to_wire({"lr": 0.1, "epochs": 2, "shuffle": True, "loss": "mse"}),
        **asked,
    )
    read = wire.plan_of_invite(invite)
    assert isinstance(read, RoundPlan)
    assert read.context_digest.hex() == digest


def test_what_is_told_of_data():
    """A device's vectors of metrics, one of which it lacks, and of columns with missing values."""
    metrics = MEASURE.vector_of({"loss": 17.0})
    assert metrics.tobytes().hex() == "00000000000000400000000000000040"
    columns = {
        "heat": np.array([50.0, np.nan, -90.0, 100.0]),
        "load": np.array([0.25, 0.5, -1.0, 2.0]),
    }
    vector, num_rows = ASK.answer(columns)
    assert num_rows == 4
    assert (
        vector.tobytes().hex()
        == "0000403f0000a03e0000503e0000803f0000e03e0000a83e0000803e0000803e0000803e0000803e"
    )


def test_plain_update():
    """The blob of an update in a plain round."""
    update = np.array([1.0, -0.5, 0.1], np.float32)
    assert bytes(update_to_bytes(update)).hex() == "0000803f000000bfcdcccc3d"


def test_graph():
    """The ring over ten devices."""
    assert neighbours(names(10), 2, b"seed")["device-00"] == ("device-03", "device-09")


def test_keys():
    """A pairwise mask, a self mask, a commitment, and a device's place in the field."""
    plan, draw = make_plan(), seeded_bytes((0, "device-00"))
    adverts = Simulation().until(Step.ADVERTISE).adverts
    seed, mask_pair = draw(32), agreement.KeyPair.from_secret(draw(32))
    pair = agreement.pair_mask(plan, mask_pair, adverts["device-00"], adverts["device-01"])
    assert pair.key.hex() == "c662960f4cc303bc38a183e9d2b36af9"
    assert (
        agreement.self_mask(plan, "device-00", seed).key.hex() == "3e4e253b845463b13316af1ed4e18edd"
    )
    assert (
        adverts["device-00"].self_seed_commitment.hex()
        == "61a4a4c2c929149b97f0c890ec936ca8c7fb653cfcde738450d1fa05044de722"
    )
    assert (
        hex(agreement.share_place("device-00"))
        == "0x79a71c64278bd4ad7fcfc8b3abc313d614945ac34dd3b5955b9b494d1045fef8"
    )


def test_shares():
    """A share of a secret, from given randomness."""
    share = split(bytes(range(32)), 3, [1, 2, 3], seeded_bytes(0))[2]
    assert share.hex() == "003298fa6735f1b372d3ac226679ab05503c47ae83594a3af8070cc0e766dd2a75"


def test_packing():
    """Five values of 11 bits: a bit stream, lowest bits first, padded to eight values."""
    values = np.array([1, 2, 0x7FF, 0x400, 0x123], np.uint32)
    assert pack(values, 11).hex() == "0110c0ff01381200000000"


def test_rotated_plan():
    """The digest of a plan that rotates, and the key of its signs."""
    plan = make_plan(rotate=True)
    assert plan.digest.hex() == "b0ebae08c7c1989198d1a86f7d0d6919c2ab0da4b781a2ca2ecd0b42b7751049"
    assert plan.rotation_key.hex() == "ce3bb7b2a40a7bc0a38e2627d4911bec"


def test_rotation():
    """One value of a hundred, in blocks of 64: 64 values of an eighth, signs and places as told."""
    vector = np.zeros(100, np.float32)
    vector[5] = 1.0
    rotated = rotate(vector, bytes(range(16)))
    assert set(rotated[1::2]) == {-0.125, 0.125}
    assert not rotated[0::2].any()
    assert np.packbits(rotated[1::2] < 0, bitorder="little").tobytes().hex() == "cccccccccccccccc"


def test_a_whole_round():
    """Everything that eight devices send in a round, from given randomness."""
    assert sent_in(Simulation()) == {
        "adverts": "2d1e236641fc60c4360e274a4bdade6d",
        "shares": "bd0e30a740a0f4f3eba94d09e8cfe100",
        "uploads": "0d0bf8c720584e4d8de7733b9b2b8f5f",
        "confirmations": "f93fac58aceec48512bb67afa6920852",
        "reveals": "17a247a2b18f942ba2a822dab3b16796",
    }


def test_a_whole_rotated_round():
    """The same of a round whose updates are rotated: other keys, longer uploads."""
    plan = make_plan(rotate=True)
    assert plan.vector_length == 65
    assert sent_in(Simulation(plan)) == {
        "adverts": "ed36872aa8fcda495f6e904e4c27f98e",
        "shares": "69fde594eb38d932a1b0e3e6cc4857da",
        "uploads": "0ae36432284d93fd674f00825c6a5e43",
        "confirmations": "34e09fd9896a94f0f5b3a96397cd5129",
        "reveals": "17a247a2b18f942ba2a822dab3b16796",
    }


def sent_in(simulation: Simulation) -> dict[str, str]:
    """Run a round, and digest what was sent in each step."""
    simulation.run()
    sent = {
        "adverts": [advert.signature for advert in simulation.adverts.values()],
        "shares": [share.ciphertext for sent in simulation.shares.values() for share in sent],
        "uploads": list(simulation.uploads.values()),
        "confirmations": [one.signature for one in simulation.confirmations.values()],
        "reveals": [
            share for one in simulation.reveals.values() for share in one.self_seed_shares.values()
        ],
    }
    return {step: sha256(b"".join(parts)).hexdigest()[:32] for step, parts in sent.items()}
