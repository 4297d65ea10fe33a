"""What the application does beyond the protocol's core: statistics, repository, sizes, patience."""

import asyncio
import gzip
import threading

import numpy as np
import orjson
import pytest

from minga.inference.limits import Limits
from minga.inference.protocol import JSON_SIZE_HEADER
from tests.serving.test_app import (
    GOOD,
    INFER,
    ROWS,
    TENSOR,
    assert_refused,
    connect,
    decoded,
)


async def test_statistics_of_all_of_one_and_of_a_version(make_app, models):
    """What a version has done is counted apart; unknown models are 404."""
    app = make_app(scaling=models["scaling"](1), other=models["scaling"](2))
    async with connect(app) as client:
        for _ in range(3):
            await client.post(INFER, content=GOOD)
        await client.post(INFER, content=b"{")
        every = (await client.get("/v2/models/stats")).json()["model_stats"]
        one = (await client.get("/v2/models/scaling/stats")).json()["model_stats"]
        version = (await client.get("/v2/models/scaling/versions/1/stats")).json()["model_stats"]
        assert_refused(await client.get("/v2/models/no/stats"), 404)
        assert_refused(await client.get("/v2/models/scaling/versions/9/stats"), 404)
    assert [entry["name"] for entry in every] == ["scaling", "other"]
    assert every[:1] == one == version
    assert one[0]["inference_count"] == 6
    assert one[0]["execution_count"] == 3
    stats = one[0]["inference_stats"]
    assert (stats["success"]["count"], stats["fail"]["count"]) == (3, 1)
    assert 0 < stats["compute_infer"]["ns"] <= stats["success"]["ns"]
    assert every[1]["inference_stats"]["success"] == {"count": 0, "ns": 0}


async def test_the_sizes_of_requests_do_not_fill_the_memory(make_app, models):
    """Runs of more than 1024 rows are counted by powers of two, since callers choose the rows."""
    app = make_app(scaling=models["scaling"](1))
    headers = {JSON_SIZE_HEADER: "0"}
    async with connect(app) as client:
        for rows in (1024, 1025, 1500, 2048, 2049):
            await client.post(INFER, content=bytes(12 * rows), headers=headers)
        stats = (await client.get("/v2/models/scaling/stats")).json()["model_stats"][0]
    batches = {one["batch_size"]: one["compute_infer"]["count"] for one in stats["batch_stats"]}
    assert batches == {1024: 1, 2048: 3, 4096: 1}


async def test_a_model_is_unloaded_and_loaded_again(make_app, models):
    """Where callers may: an unloaded model is listed, answers nothing, and comes back."""
    limits = Limits(model_control=True)
    app = make_app(limits, scaling=models["scaling"](2), other=models["scaling"](3))
    repository = "/v2/repository"
    async with connect(app) as client:
        assert (await client.post(f"{repository}/models/scaling/unload")).status_code == 200
        index = (await client.post(f"{repository}/index")).json()
        ready = (await client.post(f"{repository}/index", json={"ready": True})).json()
        assert_refused(await client.post(INFER, content=GOOD), 404)
        assert_refused(await client.get("/v2/models/scaling/ready"), 404)
        assert (await client.get("/v2/models")).json() == {"models": ["other"]}
        assert (await client.get("/v2/health/ready")).status_code == 200
        loaded = await client.post(f"{repository}/models/scaling/load", json={})
        again = await client.post(INFER, content=GOOD)
        for path in ("load", "unload"):
            assert_refused(await client.post(f"{repository}/models/no/{path}"), 404)
        for body in (b"[]", b"{", b'{"ready": 1}'):
            assert_refused(await client.post(f"{repository}/index", content=body), 400)
        override = {"parameters": {"config": "{}"}}
        assert_refused(await client.post(f"{repository}/models/other/load", json=override), 400)
    entry = {"version": "1", "state": "READY", "reason": ""}
    other = entry | {"name": "other"}
    scaling = entry | {"name": "scaling", "state": "UNAVAILABLE", "reason": "unloaded"}
    assert index == [scaling, other]
    assert ready == [other]
    assert loaded.status_code == 200
    np.testing.assert_array_equal(decoded(again).outputs["output"], ROWS * 2)


async def test_callers_may_not_unload_unless_told(make_app, models):
    """By default nobody can take a model away."""
    async with connect(make_app(scaling=models["scaling"](1))) as client:
        for path in ("load", "unload"):
            response = await client.post(f"/v2/repository/models/scaling/{path}")
            assert_refused(response, 403)
        assert (await client.post(INFER, content=GOOD)).status_code == 200


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br", "gzip"),
        ("deflate;q=0.5, gzip;q=0", "deflate"),
        ("br", None),
        ("identity", None),
        ("", None),
    ],
)
async def test_long_answers_are_compressed_for_who_asks(accepted, coding, make_app, models):
    """A long answer is deflated as the caller accepts, and is the same; a short one never is."""
    app = make_app(scaling=models["scaling"](2))
    rows = np.ones((1000, 3), np.float32)
    body = orjson.dumps({"inputs": [TENSOR | {"shape": [1000, 3], "data": rows.ravel().tolist()}]})
    async with connect(app) as client:
        headers = {"accept-encoding": accepted}
        long = await client.post(INFER, content=body, headers=headers)
        short = await client.post(INFER, content=GOOD, headers=headers)
    assert long.headers.get("content-encoding") == coding
    assert "content-encoding" not in short.headers
    np.testing.assert_array_equal(decoded(long).outputs["output"], rows * 2)
    if coding:
        assert int(long.headers["content-length"]) < len(body) / 10


async def test_a_slow_body_is_given_up(make_app, models):
    """A body that does not come in time is 408, and its memory is free again."""
    app = make_app(Limits(body_timeout_s=0.05), scaling=models["scaling"](1))

    async def never():
        yield GOOD[:10]
        await asyncio.sleep(10)

    async with connect(app) as client:
        assert_refused(await client.post(INFER, content=never()), 408)


async def test_bodies_share_a_bounded_memory(make_app, models):
    """While other bodies fill the memory a request is 503 with Retry-After; then it is free."""
    limits = Limits(max_body_bytes=10_000, max_pending_bytes=15_000, body_timeout_s=5)
    app = make_app(limits, scaling=models["scaling"](1))
    begun, release = asyncio.Event(), asyncio.Event()

    async def slow():
        yield b" " * 9_000
        begun.set()
        await release.wait()
        yield GOOD

    async with connect(app) as client:
        first = asyncio.create_task(client.post(INFER, content=slow()))
        await begun.wait()
        await asyncio.sleep(0)
        refused = await client.post(INFER, content=b" " * 9_000 + GOOD)
        release.set()
        assert (await first).status_code == 200
        again = await client.post(INFER, content=b" " * 9_000 + GOOD)
    assert_refused(refused, 503)
    assert refused.headers["retry-after"] == "1"
    assert again.status_code == 200


async def test_what_bodies_inflate_to_takes_of_the_memory(make_app, models):
    """A kilobyte that inflates to a megabyte counts as the megabyte, for as long as it waits."""
    rows = np.zeros((100_000, 3), np.float32)
    limits = Limits(max_body_bytes=rows.nbytes, max_pending_bytes=2 * rows.nbytes, num_threads=1)
    app = make_app(limits, scaling=models["scaling"](1))
    bomb = gzip.compress(rows.tobytes())
    headers = {"content-encoding": "gzip", JSON_SIZE_HEADER: "0"}
    release = threading.Event()
    app.service._threads.submit(release.wait)
    async with connect(app) as client:
        first = asyncio.create_task(client.post(INFER, content=bomb, headers=headers))
        try:
            async with asyncio.timeout(10):
                while app.service._budget._left > rows.nbytes:
                    await asyncio.sleep(0.01)
                refused = await client.post(INFER, content=bomb, headers=headers)
        finally:
            release.set()
            await first
        again = await client.post(INFER, content=bomb, headers=headers)
    assert_refused(refused, 503)
    assert (first.result().status_code, again.status_code) == (200, 200)


@pytest.mark.parametrize("coding", ["identity", "gzip"])
@pytest.mark.parametrize(
    "path", ["/v2/repository/index", "/v2/models/scaling/outcomes"], ids=["index", "outcomes"]
)
async def test_what_is_no_tensor_is_short(path, coding, make_app, models):
    """Long lists where a few options belong are refused before they are read as JSON.

    They would be read on the event loop, where everybody waits for them.
    """
    body = b'{"ready": false, "outcomes": [' + b"[]," * 1_000_000 + b"0]}"
    sent = gzip.compress(body) if coding == "gzip" else body
    async with connect(make_app(scaling=models["scaling"](1))) as client:
        response = await client.post(path, content=sent, headers={"content-encoding": coding})
        assert_refused(response, 413)
        assert (await client.post("/v2/repository/index", content=b"{}")).status_code == 200
