"""Metrics of classifiers."""

from __future__ import annotations

import numpy as np


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of equal elements.

    Example:
      >>> accuracy(np.array([0, 1, 1]), np.array([0, 1, 0])) == 2 / 3
      True
    """
    return float(np.mean(predicted == labels))


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean over the classes of F1, the harmonic mean of precision and recall.

    Classes that occur in neither array are not counted.

    Example:
      >>> macro_f1(np.array([0, 1, 1, 1]), np.array([0, 1, 1, 0])) == (2 / 3 + 4 / 5) / 2
      True
    """
    scores = []
    for number in np.union1d(predicted, labels):
        right = np.sum((predicted == number) & (labels == number))
        scores.append(2 * right / (np.sum(predicted == number) + np.sum(labels == number)))
    return float(np.mean(scores))
