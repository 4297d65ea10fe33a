"""The federation's server: rounds, devices, identity, storage, the gRPC services."""
