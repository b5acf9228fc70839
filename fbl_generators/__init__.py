"""Trained 4-bit generators that come with fbl-flower.

A package of its own, because Flower's app bundle leaves binary files out and its copy of `fbl_flower` hides the
installed one during a run. This package is never in the bundle, so importing it always finds the installed weights.
"""
