"""A token store whose redemptions are in the audit log, each in the transaction that took it."""

from minga.federation.coordinator.audit_log import AuditLog, Kind
from minga.federation.coordinator.store import Store
from minga.federation.coordinator.token_table import TokenTable
from minga.federation.coordinator.tokens import Refusal


class AuditedTokens:
    """Token hashes in the coordinator's database, with a witness.

    Making a token is told by who makes it, and a refusal by the port: they know who is concerned.
    """

    def __init__(self, table: TokenTable, store: Store, audit: AuditLog) -> None:
        self._table = table
        self._store = store
        self._audit = audit

    def put(self, digest: bytes, group: str, expires_at: float, uses: int) -> None:
        """Keep a new token's hash."""
        self._table.put(digest, group, expires_at, uses)

    def redeem(self, digest: bytes, redeemer: bytes, now: float) -> str | Refusal:
        """Take one use for a redeemer, unless it has one."""
        with self._store.transaction():
            result = self._table.redeem(digest, redeemer, now)
            if not isinstance(result, Refusal):
                # Its holder may ask again and again, with the same key.
                self._audit.append_limited(
                    Kind.TOKEN_REDEEMED,
                    f"token/{digest.hex()[:16]}",
                    group=result,
                    key=redeemer.hex(),
                )
        return result
