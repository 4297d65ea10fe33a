"""Process settings of the central machine: where things are kept, not what is learned."""

from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Settings from the environment, such as MINGA_TRACKING_URI; all have working defaults."""

    model_config = SettingsConfigDict(
        env_prefix="MINGA_", frozen=True, use_attribute_docstrings=True, extra="ignore"
    )

    tracking_uri: str = ""
    """MLflow's database or server; by default `.minga/mlflow.db` in the project."""

    artifact_root: str = ""
    """Folder or URI of the files of new experiments; by default `.minga/artifacts`."""

    ray_storage: str = ""
    """Folder of unfinished searches and trainings, shared by all of Ray's machines; by default
    `.minga/ray`."""

    ray_address: str = ""
    """The Ray cluster that searches and trains, such as `auto` on one of its machines; by default a
    Ray of this machine alone, for as long as the command lasts."""

    signing_key: str = ""
    """File of the private key that signs verdicts and promotions; by default
    `.minga/signing.pem`, made the first time."""

    ray_dashboard: str = "http://127.0.0.1:8265"
    """The dashboard of the Ray cluster that `minga submit` sends jobs to."""
