"""The monitor: what models are asked and answer, against what they were trained on.

```text
request -> observer    hands arrays to a thread; a queue that is full drops, it never waits
        -> sketch      counts in the bins of the model's `reference`; sketches add up exactly
        -> keeper      joins the sketches of all replicas into windows, in its `store`
        -> judgement   a full window against the reference, by `significance` and size
        -> alarms      an append-only log that others act on
```

The reference travels inside the ONNX file, so it is wherever the model is, a device included.
All of it is numpy; nothing of a request leaves the process but counts, and, for requests with an
id, what the model answered, so that labels can be joined when they come (`labels`).
"""
