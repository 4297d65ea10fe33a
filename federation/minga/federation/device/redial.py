"""When a device dials the coordinator again.

A fleet that lost its coordinator must not come back all at once: the coordinator tells how long it
wants the return to take, longer the larger the fleet is, and each device draws its moment in that
time ("pace steering": Bonawitz et al., "Towards federated learning at scale: system design", MLSys
2019, section 2.3). A device that is in a round has less time than that.
"""

import asyncio
import random
from contextlib import suppress

import grpc

from minga.federation.device.link import Link
from minga.federation.limits import (
    FIRST_RECONNECT_BACKOFF_S,
    MAX_RECONNECT_BACKOFF_S,
    MAX_RECONNECT_WINDOW_S,
    ROUND_RECONNECT_WINDOW_S,
)


class Redial:
    """Waits before each new stream."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._backoff_s = FIRST_RECONNECT_BACKOFF_S
        self._window_s = 0.0

    def note_window(self, window_ms: int) -> None:
        """Remember in which time the coordinator wants its devices to come back."""
        self._window_s = min(window_ms / 1000, MAX_RECONNECT_WINDOW_S)

    def note_stream(self, lasted_s: float) -> None:
        """Be quick again after a stream that lasted."""
        if lasted_s > 2 * self._backoff_s:
            self._backoff_s = FIRST_RECONNECT_BACKOFF_S

    async def pause(self, *, in_round: bool) -> None:
        """Wait before the next stream."""
        jitter = random.uniform(0.5, 1.0)  # noqa: S311 - so that a fleet spreads out
        await asyncio.sleep(FIRST_RECONNECT_BACKOFF_S * jitter)
        async with self._link.channel() as channel:
            if channel.get_state() is grpc.ChannelConnectivity.READY:
                # The link is good, the coordinator ends streams. Maybe because of another agent
                # with this identity: the two would push each other out for ever.
                await asyncio.sleep(self._backoff_s * jitter)
                self._backoff_s = min(2 * self._backoff_s, MAX_RECONNECT_BACKOFF_S)
                return
            await asyncio.sleep(self._draw_moment(in_round))
            with suppress(TimeoutError):  # the channel dials by itself, with a backoff of its own
                # Not `wait_for`: Python 3.11's loses a cancellation that comes with the result.
                async with asyncio.timeout(MAX_RECONNECT_BACKOFF_S):
                    await channel.channel_ready()
        self._backoff_s = FIRST_RECONNECT_BACKOFF_S

    def _draw_moment(self, in_round: bool) -> float:
        """Draw when to dial; once per outage, since dialling goes on by itself from then on."""
        window_s, self._window_s = self._window_s, 0.0
        if in_round:
            window_s = min(window_s, ROUND_RECONNECT_WINDOW_S)
        return random.uniform(0.0, window_s)  # noqa: S311 - as above
