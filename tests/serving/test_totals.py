"""Series of many replicas as those of one service: sums that never fall, whoever comes or goes."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from minga.serving.totals import SILENT_S, Family, Given, Keepsake, Totals, families_of

TOTAL = ("requests_total", ())


def counted(value: float, name: str = "requests") -> list[Family]:
    """One counter, as a replica tells it."""
    return [Family(name=name, text="", kind="counter", samples={(f"{name}_total", ()): value})]


def gauge(value: float, name: str = "minga_x") -> list[Family]:
    """One gauge, as a replica tells it."""
    return [Family(name=name, text="", kind="gauge", samples={(name, ()): value})]


def whole(totals: Totals, now: float = 0.0) -> dict:
    """Every series of the whole."""
    return {key: value for one in totals.families(now) for key, value in one.samples.items()}


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["ask", "tell", "end", "kill"]))))
def test_the_sum_is_what_was_told_and_never_falls(steps):
    """Replicas count, tell, end and are killed at random: nothing told is lost or told twice."""
    totals, lives, counts, told = Totals(), [0] * 4, [0] * 4, {}
    seen = 0.0
    for who, what in steps:
        name = f"{who}-{lives[who]}"
        if what == "ask":
            counts[who] += 1
        elif what == "kill":
            lives[who], counts[who] = lives[who] + 1, 0
        else:
            totals.hear(name, counted(counts[who]), 0.0)
            told[name] = counts[who]
            if what == "end":
                totals.leave(name)
                lives[who], counts[who] = lives[who] + 1, 0
        now = totals.sums.get("requests", {}).get(TOTAL, 0.0)
        assert now == sum(told.values())
        assert now >= seen
        seen = now


def test_lost_sums_come_back_from_those_who_heard_them():
    """The actor died with what a dead replica had told: two others remember, and nothing falls."""
    lost = Totals()
    lost.hear("dead", counted(100), 0.0)
    lost.hear("a", counted(10), 0.0)
    of_a = Keepsake(sums={"requests": {TOTAL: 110.0}}, told=counted(10))
    lost.hear("b", counted(5), 0.0)
    of_b = Keepsake(sums={"requests": {TOTAL: 115.0}}, told=counted(5))
    new = Totals()
    new.restore("b", of_b, 1.0)
    new.hear("b", counted(6), 1.0)
    assert whole(new)[TOTAL] == 116
    new.restore("a", of_a, 1.0)
    new.hear("a", counted(12), 1.0)
    assert whole(new)[TOTAL] == 118


def test_a_count_that_begins_anew_goes_on():
    """A comparison's next stage counts from zero in each replica; the sum goes on, then ends."""
    totals, name = Totals(), "minga_comparison_requests"
    for value in (40, 50, 0, 7):
        totals.hear("a", counted(value, name), 0.0)
    totals.hear("b", counted(3, name), 0.0)
    assert whole(totals) == {(f"{name}_total", ()): 60}
    for who in "ab":
        totals.hear(who, [Family(name=name, text="", kind="counter", samples={})], 0.0)
    assert whole(totals) == {}


def test_what_is_common_is_told_once():
    """Windows are judged over all replicas, so each tells their whole number."""
    totals = Totals()
    totals.hear("a", counted(4, "minga_monitor_windows"), 0.0)
    totals.hear("b", counted(5, "minga_monitor_windows"), 0.0)
    assert whole(totals) == {("minga_monitor_windows_total", ()): 5}


def test_gauges_are_of_the_living():
    """Requests in hand add up, all else is alike; a silent replica has no present, but a past."""
    totals, added = Totals(), "minga_inference_requests_in_progress"
    totals.hear("a", [*gauge(2, added), *gauge(1), *counted(5)], 0.0)
    totals.hear("b", [*gauge(3, added), *gauge(0), *counted(5)], SILENT_S)
    assert whole(totals, SILENT_S) == {(added, ()): 5, ("minga_x", ()): 1, TOTAL: 10}
    assert whole(totals, SILENT_S + 1) == {(added, ()): 3, ("minga_x", ()): 0, TOTAL: 10}
    totals.hear("a", counted(6), SILENT_S + 2)  # it only hung
    assert whole(totals, SILENT_S + 2)[TOTAL] == 11


def test_the_text_of_one_replica_is_its_own():
    """Histograms, labels and help come through as `prometheus_client` writes them."""
    registry = CollectorRegistry()
    Counter("a", "Some.", ("label",), registry=registry).labels('x"\n').inc(2)
    histogram = Histogram("b", "More.", ("label",), buckets=(1, 2), registry=registry)
    histogram.labels("y").observe(1.5)
    histogram.labels("z").observe(3)
    Gauge("c", "Now.", registry=registry).set(-1.25)
    totals = Totals()
    totals.hear("a", families_of(registry), 0.0)
    assert generate_latest(Given(totals.families(0.0))) == generate_latest(registry)
    totals.hear("b", families_of(registry), 0.0)
    text = generate_latest(Given(totals.families(0.0))).decode()
    assert 'b_bucket{label="z",le="+Inf"} 2.0' in text
    assert 'b_sum{label="y"} 3.0' in text
    assert "c -1.25" in text
