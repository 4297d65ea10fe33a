"""Alarms that act: what is taken in, what it leads to, and within which limits."""

import json
import multiprocessing
import re
import sqlite3
import time
import tomllib
from pathlib import Path

import httpx
import pytest

from minga.cluster.errors import ResponseError
from minga.cluster.response.alarms import MAX_ALERTS, Alarm, read_log, read_webhook
from minga.cluster.response.config import RespondConfig
from minga.cluster.response.journal import Journal
from minga.cluster.response.metrics import Metrics
from minga.cluster.response.policy import Case, Heard, Hold, Kind, Open, decide, is_ours
from minga.cluster.response.receiver import Receiver, token_of
from minga.inference.monitor.alarms import Alarm as MonitorAlarm
from minga.inference.monitor.alarms import AlarmLog
from minga.inference.monitor.judgement import AlarmKind
from minga.inference.monitor.store import Store
from minga.training.config import GateConfig

HOUR = 3600.0
CONFIG = RespondConfig(alarms=("Drift",), cooldown_s=HOUR, max_cases=2, period_days=1.0)


def alarm(fingerprint: str = "a", since: float = 100.0, **changes) -> Alarm:
    """Give an alarm that may act."""
    values = {
        "fingerprint": fingerprint,
        "name": "Drift",
        "model": "plant",
        "version": "1",
        "summary": "f1 has moved",
        "since": since,
        "is_firing": True,
        "origin": "alertmanager",
    }
    return Alarm(**values | changes)


class Clock:
    """A time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """The journal's time."""
    return Clock()


@pytest.fixture
def journal(tmp_path: Path, clock: Clock):
    """A journal on the disk."""
    opened = Journal(tmp_path / "journal.db", clock=clock)
    yield opened
    opened.close()


def kinds(journal: Journal) -> list[str]:
    """Name the entries of a story."""
    return [str(entry.kind) for entry in journal.story()]


# --- what is decided ---


def ended(number: int, opened_at: float, ended_at: float, end: Kind = Kind.PROMOTED) -> Case:
    """Give a case that is over."""
    return Case(number=number, opened_at=opened_at, opening={}, done={}, end=end, ended_at=ended_at)


def test_an_alarm_opens_a_case() -> None:
    """The first alarm acts at once, those that fire beside it belong to the same case."""
    firing = [Heard(alarm=alarm("b", 200.0), at=210.0), Heard(alarm=alarm("a", 100.0), at=110.0)]
    decision = decide(firing, [], CONFIG, 300.0)
    assert isinstance(decision, Open)
    assert [each.fingerprint for each in decision.alarms] == ["a", "b"]


def test_one_case_at_a_time() -> None:
    """While a case is open no alarm opens another one."""
    running = Case(number=1, opened_at=0.0, opening={}, done={})
    assert decide([Heard(alarm=alarm(), at=50.0)], [running], CONFIG, 10 * HOUR) is None


def test_an_alarm_that_the_last_case_answered_is_not_news() -> None:
    """What was told before the end of a case opens no other one; told again later, it does."""
    past = [ended(1, 0.0, 500.0)]
    later = 500.0 + 2 * HOUR
    assert decide([Heard(alarm=alarm(), at=400.0)], past, CONFIG, later) is None
    assert isinstance(decide([Heard(alarm=alarm(), at=600.0)], past, CONFIG, later), Open)


def test_cool_down() -> None:
    """After a case alarms wait, and act when the cool-down is over."""
    past, news = [ended(1, 0.0, 500.0)], [Heard(alarm=alarm(), at=600.0)]
    held = decide(news, past, CONFIG, 700.0)
    assert isinstance(held, Hold)
    assert held.until == 500.0 + HOUR
    assert isinstance(decide(news, past, CONFIG, held.until), Open)


def test_budget() -> None:
    """No more cases in a period than may be; those that trained nothing do not count."""
    past = [ended(1, 0.0, 10.0), ended(2, 2 * HOUR, 3 * HOUR)]
    news = [Heard(alarm=alarm(), at=5 * HOUR)]
    held = decide(news, past, CONFIG, 6 * HOUR)
    assert isinstance(held, Hold)
    assert held.until == 24 * HOUR
    assert isinstance(decide(news, past, CONFIG, 24 * HOUR + 1), Open)
    past[1] = ended(2, 2 * HOUR, 3 * HOUR, Kind.OVERTAKEN)
    assert isinstance(decide(news, past, CONFIG, 6 * HOUR), Open)


def test_only_named_alarms_of_our_model_act() -> None:
    """The settings name the alarms; one of another model does not act, one of none does."""
    assert is_ours(alarm(), "plant", CONFIG)
    assert is_ours(alarm(model=""), "plant", CONFIG)
    assert not is_ours(alarm(model="other"), "plant", CONFIG)
    assert not is_ours(alarm(name="Slow"), "plant", CONFIG)


def test_settings_in_the_documentation_are_valid() -> None:
    """What the how-to shows of [respond] is what `minga.toml` takes."""
    page = Path(__file__).parents[2] / "docs" / "how-to" / "let-alarms-act.md"
    shown = re.findall(r"^```toml\n(.*?)^```$", page.read_text(), flags=re.M | re.S)
    for tables in map(tomllib.loads, shown):
        GateConfig.model_validate(tables.get("gates", {}))
        RespondConfig.model_validate(tables.get("respond", tables if "gates" not in tables else {}))
    assert len(shown) == 3


def test_a_campaign_needs_a_coordinator() -> None:
    """Settings that cannot work are refused when they are read."""
    with pytest.raises(ValueError, match="needs coordinator"):
        RespondConfig(action="federate")


# --- what is kept ---


def test_repetitions_are_heard_but_not_told_again(journal: Journal, clock: Clock) -> None:
    """Alertmanager repeats itself; the story has a line for the begin and one for the end."""
    for _ in range(5):
        clock.now += 60
        journal.hear((alarm(),))
    (heard,) = journal.firing()
    assert heard == Heard(alarm=alarm(), at=1300.0)
    journal.hear((alarm(is_firing=False), alarm("unknown", is_firing=False)))
    assert kinds(journal) == ["alarm", "resolved"]
    assert journal.firing() == ()


def test_why_nothing_happens_is_told_once(journal: Journal) -> None:
    """A reason to hold is a line of the story, also if it is found twice a second for hours."""
    journal.hear((alarm(),))
    for _ in range(3):
        journal.hold("cool-down", 2000.0)
        journal.hear((alarm(), alarm("b", name="Drift")))
    journal.hold("budget", 3000.0)
    assert kinds(journal).count("held") == 2


def test_a_case_is_the_fold_of_its_story(journal: Journal, clock: Clock) -> None:
    """Where a case stands is read from its entries alone; after its end nothing is added."""
    number = journal.open_case((alarm(),), "retrain")
    journal.tell(Kind.STARTED, number, attempt=1)
    with pytest.raises(ResponseError, match="one at a time"):
        journal.open_case((alarm("b"),), "retrain")
    journal.tell(Kind.JUDGED, number, version=2, blessed=True)
    asking = RespondConfig(approval="promotion")
    assert journal.case(number).awaited(asking) == "promotion"
    journal.approve(number, "promotion", by="ana")
    journal.approve(number, "promotion", by="bob")
    case = journal.case(number)
    assert (case.awaited(asking), case.attempts, case.end) == ("", 0, None)
    clock.now = 2000.0
    journal.tell(Kind.PROMOTED, number, version=2)
    case = journal.case(number)
    assert (case.end, case.ended_at) == (Kind.PROMOTED, 2000.0)
    with pytest.raises(ResponseError, match="has ended: promoted"):
        journal.tell(Kind.DISMISSED, number, by="ana", reason="late")
    assert kinds(journal) == ["opened", "started", "judged", "approved", "promoted"]


def test_a_promotion_is_told_though_the_case_was_dismissed(journal: Journal) -> None:
    """Who dismisses a case in the moment of its promotion finds out that it was too late."""
    number = journal.open_case((alarm(),), "retrain")
    journal.tell(Kind.DISMISSED, number, by="ana", reason="no")
    journal.tell(Kind.PROMOTED, number, version=2)
    assert journal.case(number).end is Kind.PROMOTED


def test_a_refused_version_waits_for_nobody(journal: Journal) -> None:
    """Approval is for what could be promoted."""
    number = journal.open_case((alarm(),), "retrain")
    journal.tell(Kind.JUDGED, number, version=2, blessed=False)
    assert journal.case(number).awaited(RespondConfig(approval="promotion")) == ""


def _open_when(path: Path, start: float, results) -> None:
    journal = Journal(path)
    time.sleep(max(0.0, start - time.time()))
    try:
        results.put(journal.open_case((alarm(),), "retrain"))
    except ResponseError:
        results.put(0)


def test_of_processes_that_open_a_case_at_once_one_does(tmp_path: Path) -> None:
    """The journal is shared by processes; a case is opened by one of them."""
    context = multiprocessing.get_context("spawn")
    results, path = context.Queue(), tmp_path / "journal.db"
    start = time.time() + 2
    racing = [context.Process(target=_open_when, args=(path, start, results)) for _ in range(3)]
    for process in racing:
        process.start()
    opened = sorted(results.get(timeout=60) for _ in racing)
    for process in racing:
        process.join()
    assert opened == [0, 0, 1]


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    """Something else under the journal's name, or a later journal, is an error with a remedy."""
    path = tmp_path / "journal.db"
    path.write_text("not a database, but long enough to be taken for the head of one " * 20)
    with pytest.raises(ResponseError, match="no journal"):
        Journal(path)
    assert path.read_text().startswith("not a database")
    later = tmp_path / "later.db"
    with sqlite3.connect(later) as connection:
        connection.execute("PRAGMA user_version = 9")
    with pytest.raises(ResponseError, match="later Minga"):
        Journal(later)


# --- the monitor's log ---


def test_each_record_of_the_monitors_log_is_heard_once(
    journal: Journal, tmp_path: Path, clock: Clock
) -> None:
    """What is new since the last look becomes alarms; a look that was written down is not lost."""
    store = Store(tmp_path / "monitor")
    values = {"at": 1.0, "model": "plant", "version": "3", "kind": AlarmKind.DRIFT}
    values |= {"subject": "f1", "window": 2, "since": 500.0, "until": 600.0, "rows": 500}
    values |= {"statistic": "psi", "value": 0.4, "limit": 0.2, "p_value": 0.0}
    store.append(MonitorAlarm(is_raised=True, **values))
    store.append(MonitorAlarm(is_raised=True, **values | {"model": "other"}))

    def look() -> None:
        folder = tmp_path / "monitor"
        alarms, last = read_log(AlarmLog(folder), "plant", journal.read_to(folder))
        journal.hear(alarms, read_to=(folder, last))

    for _ in range(2):
        look()
    (heard,) = journal.firing()
    assert (heard.alarm.name, heard.alarm.version, heard.alarm.since) == ("drift", "3", 500.0)
    assert "f1" in heard.alarm.summary
    store.append(MonitorAlarm(is_raised=False, **values))
    look()
    assert kinds(journal) == ["alarm", "resolved"]
    store.append(MonitorAlarm(is_raised=True, **values))
    look()
    journal.forget_versions(but=4)
    assert journal.firing() == ()
    store.close()


# --- what is received ---


def message(**changes) -> dict:
    """Give what Alertmanager sends."""
    alert = {
        "status": "firing",
        "labels": {"alertname": "Drift", "model": "plant", "severity": "warning"},
        "annotations": {"summary": "f1 has moved"},
        "startsAt": "2026-11-23T14:00:00.5Z",
        "endsAt": "0001-01-01T00:00:00Z",
        "generatorURL": "http://prometheus/graph",
        "fingerprint": "0123456789abcdef",
    }
    return {
        "version": "4",
        "groupKey": '{}:{alertname="Drift"}',
        "truncatedAlerts": 0,
        "status": "firing",
        "receiver": "minga-respond",
        "groupLabels": {},
        "commonLabels": {},
        "commonAnnotations": {},
        "externalURL": "http://alertmanager",
        "alerts": [alert | changes],
    }


def test_a_message_of_alertmanager_is_read() -> None:
    """Labels and times become an alarm."""
    (found,) = read_webhook(json.dumps(message()).encode())
    assert (found.name, found.model, found.summary) == ("Drift", "plant", "f1 has moved")
    assert found.since == 1795442400.5
    assert found.is_firing
    assert found.fingerprint == "alertmanager/0123456789abcdef"


class Caller:
    """Sends to a receiver that keeps what it hears in a journal."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self.token = token_of(folder)
        self.metrics = Metrics()

        async def hear(alarms: tuple[Alarm, ...]) -> int:
            journal.hear(alarms)
            return len(alarms)

        app = Receiver(self.token, hear, self.metrics)
        transport = httpx.ASGITransport(app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://receiver")

    async def send(self, content: bytes, token: str | None = None, **how) -> httpx.Response:
        """Post a body."""
        headers = {"authorization": f"Bearer {self.token if token is None else token}"}
        return await self.client.post("/alerts", content=content, headers=headers, **how)


@pytest.fixture
def caller(tmp_path: Path, journal: Journal) -> Caller:
    """Who speaks to the receiver."""
    return Caller(tmp_path / "respond", journal)


async def test_who_shows_the_token_is_heard(caller: Caller, journal: Journal) -> None:
    """A message is answered once it is in the journal; sent again it changes nothing."""
    for _ in range(2):
        answer = await caller.send(json.dumps(message()).encode())
        assert (answer.status_code, answer.json()) == (200, {"heard": 1, "kept": 1})
    assert kinds(journal) == ["alarm"]


@pytest.mark.parametrize("token", ["", "wrong", "wrong token"])
async def test_who_does_not_is_refused(caller: Caller, journal: Journal, token: str) -> None:
    """Without the token a body is not even read, whatever it is."""
    answer = await caller.send(b"{" * 5_000_000, token)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert journal.story() == ()


async def test_the_token_is_not_in_another_scheme(caller: Caller) -> None:
    """Basic authentication with the token is not the bearer scheme."""
    headers = {"authorization": f"Basic {caller.token}"}
    answer = await caller.client.post("/alerts", content=b"{}", headers=headers)
    assert answer.status_code == 401


def test_the_token_stays_and_is_the_owners(tmp_path: Path) -> None:
    """It is made once, and nobody else on the machine may read it."""
    first = token_of(tmp_path)
    assert token_of(tmp_path) == first
    assert len(first) >= 43
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600


BROKEN = {
    "no JSON": (b"{", 400),
    "no object": (b"[]", 400),
    "another version": (json.dumps(message() | {"version": "3"}).encode(), 400),
    "no alerts": (json.dumps({"version": "4"}).encode(), 400),
    "no name": (json.dumps(message(labels={"model": "plant"})).encode(), 400),
    "label that is no text": (json.dumps(message(labels={"alertname": 1})).encode(), 400),
    "label without end": (json.dumps(message(labels={"alertname": "x" * 5000})).encode(), 400),
    "too many labels": (
        json.dumps(message(labels={f"l{i}": "x" for i in range(100)})).encode(),
        400,
    ),
    "unknown status": (json.dumps(message(status="burning")).encode(), 400),
    "time without a zone": (json.dumps(message(startsAt="2026-11-23T14:00:00")).encode(), 400),
    "fingerprint that is a path": (json.dumps(message(fingerprint="../../x")).encode(), 400),
    "too many alerts": (
        json.dumps(message() | {"alerts": message()["alerts"] * (MAX_ALERTS + 1)}).encode(),
        400,
    ),
    "invalid UTF-8": (b'{"version": "\xff"}', 400),
    "deep": (b"[" * 200_000, 400),
    "too long": (b" " * (1024 * 1024 + 1), 413),
}


@pytest.mark.parametrize("case", BROKEN)
async def test_broken_messages_are_refused(caller: Caller, journal: Journal, case: str) -> None:
    """What is no message of Alertmanager is a 4xx that says why, and nothing is kept of it."""
    content, status = BROKEN[case]
    answer = await caller.send(content)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]
    assert caller.token not in answer.text
    assert journal.story() == ()


async def test_other_paths_and_methods(caller: Caller) -> None:
    """What is not there is 404, what is asked in another way is 405; both are JSON."""
    assert (await caller.client.get("/")).status_code == 404
    answer = await caller.client.get("/alerts")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert (await caller.client.get("/health")).json() == {}


async def test_messages_are_counted(caller: Caller) -> None:
    """The responder's own metrics tell of messages that were taken and refused."""
    await caller.send(json.dumps(message()).encode())
    await caller.send(b"", "wrong")
    text = (await caller.client.get("/metrics")).text
    assert 'minga_respond_messages_total{status="200"} 1.0' in text
    assert 'minga_respond_messages_total{status="401"} 1.0' in text
