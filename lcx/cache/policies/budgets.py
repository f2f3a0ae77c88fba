"""How a budget of tokens is spread over the layers of a model; the mean share is 1."""

import abc
import dataclasses

from lcx.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerBudgets(Spec, abc.ABC):
    @abc.abstractmethod
    def share(self, layer: int, depth: int) -> float:
        """Of one layer, in units of the mean."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Even(LayerBudgets):
    """All layers alike."""

    def share(self, layer, depth):
        return 1.0

    @classmethod
    def examples(cls):
        return (cls(),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pyramid(LayerBudgets):
    """PyramidKV (2024): the last layer has 1 / beta of the mean, the first 2 - 1 / beta, the others lie on a line between.

    group: layers that share one budget, as in WindowKV (2025), which takes beta 14 and groups of 8 and so divides by
    `beta / group`.
    """

    beta: float = 20.0
    group: int = 1

    def validate(self):
        self.check(self.group >= 1, "group", "at least 1 layer")
        self.check(
            self.beta > self.group / 2, "beta", f"more than half of group = {self.group}, so that the first layer keeps some"
        )

    def share(self, layer, depth):
        if depth % self.group:
            divisors = ", ".join(str(n) for n in range(1, depth + 1) if depth % n == 0)
            self.fail("group", self.group, f"a divisor of the model's {depth} layers: one of {divisors}")
        groups, place = depth // self.group, layer // self.group
        last = self.group / self.beta
        return 1.0 if groups == 1 else (2 - last) + (2 * last - 2) * place / (groups - 1)

    @classmethod
    def examples(cls):
        return (cls(), cls(beta=14.0, group=2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares(LayerBudgets):
    """One number a layer, in any unit."""

    values: tuple[float, ...]

    def validate(self):
        self.check(len(self.values) >= 1 and min(self.values) > 0, "values", "a positive number a layer")

    def share(self, layer, depth):
        if len(self.values) != depth:
            self.fail("values", self.values, f"one for each of the model's {depth} layers")
        return self.values[layer] * depth / sum(self.values)

    @classmethod
    def examples(cls):
        return (cls(values=(1.0, 3.0)),)
