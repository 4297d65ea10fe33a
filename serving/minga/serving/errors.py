"""What can go wrong with hosting models.

```text
ServingError
├── HostError                the application does not start, or stopped answering
├── VersionRefusedError      a version cannot be loaded; what was served before is served still
├── NoChampionError          nothing to serve: no version has the alias yet
└── RegistryUnreachableError the registry does not answer
```
"""


class ServingError(Exception):
    """The root of everything that `minga.serving` raises on purpose."""


class HostError(ServingError):
    """Ray Serve does not bring the application up, or lost it."""


class VersionRefusedError(ServingError):
    """A version that no replica will serve; trying it again will not help."""


class NoChampionError(ServingError):
    """There is no version to serve yet."""


class RegistryUnreachableError(ServingError):
    """The model registry cannot be asked."""
