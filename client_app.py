"""Flower's entry point for a client; everything is in fbl_flower.federation.client."""

from fbl_flower.federation.client import app

__all__ = ["app"]
