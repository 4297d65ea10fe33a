"""Federations of virtual devices: what a campaign would come to, before there are devices.

    config      the `[simulation]` table of minga.toml
    partition   who has which examples
    device      what one device does in a round: the trainer of real devices
    stack       the same for many devices at once, as one batched computation
    crew        processes on Ray among which the devices of a round are divided
    fleet       the devices: their examples, what they keep, how fast they are
    campaign    the rounds, driven by the coordinator's own machines and arithmetic
    state       what an interrupted simulation goes on from

Rounds, aggregation, rules, privacy and server optimisers are those of
`minga.federation.coordinator`; nothing of them is written anew here. What is not simulated: the
network, certificates, and masks, which cancel in the sum.
"""
