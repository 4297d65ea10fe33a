"""Two versions side by side in one server: canaries that fail nobody, shadows, sticky splits."""

import asyncio
import math

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.inference.app import InferenceApp
from minga.inference.comparing import Comparison, Mode
from minga.inference.repository import ModelRepository
from minga.inference.v2 import open_inference_pb2 as pb
from tests.serving.test_app import INFER, assert_refused, connect, decoded
from tests.serving.test_grpc import call, channel_to

BODY = b'{"inputs":[{"name":"input","datatype":"FP32","shape":[1,3],"data":[1,1,1]}]}'
OUTCOMES = "/v2/models/scaling/outcomes"


def comparison(mode: Mode, share: float = 0.5, **changes) -> Comparison:
    """Version 2 against version 1."""
    fields = {"id": "c", "model": "scaling", "baseline": "1", "challenger": "2", "salt": "s"}
    return Comparison(**fields | {"mode": mode, "share": share, "key": "x-minga-key"} | changes)


@pytest.fixture
def compared(write_model, models):
    """Serve version 1, which doubles, beside a version 2, and compare them."""

    def make(compare: Comparison, challenger: bytes | None = None) -> InferenceApp:
        content = models["scaling"](3) if challenger is None else challenger
        repository = ModelRepository()
        repository.apply([write_model(models["scaling"](2)), write_model(content, version="2")])
        app = InferenceApp(repository)
        app.service.side_by_side.declare([compare])
        return app

    return make


async def versions(client, count: int, **headers: str) -> list[str]:
    """Ask so often, and name the versions that answered."""
    answers = []
    for _ in range(count):
        answer = decoded(await client.post(INFER, content=BODY, headers=headers))
        factor = {"1": 2, "2": 3}[answer.model_version]
        np.testing.assert_array_equal(answer.outputs["output"], [[factor] * 3])
        answers.append(answer.model_version)
    return answers


def counts(app: InferenceApp):
    """Give what was counted for the baseline and for the challenger."""
    (roles,) = app.service.side_by_side.counts().values()
    return roles["baseline"], roles["challenger"]


async def test_a_canary_answers_its_share(compared):
    """About the share is answered, and counted, by the challenger; a version by number is not."""
    app = compared(comparison(Mode.CANARY, 0.25))
    async with connect(app) as client:
        answers = await versions(client, 400)
        for version in "12":
            path = f"/v2/models/scaling/versions/{version}/infer"
            assert decoded(await client.post(path, content=BODY)).model_version == version
        metrics = (await client.get("/metrics")).text
    baseline, challenger = counts(app)
    assert answers.count("2") == challenger.requests
    assert answers.count("1") == baseline.requests
    assert abs(challenger.requests - 100) < 5 * math.sqrt(400 * 0.25 * 0.75)
    assert challenger.predictions == [0.0] * challenger.requests, "the place of the largest"
    labels = '{mode="canary",model="scaling",version="2"}'
    assert f"minga_comparison_requests_total{labels} {challenger.requests}.0" in metrics
    assert f"minga_comparison_share{labels} 0.25" in metrics
    total = 'minga_inference_requests_total{model="scaling",status="200",version="2"} '
    assert f"{total}{challenger.requests + 1}.0" in metrics


@pytest.mark.parametrize("kind", ["gathering", "sum"], ids=["other-type", "other-inputs"])
async def test_a_canary_that_cannot_answer_fails_nobody(kind, compared, models):
    """Every request is answered all the same, by the baseline, and the failures are counted."""
    app = compared(comparison(Mode.CANARY, 0.5), models[kind]())
    async with connect(app) as client:
        assert await versions(client, 60) == ["1"] * 60
        assert_refused(await client.post(INFER, content=b'{"inputs": []}'), 400)
        wrong = BODY.replace(b"[1,3]", b"[1,2]").replace(b"[1,1,1]", b"[1,1]")
        for _ in range(20):
            assert_refused(await client.post(INFER, content=wrong), 400)
    baseline, challenger = counts(app)
    assert challenger.failures == challenger.requests > 0
    assert baseline.failures == 0, "a caller's mistake is no version's failure"
    assert challenger.requests + baseline.requests == 60


async def test_a_split_is_sticky(compared):
    """A key always gets the same version, by header or parameter; keys divide by the share."""
    app = compared(comparison(Mode.SPLIT, 0.5))
    async with connect(app) as client:
        seen = {}
        for number in range(40):
            key = f"user-{number}"
            (seen[key],) = set(await versions(client, 2, **{"x-minga-key": key}))
            parameter = BODY[:-1] + b',"parameters":{"x-minga-key":"%s"}}' % key.encode()
            answer = decoded(await client.post(INFER, content=parameter))
            assert answer.model_version == seen[key]
        assert await versions(client, 5) == ["1"] * 5, "without a key it is the baseline's"
    assert 8 <= list(seen.values()).count("2") <= 32
    assert sum(tally.requests for tally in counts(app)) == 120


async def test_outcomes_are_the_versions_that_gave_the_answers(compared):
    """Outcomes are counted by key, in whichever process; malformed ones are refused whole.

    Over gRPC as over HTTP.
    """
    app = compared(comparison(Mode.SPLIT, 0.5))
    compare = app.service.side_by_side.declared[0]
    keys = [f"user-{number}" for number in range(50)]
    outcomes = [{"key": key, "value": float(compare.is_challengers(key))} for key in keys]
    async with connect(app) as client:
        response = await client.post(OUTCOMES, json={"outcomes": outcomes})
        assert response.json() == {"counted": 50}
        for bad in (
            b"",
            b'{"outcomes": 1}',
            b'{"outcomes": [{"key": "a"}]}',
            b'{"outcomes": [{"key": 1, "value": 1}]}',
            b'{"outcomes": [{"key": "a", "value": "1"}]}',
            b'{"outcomes": [{"key": "a", "value": 1e300}]}',
        ):
            assert_refused(await client.post(OUTCOMES, content=bad), 400)
        assert_refused(await client.post("/v2/models/no/outcomes", json={"outcomes": []}), 404)
        app.service.side_by_side.declare([])
        response = await client.post(OUTCOMES, json={"outcomes": outcomes})
        assert response.json() == {"counted": 0}
    app.service.side_by_side.declare([compare])
    async with channel_to(app) as channel:
        told = [pb.ReportOutcomesRequest.Outcome(**outcome) for outcome in outcomes]
        assert await report(channel, "scaling", told) == 50
        baseline, challenger = counts(app)
        assert baseline.outcomes.count + challenger.outcomes.count == 50
        assert (baseline.outcomes.mean, challenger.outcomes.mean) == (0.0, 1.0)
        broken = pb.ReportOutcomesRequest.Outcome(key="a", value=float("nan"))
        for model, wrong, status in (
            ("scaling", [*told, broken], grpc.StatusCode.INVALID_ARGUMENT),
            ("scaling", told * 2000, grpc.StatusCode.INVALID_ARGUMENT),  # more than 1 MB
            ("no", told, grpc.StatusCode.NOT_FOUND),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await report(channel, model, wrong)
            assert refused.value.code() is status
        assert sum(tally.outcomes.count for tally in counts(app)) == 50


async def report(channel, model: str, outcomes) -> int:
    """Report outcomes over gRPC; gives how many were counted."""
    method = channel.unary_unary(
        "/inference.OutcomeService/ReportOutcomes",
        request_serializer=pb.ReportOutcomesRequest.SerializeToString,
        response_deserializer=pb.ReportOutcomesResponse.FromString,
    )
    request = pb.ReportOutcomesRequest(model_name=model, outcomes=outcomes)
    return (await method(request)).counted


async def test_a_shadow_answers_nobody_and_is_compared(compared):
    """The baseline answers all; the shadow computes as many, and disagreements are counted."""
    app = compared(comparison(Mode.SHADOW, 1.0))
    async with connect(app) as client:
        assert await versions(client, 30) == ["1"] * 30
        await asyncio.gather(*app.service.side_by_side.shadows)
    baseline, challenger = counts(app)
    assert baseline.requests == 30
    assert 0 < challenger.requests <= 30
    assert challenger.pairs == challenger.agreements == challenger.requests, "the largest is first"
    assert challenger.gap.mean == pytest.approx(1.0), "three times against twice"


async def test_a_shadow_that_fails_is_counted_and_noticed_by_nobody(compared, models):
    """Errors of the shadow stay in its counts."""
    app = compared(comparison(Mode.SHADOW, 1.0), models["sum"]())
    async with connect(app) as client:
        assert await versions(client, 5) == ["1"] * 5
        await asyncio.gather(*app.service.side_by_side.shadows)
    assert counts(app)[1].failures == 5


async def test_a_split_over_grpc(compared):
    """Over gRPC the key is sent as a parameter of the request."""
    app = compared(comparison(Mode.SPLIT, 0.5))
    compare = app.service.side_by_side.declared[0]
    async with channel_to(app) as channel:
        for number in range(10):
            key = f"user-{number}"
            request = pb.ModelInferRequest(model_name="scaling")
            request.inputs.add(name="input", datatype="FP32", shape=[1, 3])
            request.raw_input_contents.append(np.ones(3, np.float32).tobytes())
            request.parameters["x-minga-key"].string_param = key
            answer = await call(channel, "ModelInfer", request, pb.ModelInferResponse)
            assert answer.model_version == ("2" if compare.is_challengers(key) else "1")


async def test_declaring_again_keeps_the_counts(compared):
    """A comparison that goes on keeps what it counted; another stage begins anew."""
    app = compared(comparison(Mode.CANARY, 0.5))
    async with connect(app) as client:
        await versions(client, 10)
        app.service.side_by_side.declare([comparison(Mode.CANARY, 0.5)])
        assert sum(tally.requests for tally in counts(app)) == 10
        app.service.side_by_side.declare([comparison(Mode.CANARY, 0.9, id="next")])
        assert sum(tally.requests for tally in counts(app)) == 0


@given(key=st.text(), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_growing_share_moves_nobody_back(key, shares):
    """Who got the challenger at a share gets it at every larger one, in every process."""
    low, high = (comparison(Mode.CANARY, share) for share in sorted(shares))
    assert low.is_challengers(key) <= high.is_challengers(key)
    assert low.is_challengers(key) == comparison(Mode.CANARY, low.share).is_challengers(key)
