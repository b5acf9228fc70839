"""Classifiers, split into features F and a linear head H."""

from fbl_flower.models.classifier import Classifier, check_model, empty_classifier, new_classifier

__all__ = ["Classifier", "check_model", "empty_classifier", "new_classifier"]
