"""Generated from protos/minga/federation/v1; `make protos` writes it again."""
