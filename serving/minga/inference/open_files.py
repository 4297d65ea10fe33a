"""How many files, and so connections, this process may have open.

Systems start processes with room for 1024 of them, for the sake of programs that use `select`;
a server that needs more asks for what its user may have.
"""

import resource
from typing import Final

_MOST_CONNECTIONS: Final = 8192


def allow_open_files() -> None:
    """Raise this process's limit to the highest that it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def max_connections() -> int:
    """Tell how many connections one server may hold, so that files for all else are left.

    Once none is left, the system accepts nobody, and who tries hears nothing.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return max(1, min(_MOST_CONNECTIONS, soft * 3 // 4))
