"""The Open Inference Protocol v2 on onnxruntime: one engine for servers and devices.

The protocol (`tensors`, `protocol`) turns bytes into arrays and back and knows no socket.
The engine (`engine`, `repository`) turns arrays into arrays and knows no protocol.
The ASGI application (`app`) joins the two; `server` puts it on a port of this process,
`minga.serving` on Ray Serve. `client` is the other end of the wire.

Nothing in here imports Ray, MLflow or torch.
"""
