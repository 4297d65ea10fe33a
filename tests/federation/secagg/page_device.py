"""A device written from `docs/explanation/secure-aggregation-protocol.md` alone.

It shares nothing with the product but the containers of the messages, and is as plain as can be:
whole numbers, loops, and primitives of the cryptography package. It makes no checks on what it is
handed; it is here to show that the page says enough.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from minga.federation.secagg.messages import Advert, Confirmation, EncryptedShare, Reveal
from minga.federation.v1 import federation_pb2 as pb

P = 2**256 + 297


def encode(purpose: str, *fields: bytes | str | bool | int | float) -> bytes:
    out = b""
    for value in ("minga secagg v1", purpose, *fields):
        if isinstance(value, bytes):
            kind, body = b"x", value
        elif isinstance(value, str):
            kind, body = b"s", value.encode()
        elif isinstance(value, bool):
            kind, body = b"b", bytes([value])
        elif isinstance(value, int):
            kind, body = b"i", str(value).encode()
        else:
            kind, body = b"f", struct.pack(">d", value)
        out += kind + len(body).to_bytes(4, "big") + body
    return out


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def hkdf(secret: bytes, info: bytes, length: int) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=info).derive(secret)


def keystream(key: bytes, num_bytes: int) -> bytes:
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(num_bytes))


def agree(secret: bytes, public: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).exchange(
        X25519PublicKey.from_public_bytes(public)
    )


def public_of(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def place(device: str) -> int:
    return int.from_bytes(sha(encode("share place", device)), "big") % P


def rotated(values: Sequence[float], plan_digest: bytes) -> list[float]:
    """Flip signs and multiply every column by the Hadamard matrix, entry by entry."""
    block = min(2 ** int(math.log2(max(len(values) // 32, 64))), 4096)
    columns = -(-len(values) // block)
    padded = [*values, *[0.0] * (block * columns - len(values))]
    signs = keystream(sha(encode("rotation", plan_digest))[:16], len(padded) // 8)
    flipped = [-x if signs[i // 8] >> (i % 8) & 1 else x for i, x in enumerate(padded)]
    out = []
    for row in range(block):
        for column in range(columns):
            terms = (
                (-1) ** (row & i).bit_count() * flipped[i * columns + column] for i in range(block)
            )
            out.append(math.fsum(terms) / math.sqrt(block))
    return out


# --- what a round is about ---


def context_of(invite: pb.RoundInvite) -> bytes:
    about = invite.model_digest
    if invite.personal or invite.scaffold:
        about = sha(encode("method", about, invite.scaffold, *invite.personal))
    if invite.HasField("question"):
        fields = []
        for part in invite.question.parts:
            fields += [part.column, part.low, part.high, len(part.edges), *part.edges]
        about = sha(encode("question", about, *fields))
    elif invite.HasField("evaluation"):
        asked = invite.evaluation
        about = sha(encode("evaluation", about, *asked.metrics, asked.clip))
    told = {name: getattr(v, v.WhichOneof("kind")) for name, v in invite.training.items()}
    if invite.HasField("private_update"):
        told["private_update.max_norm"] = invite.private_update.max_norm
        told["private_update.variance"] = invite.private_update.variance
        if invite.private_update.bit_level:
            told["private_update.bit_level"] = invite.private_update.bit_level
    return sha(encode("context", about, *(x for name in sorted(told) for x in (name, told[name]))))


# --- what a device tells ---


def vector_of_metrics(asked: pb.Evaluation, measured: Mapping[str, float]) -> list[float]:
    values = [measured.get(name, math.nan) for name in asked.metrics]
    has = [math.isfinite(value) for value in values]
    clipped = [max(-asked.clip, min(asked.clip, value)) for value in values]
    values = [value if there else 0.0 for value, there in zip(clipped, has, strict=True)]
    return values + [asked.clip if there else 0.0 for there in has]


def vector_of_columns(asked: pb.Question, columns: Mapping[str, Sequence[float]]) -> list[float]:
    vector = []
    for part in asked.parts:
        rows = columns[part.column]
        values = [value for value in rows if not math.isnan(value)]
        scaled = [
            (max(part.low, min(part.high, value)) - part.low) / (part.high - part.low)
            for value in values
        ]
        sums = [len(values), sum(scaled), sum(value**2 for value in scaled)]
        if part.edges:
            bins = [0] * (len(part.edges) + 1)
            for value in values:
                bins[sum(edge <= value for edge in part.edges)] += 1
            sums += bins
        vector += [total / len(rows) for total in sums]
    return vector


def plain_blob(update: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(update)}f", *update)


def shortened(update: Sequence[float], max_norm: float) -> list[float]:
    length = math.hypot(*update)
    if length <= max_norm:
        return list(update)
    return [x * (max_norm / (length * (1 + 2**-20))) for x in update]


class Noise:
    """Integers k with probabilities in proportion to exp(-k**2 / (2 * variance))."""

    def __init__(self, variance: int, draw: Callable[[int], bytes]) -> None:
        self.variance, self.draw = variance, draw

    def below(self, limit: int) -> int:
        return int.from_bytes(self.draw(64), "big") % limit  # off from uniform by 2**-400

    def yes(self, exponent: Fraction) -> bool:
        """True with the probability exp(-exponent)."""
        while exponent > 1:
            if not self.yes(Fraction(1)):
                return False
            exponent -= 1
        heads = 1
        while self.below(exponent.denominator * heads) < exponent.numerator:
            heads += 1
        return heads % 2 == 1

    def next(self) -> int:
        scale = math.isqrt(self.variance) + 1
        while True:
            size = self.below(scale)
            if not self.yes(Fraction(size, scale)):
                continue
            while self.yes(Fraction(1)):
                size += scale
            sign = 1 - 2 * self.below(2)
            away = (size * scale - self.variance) ** 2
            if (size or sign > 0) and self.yes(Fraction(away, 2 * self.variance * scale**2)):
                return sign * size


class PageDevice:
    """One device in one round."""

    def __init__(self, invite: pb.RoundInvite, signer, draw: Callable[[int], bytes]) -> None:
        self.invite, self.plan, self.signer, self.draw = invite, invite.plan, signer, draw
        names = "num_values max_cohort num_neighbours threshold value_bits clip max_weight"
        fields = [getattr(self.plan, name) for name in names.split()]
        fields += [True] if self.plan.rotate else []
        self.digest = sha(encode("plan", self.plan.round_id, context_of(invite), *fields))
        self.bits = self.plan.value_bits + (self.plan.max_cohort - 1).bit_length()
        self.me = signer.device_id

    def advertise(self) -> Advert:
        self.seed, self.mask_secret, self.share_secret = (self.draw(32) for _ in range(3))
        keys = public_of(self.mask_secret), public_of(self.share_secret)
        commitment = sha(encode("seed commitment", self.digest, self.me, self.seed))
        signed = encode("advert", self.digest, self.me, *keys, commitment)
        self.own = Advert(
            device_id=self.me,
            mask_key=keys[0],
            share_key=keys[1],
            self_seed_commitment=commitment,
            certificate=self.signer.certificate_der,
            signature=self.signer.sign(signed),
        )
        return self.own

    def share(self, adverts: Iterable[Advert]) -> tuple[EncryptedShare, ...]:
        self.peers = {advert.device_id: advert for advert in adverts}
        polynomials = []
        for secret in (self.seed, self.mask_secret):
            drawn = self.draw(48 * (self.plan.threshold - 1))
            higher = [int.from_bytes(drawn[i : i + 48], "big") for i in range(0, len(drawn), 48)]
            polynomials.append([*higher, int.from_bytes(secret, "big")])
        messages = []
        for name, peer in self.peers.items():
            x, plain = place(name), b""
            for polynomial in polynomials:
                degree = len(polynomial) - 1
                value = sum(c * pow(x, degree - i, P) for i, c in enumerate(polynomial)) % P
                plain += value.to_bytes(33, "big")
            info = self.channel(self.own, peer)
            nonce = self.draw(12)
            sealed = AESGCM(hkdf(agree(self.share_secret, peer.share_key), info, 32)).encrypt(
                nonce, plain, info
            )
            messages.append(
                EncryptedShare(sender=self.me, receiver=name, ciphertext=nonce + sealed)
            )
        return tuple(messages)

    def channel(self, sender: Advert, receiver: Advert) -> bytes:
        names = (sender.device_id, sender.share_key, receiver.device_id, receiver.share_key)
        return encode("shares", self.digest, *names)

    def mask(self, inbox: Iterable[EncryptedShare], delta: Iterable[float], weight: int) -> bytes:
        self.inbox = {message.sender: message for message in inbox}
        values = self.levels([float(x) for x in delta], weight)
        streams = [(1, hkdf(self.seed, encode("self mask", self.digest, self.me), 16))]
        for name in self.inbox:
            peer = self.peers[name]
            first, second = sorted((self.own, peer), key=lambda advert: advert.device_id)
            pair = (first.device_id, first.mask_key, second.device_id, second.mask_key)
            key = hkdf(
                agree(self.mask_secret, peer.mask_key), encode("pair mask", self.digest, *pair), 16
            )
            streams.append((1 if self.me < name else -1, key))
        for sign, key in streams:
            mask = struct.unpack(f"<{len(values)}I", keystream(key, 4 * len(values)))
            values = [value + sign * word for value, word in zip(values, mask, strict=True)]
        packed = sum(value % 2**self.bits << self.bits * i for i, value in enumerate(values))
        return packed.to_bytes(-(-len(values) // 8) * self.bits, "little")

    def levels(self, delta: list[float], weight: int) -> list[int]:
        if not self.invite.HasField("private_update"):
            return self.rounded(delta, weight)
        asked, most = self.invite.private_update, 2 ** (self.plan.value_bits - 1) - 1
        bit = asked.bit_level if math.hypot(*delta) <= asked.max_norm else -asked.bit_level
        delta = shortened(delta, asked.max_norm)
        size, norm = math.sqrt(len(delta)), most * asked.max_norm / self.plan.clip
        bound = min(math.sqrt(norm**2 + size**2 / 4 + 4 * (norm + size / 2)), norm + size)
        for _ in range(8):
            *levels, weight = self.rounded(delta, weight)
            if math.hypot(*levels) <= bound:
                break
        else:
            levels = [level - (level > 0) + (level < 0) for level in levels]
        if asked.bit_level:
            levels.append(bit)
        if asked.variance:
            noise = Noise(asked.variance, self.draw)
            levels = [level + noise.next() for level in levels]
        return [*levels, weight]

    def rounded(self, delta: list[float], weight: int) -> list[int]:
        clip, most = self.plan.clip, 2 ** (self.plan.value_bits - 1) - 1
        if self.plan.rotate:
            delta = rotated(delta, self.digest)
        coins = struct.iter_unpack("<I", keystream(self.draw(16), 4 * len(delta)))
        share = weight / self.plan.max_weight
        scaled = (max(-clip, min(clip, x)) * share * most / clip for x in delta)
        return [math.floor(y + u / 2**32) for y, (u,) in zip(scaled, coins, strict=True)] + [weight]

    def confirm(self, survivors: Iterable[str]) -> Confirmation:
        self.survivors = sorted(survivors)
        signed = encode("survivors", self.digest, self.me, *self.survivors)
        return Confirmation(device_id=self.me, signature=self.signer.sign(signed))

    def reveal(self, confirmations: Iterable[Confirmation]) -> Reveal:
        seeds, keys = {}, {}
        for name, message in self.inbox.items():
            info = self.channel(self.peers[name], self.own)
            key = hkdf(agree(self.share_secret, self.peers[name].share_key), info, 32)
            nonce, sealed = message.ciphertext[:12], message.ciphertext[12:]
            plain = AESGCM(key).decrypt(nonce, sealed, info)
            if name in self.survivors:
                seeds[name] = plain[:33]
            else:
                keys[name] = plain[33:]
        return Reveal(device_id=self.me, self_seed_shares=seeds, mask_key_shares=keys)
