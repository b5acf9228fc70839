"""Classifiers, split into features F and a linear head H."""

from fbl_flower.models.classifier import Classifier, as_received, check_model, empty_classifier, fitted, new_classifier

__all__ = ["Classifier", "as_received", "check_model", "empty_classifier", "fitted", "new_classifier"]
