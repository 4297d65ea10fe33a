"""Every size, count and rate that one side of the federation accepts from the other.

Both sides read this table, so that a sender never makes what its receiver refuses. Figures
that a deployment may want otherwise are defaults of constructor arguments.
"""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

# -- messages ---------------------------------------------------------------------------------

MAX_MESSAGE_BYTES: Final = 4 * MIB
"""Largest message on any stream, gRPC's own default; anything larger is a blob."""

MAX_ENROLMENT_MESSAGE_BYTES: Final = 16 * KIB
"""Largest message on the enrolment port, where callers are strangers."""

MAX_ERROR_MESSAGE_CHARS: Final = 1000
"""Length at which an error's text is cut on the wire: gRPC keeps metadata within 8 KiB."""

# -- identity ---------------------------------------------------------------------------------

MAX_NAME_LENGTH: Final = 63
"""Characters of a device, operator, service or group name: one DNS label."""

MAX_CERTIFICATE_BYTES: Final = 4 * KIB
"""A P-256 certificate of the authority takes about 600 bytes."""

VERIFIED_CERTIFICATES: Final = 1024
"""Certificates whose signatures a process remembers to be good; a few KiB each."""

MAX_REQUEST_BYTES: Final = 4 * KIB
"""A certificate signing request with a P-256 key takes about 250 bytes."""

MAX_TOKEN_CHARS: Final = 16 * KIB
"""An enrolment token takes about 1,400 characters."""

TOKEN_SECRET_BYTES: Final = 32
"""Entropy of an enrolment token."""

MAX_TOKEN_USES: Final = 10_000
"""Devices that one enrolment token may let in."""

RENEWAL_CHECK_S: Final = 60.0
"""How often a device or a coordinator looks whether a certificate is due, by the wall clock: a
machine that slept, or whose clock was set, notices within this time."""

MAX_RENEWALS_PER_MINUTE: Final = 10
"""Certificates that one device may ask for; it needs one in weeks."""

# -- rates ------------------------------------------------------------------------------------

RATE_BURST_S: Final = 10.0
"""Who was quiet may send so many seconds' worth at once, of everything in this section."""

ENROLMENTS_PER_S: Final = 50.0
"""Enrolments that one address may ask for, by default: strangers ask, and each takes a third of a
millisecond. Ten thousand devices behind one address translator are let in within 200 s."""

ALL_ENROLMENTS_PER_S: Final = 4 * ENROLMENTS_PER_S
"""Enrolments that all addresses together may ask for, by default."""

ENROLMENT_TRIES: Final = 8
"""A device that is told to come later asks so often, over a minute and a half."""

CALLS_PER_S: Final = 100.0
"""Calls that one device may make, by default; in a round it makes three."""

MESSAGES_PER_S: Final = 200.0
"""Messages that one device may send on its control stream, by default; in a round it sends four."""

RATED_MESSAGE_BYTES: Final = 16 * KIB
"""A larger message counts as one more for each of these."""

MAX_RATED: Final = 32_768
"""Devices, or addresses, whose rates are remembered; beyond that, the one that was quiet longest is
forgotten, and may send a burst again."""

# -- audit ------------------------------------------------------------------------------------

AUDIT_CHECKPOINT_ENTRIES: Final = 100
"""Entries of the audit log after which a checkpoint is signed."""

AUDIT_CHECKPOINT_S: Final = 600.0
"""Entries of a log that grows slower are signed after this time."""

AUDITED_REFUSALS_PER_MINUTE: Final = 10
"""Entries of one kind that one outsider can cause; more are counted and told in one entry."""

# -- blobs ------------------------------------------------------------------------------------

CHUNK_BYTES: Final = 512 * KIB
"""Blob bytes in one message. Throughput is flat between 256 KiB and 1 MiB and halves by 4 MiB
(measured on loopback with gRPC 1.85)."""

MAX_BLOB_BYTES: Final = 4 * GIB
"""Largest blob, by default."""

SENDER_QUOTA_BYTES: Final = 8 * GIB
"""Bytes that one sender may have in the store at a time, unfinished ones included, by default."""

SENDER_MAX_BLOBS: Final = 1000
"""Blobs that one sender may have in the store at a time, unfinished ones included."""

PART_LIFETIME_S: Final = 24 * 3600.0
"""How long an unfinished upload waits for its sender to come back, by default."""

BLOB_GRACE_S: Final = 600.0
"""A blob that nothing refers to is kept this long: whoever sent it may be about to name it."""

# -- connections ------------------------------------------------------------------------------

MAX_CONNECTIONS: Final = 16_384
"""Connections that a coordinator holds on its device port, by default; further ones are closed at
once. Above the fleet that one process is made for, and below what would take all its memory."""

MAX_ENROLMENT_CONNECTIONS: Final = 4096
"""The same on the enrolment port, where a connection lasts for one call."""

HANDSHAKE_TIMEOUT_S: Final = 20.0
"""A connection whose TLS is not up by then is closed."""

IDLE_ENROLMENT_S: Final = 30.0
"""A connection to the enrolment port without a call for so long is closed. On the device port,
where nobody is a stranger, there is no such bound: it would take some memory for each device."""

MAX_CALLS: Final = 64
"""Calls of one device at once, over all its connections; control streams apart, of which the newest
counts."""

MAX_STREAMS: Final = 32
"""Calls at once on one connection; further ones wait at the caller, or are refused. A device has
its control stream and a transfer or two; without a bound it could open enough to fill memory."""

TLS_RECORD_BYTES: Final = 4 * KIB
"""Largest TLS record that a coordinator sends."""

KEEPALIVE_INTERVAL_S: Final = 60.0
"""An idle connection is probed this often: below the 5 minutes after which address translators
forget it, and only 170 probes a second for 10,000 idle devices."""

KEEPALIVE_TIMEOUT_S: Final = 20.0
"""A probe without an answer for this long means that the link is broken."""

MIN_KEEPALIVE_INTERVAL_S: Final = 20.0
"""A peer that probes more often than this is disconnected."""

FIRST_RECONNECT_BACKOFF_S: Final = 0.2
"""A device that lost its link dials again this soon, in case it was a hiccup."""

MAX_RECONNECT_BACKOFF_S: Final = 10.0
"""A device waits at most this long, and somewhat at random, before it dials again."""

RECONNECTS_PER_S: Final = 200.0
"""So many devices may dial a coordinator again in a second, by default: a fleet that lost it
spreads out over as much time as that takes."""

MAX_RECONNECT_WINDOW_S: Final = 120.0
"""A device waits at most this long for its moment to dial again, whatever it is told."""

ROUND_RECONNECT_WINDOW_S: Final = 2.0
"""A device that is in a round waits at most this long: its round would go on without it."""

REFUSAL_GRACE_S: Final = 1.0
"""How long a refused stream may take to send what it opens with, before it is closed."""

CALL_TIMEOUT_S: Final = 30.0
"""How long a single call with a small answer may take."""

# -- control streams --------------------------------------------------------------------------

OUTBOX_MESSAGES: Final = 64
"""Messages that wait for one device before its stream is cut; a round needs six."""

MAX_PENDING_BYTES: Final = 32 * MIB
"""Messages of the coordinator that a device keeps until it has answered them; a round of the
largest cohort needs less than one MiB."""

OUTBOX_CLOSE_S: Final = 5.0
"""How long a stream that is being closed may take to send what is queued, before it is cut."""

HEARTBEAT_INTERVAL_S: Final = 15.0
"""How often a device says that it is alive, and is answered, by default."""

MIN_HEARTBEAT_INTERVAL_S: Final = 0.1
"""A device beats no more often than this, whatever it is told."""

HEARTBEATS_PER_S: Final = 100
"""All devices together beat about this often: a beat and its answer take the coordinator a third of
a millisecond, so a fleet of 10,000 is told to beat every 100 seconds."""

SILENT_HEARTBEATS: Final = 3
"""Either side gives a stream up on which nothing came for so many heartbeats: TCP and its probes
say nothing of a peer whose program hangs, or of one that a router in between speaks for."""

RECONNECT_GRACE_S: Final = 10.0
"""How long a device may be away during a round before it counts as lost, by default."""

RETURN_S: Final = 2 * MAX_RECONNECT_BACKOFF_S
"""How long devices may take to find a coordinator that was restarted: they dial it at least every
`MAX_RECONNECT_BACKOFF_S`, to which gRPC adds a fifth at random."""

IDLE_CPU: Final = 0.7
"""A machine counts as idle if this share of its processors' time is unused."""

CONDITION_CHECK_S: Final = 1.0
"""A campaign that waits for devices to meet its requirements looks again this often."""

STORAGE_RETRY_S: Final = 5.0
"""A campaign that the coordinator's own disk or database stopped is tried again this often."""

PAGE_DEVICES: Final = 1000
"""Devices in one page of a listing; the largest take 2.5 KiB each."""

MAX_METRICS: Final = 256
"""Metrics of one evaluation."""

MAX_METRIC_NAME_CHARS: Final = 200
"""Length of a metric's name."""

MAX_QUERY_COLUMNS: Final = 256
"""Columns, or quantiles, that one round asks about."""

MAX_QUERY_EDGES: Final = 1024
"""Edges of one histogram."""

MAX_QUERY_VALUES: Final = 16_384
"""Values of one round's answer."""

NOISE_COLLUDER_SHARE: Final = 0.1
"""Share of a sum's devices whose noise one that wants a minimum of it does not count on."""

QUERY_MIN_COHORT: Final = 5
"""A device answers queries only in sums over so many devices, by default."""

MAX_PATTERNS: Final = 64
"""Patterns that name a campaign's personal tensors."""

MAX_PATTERN_CHARS: Final = 200
"""Length of one of them."""

MAX_COHORT: Final = 4096
"""Devices in one round."""

MAX_STALENESS: Final = 50
"""Rounds that an update of a buffered campaign may be behind; below `DETAILED_ROUNDS`."""

DETAILED_ROUNDS: Final = 100
"""Newest rounds of a campaign whose devices' names the coordinator keeps in memory."""

WATCH_DETAIL_BYTES: Final = 64 * KIB
"""Records of rounds with all their devices' names in one message to who watches a campaign."""

WATCH_PAUSE_S: Final = 4e-5
"""Who watches a campaign hears nothing for this long after each message, times the devices in it:
in a large round each of their answers is a change, and telling it takes time with all of them."""

STATUS_DETAIL_BYTES: Final = 2 * MIB
"""The same, in an answer that is asked for once."""

MAX_STRATEGY_BYTES: Final = 2 * GIB
"""Updates of one round that a Flower strategy gets at once; its step takes 3 to 6 times that."""

MAX_VERSION_CHARS: Final = 64
"""Length of the name of a model's version, or of an agent's."""

MAX_CONSECUTIVE_ABORTS: Final = 3
"""Rounds in a row that may fail before their campaign is given up."""

MAX_REASON_CHARS: Final = 500
"""Length at which a device's free text is cut."""
