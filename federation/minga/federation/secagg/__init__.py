"""Secure aggregation: the coordinator learns the sum of the devices' updates and nothing else.

Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning", CCS 2017,
with the consistency check of its active-adversary variant, over the sparse masking graph of Bell et
al., "Secure single-server aggregation with (poly)logarithmic overhead", CCS 2020.

    device                                      coordinator
    ------                                      -----------
    advertise()  signed keys          ------->  check_advert, neighbours
    share()      encrypted shares     <------>  check_shares
    mask()       masked update        ------->  MaskedSum.add
    confirm()    signed survivors     <------>  check_confirmation
    reveal()     one share per peer   ------->  check_reveal, unmask

Everything here is pure: bytes and frozen dataclasses in, values or typed errors out (`errors`).
`device` and `coordinator` are the two sides; `plan` is what they agree on.

What holds:

- Every key, signature and ciphertext is bound to the plan's digest, and with it to the model and
  the training parameters that the round starts from.
- Devices may vanish after any step. The sum is exactly that of the survivors, as long as every
  secret that it needs has `threshold` honest shares.
- A coordinator that lies about who survived gets nothing: 2 * threshold exceeds the neighbours and
  colluders together, so it can rebuild at most one of a device's two secrets, and neighbours
  compare the list that they were shown before they reveal anything.
- A device that lies in its shares is found out and left out while enough honest ones remain.

What does not:

- Whoever issues identities can invent devices. A coordinator that holds the authority's key and is
  willing to use it can surround a device with its own; keep the authority elsewhere if the
  coordinator is not trusted to that point.
- In a sparse graph the coordinator draws the ring (`graph`); a device sees its neighbours only. The
  probabilities in `sizing` hold for a ring drawn at random. Small cohorts get the complete graph,
  where nothing is drawn.
- An update's content is its device's word: clipping bounds nobody who does not clip. Sums outside
  of what honest updates reach are refused, poisoned ones within are not seen.
- The sum itself says something about its parts; noise for differential privacy is added elsewhere.
"""
