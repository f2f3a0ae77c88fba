"""The contract of a task: it measures a model at one length and gives tidy rows, one number each."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lcx.inference.language_model import TokenModel
from lcx.spec import Spec

Row = dict[str, Any]  # task, metric, length, value, count, low, high, and whatever else tells rows apart (depth, bucket)
Values = Sequence | np.ndarray
RESAMPLES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Spec, abc.ABC):
    """Base of every task. name: what rows call it. seed: of its examples, whatever the model."""

    name: str
    seed: int = 0

    @abc.abstractmethod
    def measure(self, model: TokenModel, length: int) -> list[Row]:
        """The rows at one length. Raises an error, never truncates, where the task does not fit the length or the window."""

    def row(self, metric: str, length: int, values: Values, weights: Values | None = None, **more: Any) -> Row:
        """The mean of `values` (one an example, weighted) with its bootstrap 95 % interval over examples."""
        values = np.asarray(values, np.float64)
        weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
        low, high = _interval(values, weights)
        mean = float((values * weights).sum() / weights.sum())
        return {
            "task": self.name,
            "metric": metric,
            "length": length,
            **more,
            "value": mean,
            "low": low,
            "high": high,
            "count": int(weights.sum()),
        }


def _interval(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """2.5 and 97.5 percentiles of the weighted mean over resampled examples, by a fixed generator."""
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    means = (values * weights)[draws].sum(axis=1) / weights[draws].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
