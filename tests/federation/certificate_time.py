"""A clock for certificates, for tests."""

from datetime import datetime, timedelta

from minga.federation.identity import utc_now

AGE = timedelta(days=26)
"""Older than every renewal time of certificates that hold for 30 days, and not expired."""


class Time:
    """Stands still until it is moved; TLS itself looks at the real time, so it begins `AGE` ago."""

    def __init__(self) -> None:
        self.now = utc_now() - AGE

    def __call__(self) -> datetime:
        return self.now
