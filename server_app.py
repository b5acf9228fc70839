"""Flower's entry point for the server; everything is in fbl_flower.federation.server."""

from fbl_flower.federation.server import app

__all__ = ["app"]
