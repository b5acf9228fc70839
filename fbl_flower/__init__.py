"""Federated Balanced Learning as a Flower application (arXiv 2601.14042)."""

__version__ = "0.1.0"
