"""Classifiers, split into features F and a linear head H."""

from fbl_flower.models.classifier import Classifier, empty_classifier, new_classifier

__all__ = ["Classifier", "empty_classifier", "new_classifier"]
