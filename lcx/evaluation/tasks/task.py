"""The contract of a task: it measures a model at one length and gives tidy rows, one number each."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lcx.data.tokenizers import Tokenizer
from lcx.inference.language_model import TokenModel
from lcx.inference.requests import NotFinite
from lcx.spec import Spec

Row = dict[str, Any]  # task, metric, length, value, low, high, count, examples, and what else tells rows apart (depth, bucket)
Values = Sequence | np.ndarray
RESAMPLES = 1000


class Metric(NamedTuple):
    """unit: what its numbers are. range: all that they can be, which fixes the axis of a plot; None where it is open."""

    unit: str
    range: tuple[float, float] | None


NLL = Metric("nats a token", None)
ANSWERS = Metric("share of answers", (0, 1))
TOKENS = Metric("share of answer tokens", (0, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Spec, abc.ABC):
    """Base of every task. name: what rows call it. seed: of its examples, whatever the model."""

    name: str
    seed: int = 0

    @property
    @abc.abstractmethod
    def metrics(self) -> dict[str, Metric]:
        """What its rows hold, by name."""

    @abc.abstractmethod
    def inputs(self, tokenizer: Tokenizer, length: int) -> Any:
        """What a model is given. Raises an error, never truncates, where the task or its source does not fit the length."""

    @abc.abstractmethod
    def measure(self, model: TokenModel, length: int) -> list[Row]:
        """The rows of `inputs` at one length. Raises WindowOverflow where the model's window is shorter, NotFinite for a
        model that gives no numbers."""

    def row(self, metric: str, length: int, values: Values, weights: Values | None = None, **more: Any) -> Row:
        """The mean of `values` (one an example, weighted) with its bootstrap 95 % interval over examples.

        count: what was averaged (the weights' sum), in `examples` independent examples. Raises NotFinite for values that
        are not: the model is broken, and a mean would hide how often.
        """
        values = np.asarray(values, np.float64)
        weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
        if broken := int((~np.isfinite(values)).sum()):
            raise NotFinite(f"{self.name} at {length}, {metric}: {broken} of {len(values)} examples are not finite")
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
            "examples": len(values),
        }


def _interval(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """2.5 and 97.5 percentiles of the weighted mean over resampled examples, by a fixed generator."""
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    means = (values * weights)[draws].sum(axis=1) / weights[draws].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
