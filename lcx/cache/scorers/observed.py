"""H2O (2023): heavy hitters, the tokens that received most attention of all queries so far.

    score_j = sum over queries i, and heads of the group, of p_ij,   or that by the queries that could see j

The sum, the paper's, favours early tokens; the mean is kvpress's `observed attention`.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from lcx.cache.scorers.scorer import Scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observed(Scorer):
    """by: whether attention counts in `sum`, or in the `mean` of the queries from the token on (of a text of one document)."""

    by: Literal["sum", "mean"] = "sum"

    @property
    def marks(self):
        return "received"

    def score(self, now):
        if self.by == "sum":
            return now.marks
        return now.marks / jnp.maximum(now.seen[:, None, None] - now.info.index, 1)

    @classmethod
    def examples(cls):
        return (cls(), cls(by="mean"))
