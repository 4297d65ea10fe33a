"""The MLflow registry as a source: the alias's version, its file, and its digest."""

import pytest

from minga.inference.engine import OnnxModel
from minga.serving.errors import NoChampionError, RegistryUnreachableError, ServingError

pytestmark = pytest.mark.slow


@pytest.fixture
def source(registry_uri):
    """The source of champions."""
    from minga.serving.registry_source import RegistrySource

    return RegistrySource(registry_uri)


def test_the_champion_is_found_and_can_be_loaded(register, source):
    """The alias's version comes with its file, in place, and the digest that it must have."""
    version = register("found", 2)
    ref = source.current("found")
    assert (ref.name, ref.version) == ("found", version)
    assert OnnxModel.load(ref).ref == ref
    assert "found" in source.names()


def test_the_source_follows_the_alias(register, source, registry_uri):
    """When the alias moves, forth or back, so does what the source says."""
    from mlflow import MlflowClient

    first = register("moving", 1)
    second = register("moving", 2, alias=None)
    assert source.current("moving").version == first
    client = MlflowClient(tracking_uri=registry_uri, registry_uri=registry_uri)
    for version in (second, first):
        client.set_registered_model_alias("moving", "champion", version)
        assert source.current("moving").version == version


def test_files_behind_a_run_uri_are_brought_here(register, source):
    """A version whose source is a run is downloaded before it is loaded."""
    register("remote", 3, source="runs:/{run_id}/bundle")
    assert OnnxModel.load(source.current("remote")).inputs[0].name == "input"


def test_models_without_the_alias_have_no_version(register, source):
    """An unknown model and one without a champion are both "not yet", not errors."""
    register("candidate", 1, alias="challenger")
    assert source.current("candidate") is None
    assert source.current("unknown") is None
    assert "candidate" not in source.names()


def test_many_models_are_all_found(register, source, monkeypatch):
    """MLflow tells of a limited number at a time; none is left out."""
    names = {f"many-{number}" for number in range(3)}
    for name in names:
        register(name, 1)
    monkeypatch.setattr("minga.serving.registry_source._PAGE", 2)
    assert names <= set(source.names())


def test_a_version_without_a_digest_is_refused(register, source):
    """What Minga did not register is not served, for it cannot be checked."""
    register("foreign", 1, tags={})
    with pytest.raises(ServingError, match=r"minga\.onnx_sha256"):
        source.current("foreign")


def test_a_registry_that_does_not_exist_is_not_made(tmp_path):
    """Serving never creates an empty database; it says what to run first."""
    from minga.serving.registry_source import RegistrySource

    database = tmp_path / "mlflow.db"
    with pytest.raises(NoChampionError, match="minga run"):
        RegistrySource(f"sqlite:///{database}")
    assert not database.exists()


def test_a_database_of_another_kind_is_one_clear_error(tmp_path):
    """A file that is no registry is reported with its place."""
    from minga.serving.registry_source import RegistrySource

    database = tmp_path / "mlflow.db"
    database.write_bytes(b"no database" * 100)
    with pytest.raises(RegistryUnreachableError, match="does not answer"):
        RegistrySource(f"sqlite:///{database}").names()


def test_a_registry_server_that_is_away_is_one_clear_error():
    """A tracking server that nobody runs is reported within seconds, without its password."""
    from minga.serving.registry_source import RegistrySource

    with pytest.raises(RegistryUnreachableError, match="does not answer") as raised:
        RegistrySource("http://minga:hush@127.0.0.1:1").names()
    assert "hush" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "profile", "baseline"),
    [
        ("profiled", '{"inputs": [{"mean": 1.5}, {"mean": -2}, {"mean": 0}]}', (1.5, -2.0, 0.0)),
        ("unprofiled", None, ()),
        ("broken-json", "{", ()),
        ("broken-form", '{"inputs": {"mean": 1}}', ()),
        ("broken-number", '{"inputs": [{"mean": "much"}]}', ()),
    ],
)
@pytest.mark.parametrize("source_uri", [None, "runs:/{run_id}/bundle"], ids=["here", "remote"])
def test_the_means_of_the_training_data_come_along(
    *, name, profile, baseline, source_uri, register, source
):
    """They are the baseline of explanations; a version without them is served all the same."""
    name += "-remote" if source_uri else ""
    changes = ({"profile": profile} if profile else {}) | (
        {"source": source_uri} if source_uri else {}
    )
    register(name, 2, **changes)
    ref = source.current(name)
    assert ref.baseline == baseline
    assert OnnxModel.load(ref).ref == ref


def test_a_model_is_pinned_to_a_number_or_another_alias(register, registry_uri):
    """What is pinned is followed instead of the champion; a number that is not there is said."""
    from minga.serving.registry_source import RegistrySource, parse_pins

    first = register("pinned", 1)
    second = register("pinned", 2, alias="challenger")
    for word, version in (("pinned", first), ("pinned@challenger", second), ("pinned/2", second)):
        pins = {name: pin for name, pin in parse_pins([word]).items() if pin}
        assert RegistrySource(registry_uri, pins=pins).current("pinned").version == version
    for wrong in ("9", "x"):
        source = RegistrySource(registry_uri, pins={"pinned": wrong})
        with pytest.raises(NoChampionError, match=f"no version {wrong}"):
            source.current("pinned")
    assert RegistrySource(registry_uri, pins={"pinned": "@nobody"}).current("pinned") is None


@pytest.mark.parametrize("words", [["a/"], ["@b"], ["a@"], ["a", "a/3"]])
def test_words_that_name_no_model_are_refused(words):
    """Half a name, and a model named twice, are errors that say how to write one."""
    from minga.serving.registry_source import parse_pins

    with pytest.raises(ServingError, match="NAME@ALIAS"):
        parse_pins(words)


def test_plans_and_stories_are_tags_of_the_model(register, source, registry_uri):
    """What is asked and what became of it is kept; what others write there is nothing."""
    from mlflow import MlflowClient

    from minga.inference.comparing import Mode
    from minga.serving.book import PLAN_TAG, Plan, Status, Story

    register("told", 1)
    book = source.book()
    assert book.read("told") == (None, None)
    plan = Plan(id="p", mode=Mode.CANARY, version="2")
    story = Story(
        plan="p", mode=Mode.CANARY, baseline="1", challenger="2", share=0.1, since="today"
    )
    book.plan("told", plan)
    book.write("told", story)
    assert source.book().read("told") == (plan, story)
    book.plan("told", None)
    assert book.read("told") == (None, story), "the service ends what runs"
    book.write("told", story.become(status=Status.STOPPED, reason="x" * 9999))
    book.plan("told", None)
    assert book.read("told") == (None, None)
    client = MlflowClient(tracking_uri=registry_uri, registry_uri=registry_uri)
    client.set_registered_model_tag("told", PLAN_TAG, '{"id": 1}')
    assert book.read("told") == (None, None)
    with pytest.raises(RegistryUnreachableError):
        book.read("unknown")
