"""Layers with linear memories written out in float64, token by token: what the modules are compared with."""

import numpy as np
from flax import nnx


def sigmoid(y):
    return 1 / (1 + np.exp(-y))


def silu(y):
    return y * sigmoid(y)


def unit(y):
    return y / np.sqrt((y * y).sum(axis=-1, keepdims=True) + 1e-6)


def rms(y, weight, eps=1e-6):
    return y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + eps) * weight


def weights_of(module) -> dict[str, np.ndarray]:
    """By path, its parts joined by dots."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): np.asarray(leaf, np.float64) for path, leaf in flat}


def convolved(y, kernel):
    """Causal, of [T,H,D]."""
    past = np.concatenate([np.zeros((len(kernel) - 1, *y.shape[1:])), y])
    return sum(kernel[n] * past[len(kernel) - 1 - n :][: len(y)] for n in range(len(kernel)))


class LinearMemory:
    """Of a `NeuralMemory` of one plain matrix a head, with all its gates."""

    def __init__(self, spec, weights):
        self.spec, self.weights = spec, weights
        self.w, self.s = weights["start.0"].copy(), np.zeros_like(weights["start.0"])
        self.at = self.w.copy()
        self.written = 0

    def projected(self, x, name):
        """q, k or v of a document's rows [T,M]."""
        y = np.einsum("tm,mhd->thd", x, self.weights[name])
        y = silu(convolved(y, self.weights[f"{name}_kernel"]) if self.spec.taps else y)
        return y if name == "value" else unit(y)

    def gate(self, x, name):
        return sigmoid(x @ self.weights[f"gates.{name}"] + self.weights[f"gate_bias.{name}"])

    def read(self, q):
        """[H,D] of one token."""
        return np.einsum("hde,hd->he", self.w, q)

    def write(self, k, v, x):
        """One token's keys and values [H,D]; its gates are those of x [M]."""
        if self.written % self.spec.chunk == 0 or self.spec.gradient == "token":
            self.at = self.w.copy()
        self.written += 1
        theta, alpha, eta = self.spec.step * self.gate(x, "step"), self.gate(x, "keep"), self.gate(x, "momentum")
        slope = np.einsum("hd,he->hde", k, np.einsum("hde,hd->he", self.at, k) - v)
        self.s = eta[:, None, None] * self.s - theta[:, None, None] * slope
        self.w = (1 - alpha)[:, None, None] * self.w + self.s

    def joined(self, out):
        """Of [H,D] or [T,H,D]: the norm of heads and the output matrix."""
        return np.einsum("...hd,hdm->...m", rms(out, self.weights["norm.weight"]), self.weights["output"])
