"""The referee of comparisons: stages, verdicts, restarts, and operators who change their minds."""

import json
from datetime import UTC, datetime

import numpy as np
import onnx
import pytest

from minga.inference.comparing import Mode
from minga.inference.engine import ModelRef
from minga.inference.monitor.reference import METADATA_KEY, Role
from minga.inference.tally import Tally
from minga.serving.book import MemoryBook, Plan, Status
from minga.serving.config import ComparisonConfig
from minga.serving.counting import CountBook, ReplicaCounts
from minga.serving.errors import NoChampionError, RegistryUnreachableError, VersionRefusedError
from minga.serving.judging import Expectation
from minga.serving.referee import Referee, predictions_of
from minga.serving.watcher import MemorySource, Watcher
from tests.serving.conftest import ref_of, scaling_model
from tests.serving.watched import NUM_TEST, logits, rows, watched_model


def ref(version: int, name: str = "a") -> ModelRef:
    """A version that nobody loads in these tests."""
    return ModelRef(name=name, version=str(version), path="/nowhere", sha256="0")


def tally(requests: int, *, failures: int = 0) -> Tally:
    """Counts of a version whose predictions are always alike."""
    made = Tally(requests=requests, failures=failures)
    rng = np.random.default_rng(requests)
    made.predictions = list(rng.normal(size=min(requests, 500)))
    made.num_predictions = requests
    made.times = {80: requests - failures}
    return made


class Book(MemoryBook):
    """A book that can be away."""

    is_away = False

    def read(self, model):
        if self.is_away:
            raise RegistryUnreachableError("no answer")
        return super().read(model)

    def write(self, model, story):
        if self.is_away:
            raise RegistryUnreachableError("no answer")
        super().write(model, story)


class Service:
    """A watcher with a host that records, a registry of three versions, and a clock by hand."""

    def __init__(self, book=None, *, champion=1, **comparison):
        self.book = book or Book()
        self.source = MemorySource([ref(champion)])
        self.config = ComparisonConfig.model_validate(
            {"shares": [0.1, 0.5], "min_requests": 100, "hold_s": 10.0} | comparison
        )
        self.seconds = 0.0
        self.refused = set()
        self.files: dict[int, ModelRef] = {}
        self.told: list[ReplicaCounts] = []
        self.referee = Referee(
            self.book,
            self.config,
            self._resolve,
            clock=lambda: self.seconds,
            now=lambda: datetime.fromtimestamp(1_700_000_000 + self.seconds, UTC),
        )
        first = self.referee.begin(ref(champion))
        self.lineup = ((first,), ())
        self.watcher = Watcher(self.source, [first], self, self.referee)

    def _resolve(self, name, version):
        if int(version) > 3:
            raise NoChampionError(f"no version {version}")
        return self.files.get(int(version)) or ref(int(version), name)

    def deploy(self, refs, comparisons=()):
        if self.refused & {each.version for each in refs}:
            raise VersionRefusedError("it fails its self-test")
        self.lineup = (tuple(refs), tuple(comparisons))
        self.told = []

    def counts(self):
        return self.told

    @property
    def versions(self):
        return [each.version for each in self.lineup[0]]

    @property
    def share(self):
        (comparison,) = self.lineup[1]
        return comparison.share

    @property
    def story(self):
        return self.book.read("a")[1]

    def ask(self, version=2, mode=Mode.CANARY, share=1.0, name="ask", **more):
        plan = Plan(id=f"{name} {version}", mode=mode, version=str(version), share=share, **more)
        self.book.plan("a", plan)
        self.watcher.check()

    def count(self, baseline, challenger, *, replica="one"):
        (comparison,) = self.lineup[1]
        roles = {"baseline": baseline, "challenger": challenger}
        self.told.append(ReplicaCounts(replica=replica, counts={comparison.id: roles}))

    def pass_stage(self):
        """Let the stage go well: enough requests, enough time."""
        self.watcher.check()
        self.count(tally(900), tally(100))
        self.seconds += 10
        self.watcher.check()


def test_a_canary_grows_and_takes_over():
    """Each stage that goes well is followed by the next; after the last the canary has all."""
    service = Service()
    service.ask(2)
    assert (service.versions, service.share) == (["1", "2"], 0.1)
    service.pass_stage()
    assert (service.versions, service.share) == (["1", "2"], 0.5)
    service.pass_stage()
    assert (service.versions, service.lineup[1]) == (["2"], ())
    assert service.story.status is Status.PASSED
    for _ in range(3):
        service.watcher.check()
    assert service.versions == ["2"], "it stays, although another version is champion"


def test_a_canary_that_fails_is_rolled_back():
    """A bad one goes at the next look, and does not come back by itself."""
    service = Service()
    service.ask(2)
    service.watcher.check()
    service.count(tally(900), tally(100, failures=90))
    for _ in range(3):
        service.watcher.check()
    assert service.versions == ["1"]
    assert service.story.status is Status.ROLLED_BACK
    assert "failures" in service.story.reason
    assert service.story.figures["challenger"]["failures"] == 90
    service.ask(2, name="once more")
    assert service.versions == ["1", "2"]


@pytest.mark.parametrize(
    ("expects", "status"),
    [(Expectation.BASELINE, Status.ROLLED_BACK), (Expectation.REPAIR, Status.PASSED)],
)
def test_a_repair_is_held_to_its_own_test_data(tmp_path, expects, status):
    """Its file tells how it answered; that counts again after the service has been restarted."""
    service = Service(shares=[0.5])
    service.files = {2: ref_of(tmp_path, watched_model(), "a", "2")}
    service.ask(2, expects=expects)
    again = Service(service.book, shares=[0.5])
    again.files = service.files
    again.watcher.check()
    again.watcher.check()
    usual, repaired = tally(400), tally(400)
    repaired.predictions = [float(number) for number in logits(rows(400, 5))]
    usual.predictions = [number + 5 for number in repaired.predictions]
    again.count(usual, repaired)
    again.seconds += 10
    again.watcher.check()
    assert again.story.status is status, again.story.reason
    assert again.story.expects is expects


def test_a_repair_whose_file_is_gone_is_judged_still(caplog):
    """What its file would tell is missed, and said; the service goes on, and so does the canary."""
    service = Service(shares=[0.5])
    service.ask(2, expects=Expectation.REPAIR)
    service.pass_stage()
    assert service.story.status is Status.PASSED
    assert "with the other version's alone" in caplog.text


def test_what_a_file_tells_of_predictions(tmp_path):
    """The column is that of what is compared: an answer, or the only number; else there is none."""
    found = predictions_of(ref_of(tmp_path, watched_model(), "one", "1"))
    assert (found.role, found.num_examples) == (Role.OUTPUT, NUM_TEST)
    assert predictions_of(ref_of(tmp_path, scaling_model(2), "silent", "1")) is None
    assert predictions_of(ref_of(tmp_path, with_columns("output"), "several", "1")) is None
    found = predictions_of(ref_of(tmp_path, with_columns("output", "answer"), "classes", "1"))
    assert found.role is Role.ANSWER


def with_columns(*roles: str) -> bytes:
    """Give a model of three outputs whose file describes columns of these roles."""
    bins = {"edges": [0.5], "shares": [0.5, 0.5], "num_examples": 10}
    columns = [{"role": role, "name": role, **bins} for role in roles]
    model = onnx.load_from_string(scaling_model(2))
    text = json.dumps({"layout": 1, "num_held_out": 10, "columns": columns})
    onnx.helper.set_model_props(model, {METADATA_KEY: text})
    return model.SerializeToString()


def test_what_dead_replicas_counted_counts():
    """The last that each replica told is kept, and a successor's counts are added to it."""
    service = Service()
    service.ask(2)
    service.watcher.check()
    service.seconds += 10
    service.count(tally(450), tally(60), replica="dies")
    service.watcher.check()
    service.told = []
    service.count(tally(450), tally(60), replica="succeeds")
    service.watcher.check()
    assert service.share == 0.5


def test_counts_of_one_replica_are_not_added_to_themselves():
    """Each replica tells all it counted so far, so a later word replaces the one before."""
    book = CountBook()
    for requests in (10, 20):
        roles = {"baseline": tally(requests), "challenger": tally(1)}
        book.update([ReplicaCounts(replica="r", counts={"c": roles})])
    assert book.total()["c"]["baseline"].requests == 20
    book.keep([])
    assert book.total() == {}


def test_a_service_that_starts_again_goes_on_in_its_stage():
    """The stage is in the book; its counts begin anew."""
    service = Service()
    service.ask(2)
    service.pass_stage()
    again = Service(service.book)
    assert again.versions == ["1"]
    again.watcher.check()
    assert (again.versions, again.share) == (["1", "2"], 0.5)
    again.pass_stage()
    assert Service(again.book).versions == ["2"], "a canary that has won is served from the start"


def test_a_bad_canary_is_rolled_back_while_the_registry_is_away():
    """That is the moment when nobody can do it by hand; the story is written later."""
    service = Service()
    service.ask(2)
    service.watcher.check()
    service.book.is_away = True
    service.count(tally(900), tally(100, failures=90))
    service.watcher.check()
    assert service.versions == ["1"]
    service.book.is_away = False
    service.watcher.check()
    assert service.story.status is Status.ROLLED_BACK


def test_stopping_gives_all_back_to_the_champion():
    """Taking the plan back ends what runs, and undoes what has passed."""
    service = Service()
    service.ask(2)
    service.book.plan("a", None)
    service.watcher.check()
    assert (service.versions, service.story.status) == (["1"], Status.STOPPED)
    service.ask(3)
    service.pass_stage()
    service.pass_stage()
    assert service.versions == ["3"]
    service.book.plan("a", None)
    service.watcher.check()
    assert service.versions == ["1"]


@pytest.mark.parametrize(("champion", "status"), [(2, Status.PASSED), (3, Status.STOPPED)])
def test_a_promotion_ends_a_canary(champion, status):
    """The operator's word is above the referee's, whichever version it names."""
    service = Service()
    service.ask(2)
    service.source.set(ref(champion))
    service.watcher.check()
    assert (service.versions, service.story.status) == ([str(champion)], status)


def test_a_new_champion_comes_in_stages_where_that_is_wanted():
    """The champion of the registry is a canary first, and is served to all when it has passed."""
    service = Service(new_champions=True)
    service.source.set(ref(2))
    service.watcher.check()
    assert (service.versions, service.share) == (["1", "2"], 0.1)
    again = Service(service.book, champion=2, new_champions=True)
    assert again.versions == ["1"], "a restart in between does not let it in"
    again.watcher.check()
    for _ in range(2):
        again.pass_stage()
    assert (again.versions, again.story.status) == (["2"], Status.PASSED)
    assert Service(again.book, champion=2, new_champions=True).versions == ["2"]


def test_a_new_champion_that_fails_is_kept_out():
    """The version before is served on, also after a restart, until there is another champion."""
    service = Service(new_champions=True)
    service.source.set(ref(2))
    service.watcher.check()
    service.watcher.check()
    service.count(tally(900), tally(100, failures=90))
    service.watcher.check()
    again = Service(service.book, champion=2, new_champions=True)
    for _ in range(2):
        again.watcher.check()
    assert again.versions == ["1"]
    again.ask(3)
    assert again.versions == ["1"], "nothing is compared with a champion that is not served"
    again.book.plan("a", None)
    again.watcher.check()
    assert again.versions == ["1", "2"], "forgotten, it may try again"
    again.source.set(ref(1))
    again.watcher.check()
    assert (again.versions, again.story.status) == (["1"], Status.STOPPED)


@pytest.mark.parametrize(
    ("version", "reason"), [(2, "self-test"), (9, "no version 9"), (1, "all already")]
)
def test_what_cannot_be_a_canary_is_refused(version, reason):
    """The story says of a version why it is no canary: unfit, not there, or champion already."""
    service = Service()
    service.refused = {"2"}
    service.ask(version)
    service.watcher.check()
    assert service.versions == ["1"]
    assert service.story.status is Status.REFUSED
    assert reason in service.story.reason


def test_a_shadow_and_a_split_go_on_until_they_are_stopped():
    """They report, and change nothing by themselves."""
    service = Service(min_outcomes=30)
    service.ask(2, Mode.SHADOW, share=0.2)
    assert service.lineup[1][0].mode is Mode.SHADOW
    service.watcher.check()
    shadow = tally(500, failures=400)
    shadow.pairs, shadow.agreements = 100, 90
    service.count(tally(500), shadow)
    service.seconds += 100
    service.watcher.check()
    assert (service.versions, service.share) == (["1", "2"], 0.2)
    assert service.story.figures["challenger"]["agreements"] == 90
    service.ask(3, Mode.SPLIT, share=0.5)
    service.watcher.check()
    service.watcher.check()
    assert (service.versions, service.lineup[1][0].mode) == (["1", "3"], Mode.SPLIT)


def test_a_split_says_once_which_is_better():
    """What was said by the planned outcomes stays, whatever comes after."""
    service = Service(min_outcomes=30)
    service.ask(2, Mode.SPLIT, share=0.5)
    service.watcher.check()
    counts = {"baseline": tally(50), "challenger": tally(50)}
    for number in range(60):
        counts["baseline"].outcomes.add(float(number % 5 == 0))
        counts["challenger"].outcomes.add(float(number % 5 != 0))
    service.count(counts["baseline"], counts["challenger"])
    service.watcher.check()
    for _ in range(300):
        counts["baseline"].outcomes.add(1.0)
    service.seconds += 100
    service.watcher.check()
    service.seconds += 100
    service.watcher.check()
    assert service.story.figures["verdict"].startswith("the challenger is better")
    assert service.story.figures["baseline"]["outcomes"] == 360
    assert service.versions == ["1", "2"]


def test_other_models_are_not_concerned():
    """A comparison of one model leaves the lineup of the others as it is."""
    service = Service()
    service.source.set(ref(1, "b"))
    service.watcher = Watcher(service.source, [ref(1), ref(1, "b")], service, service.referee)
    service.ask(2)
    assert [str(each) for each in service.lineup[0]] == [
        "'a' version 1",
        "'a' version 2",
        "'b' version 1",
    ]
    service.source.set(ref(2, "b"))
    service.watcher.check()
    assert ref(2, "b") in service.lineup[0]
    assert service.share == 0.1
