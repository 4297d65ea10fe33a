"""The project's data against the schema that it should keep.

The schema is the one that the project keeps (`minga data schema`), else the champion's, else that
of the data's own training split. Drift and volume are measured against the champion's profile.
"""

from minga.cluster.project import SCHEMA_FILE, Project
from minga.training import data
from minga.training.bundle import PROFILE, SCHEMA
from minga.training.data import DataReport, digest_of
from minga.training.data.versions import versions_of
from minga.training.errors import DataError
from minga.training.profile import Profile
from minga.training.registry import CHAMPION, Version
from minga.training.schema import Schema, read_schema


def check_data(project: Project, source: str | None = None) -> DataReport:
    """Check data against the kept schema and the champion's profile; see the module.

    Args:
        project: whose Task reads the data.
        source: other data than the project's; a relative path is taken from the project folder.

    Raises:
        DataError: the Task cannot read the source, or the kept schema is no schema.
    """
    task = project.loaded_task
    if source is None:
        name, splits, digest = project.source, project.splits, project.data_digest
        schema, profile = project.data_schema, project.data_profile
    else:
        name = project.reference.resolve(source)
        splits = data.read_splits(task, name)
        digest = digest_of(splits)
        schema, profile = task.schema(splits.train), data.profile_of(task, splits.train)
    champion, kept = find_champion(project), kept_schema(project)
    expected, past = kept or schema, profile
    references = [SCHEMA_FILE] if kept else []
    if champion is not None:
        folder = project.registry().fetch(champion.name, champion.version)
        expected = kept or Schema.read(folder / SCHEMA)
        past = Profile.read(folder / PROFILE)
        references.append(f"version {champion.version}")
    return DataReport(
        task=task.name,
        source=name,
        digest=digest,
        versions=project.data_versions if source is None else versions_of(name),
        num_examples={part: len(splits[part]) for part in data.SPLIT_NAMES},
        data_schema=schema,
        profile=profile,
        violations=data.check(splits, expected, past, project.data),
        reference=" and ".join(references) or "itself",
    )


def require_valid_data(project: Project) -> DataReport:
    """Check the project's data, once for each loaded project, and refuse errors.

    Raises:
        SchemaError: the data breaks its schema.
    """
    if project._checked is None:
        project._checked = check_data(project)
    project._checked.require_valid()
    return project._checked


def data_tags(project: Project) -> dict[str, str]:
    """Name the data for a run: the digest of its values, and what DVC calls the files.

    A view of several files that DVC tracks names all of them, in its order: `MD5, MD5, ...`, and
    the commits of their records likewise; `-` stands for a record that is not committed.
    """
    tags = {"minga.data_sha256": project.data_digest}
    if known := [version.dvc for version in project.data_versions if version.dvc is not None]:
        tags["minga.dvc_md5"] = ", ".join(dvc.md5 for dvc in known)
        tags["minga.dvc_commit"] = ", ".join(dvc.commit or "-" for dvc in known)
    return tags


def keep_schema(project: Project, *, replace: bool = False) -> tuple[Schema, tuple[str, ...]]:
    """Infer the schema of the project's training split and keep it in the project.

    Returns:
        the schema, and in what it differs from the one kept before.

    Raises:
        DataError: another one is kept and `replace` is not set.
    """
    schema = project.data_schema
    kept = kept_schema(project)
    changes = kept.changes(schema) if kept else ()
    if changes and not replace:
        more = f" ({len(changes) - 1} more changes)" if len(changes) > 1 else ""
        raise DataError(
            f"{project.schema_file} is another schema: {changes[0]}{more}; "
            "take the data's with: minga data schema --replace"
        )
    schema.write(project.schema_file)
    return schema, changes


def kept_schema(project: Project) -> Schema | None:
    """Read the schema that the project keeps, if it does.

    Raises:
        DataError: the file is no schema.
    """
    return read_schema(project.schema_file) if project.schema_file.exists() else None


def find_champion(project: Project) -> Version | None:
    """Give the champion without making a database only to find none in it."""
    if not project.has_registry:
        return None
    return project.registry().find(project.loaded_task.name, CHAMPION)
