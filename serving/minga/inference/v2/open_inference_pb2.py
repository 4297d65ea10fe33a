"""The messages of `open_inference.proto`, in a descriptor pool of their own.

Not generated, unlike the `.pyi` and `.binpb` beside it: generated code registers its messages
in the process' one pool, where those of other packages that speak the protocol (tritonclient,
MLServer, KServe) have the same names, so that a process could not import both.
"""

from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_POOL = descriptor_pool.DescriptorPool()
_FILE = descriptor_pb2.FileDescriptorSet.FromString(
    Path(__file__).with_name("open_inference.binpb").read_bytes()
).file[0]

DESCRIPTOR = _POOL.AddSerializedFile(_FILE.SerializeToString())
for _name, _descriptor in DESCRIPTOR.message_types_by_name.items():
    _message = message_factory.GetMessageClass(_descriptor)
    _message.__module__ = __name__  # pickle looks for it here
    globals()[_name] = _message
