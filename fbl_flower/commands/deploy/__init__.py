"""A federation of separate machines: TLS and authenticated nodes around Flower's own programs (docs/deployment.md)."""
