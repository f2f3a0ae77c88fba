"""What an ablation of caches has to know of the model that it measures: where caches lie, its window, what is known of it."""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Literal

from lcx.cache.cache import Cache
from lcx.cache.known import Measured
from lcx.cache.kv_cache import KVCache
from lcx.cache.policies.budgets import Even
from lcx.cache.policies.duo_attention import DuoAttention
from lcx.data.tokenizers import ByteTokenizer
from lcx.evaluation.ablation import Arm
from lcx.evaluation.checks import Edits, trained_experiment, used
from lcx.mixers.attention import Attention
from lcx.positions.length_rule import LengthRule
from lcx.spec import SpecError
from lcx.support import broken
from lcx.support_rules.caches import OWN
from lcx.support_rules.walk import attentions
from lcx.training.experiment import Experiment
from lcx.training.shipped import run_folder

WHOLE = "full precision"
_log = logging.getLogger("lcx")


@dataclasses.dataclass(frozen=True)
class Places:
    """The caches of a shipped model, a run or a folder of `transformers` that is read at `length` tokens.

    Raises SpecError if there is no such model, its window is smaller, or it has no attention whose cache can be another."""

    model: str
    length: int

    def __post_init__(self):
        if self.length > (window := self.experiment.data.length):
            raise SpecError(f"length = {self.length}: expected at most {window}, the window of {self.model}")
        for path, _ in attentions(self.experiment):
            if not OWN.fullmatch(path):
                raise SpecError(f"model = {self.model!r}: {path} is within another mixer: expected attention of whole layers")
        if not self.every:
            raise SpecError(f"model = {self.model!r}: expected a model with layers of attention")

    @functools.cached_property
    def experiment(self) -> Experiment:
        return trained_experiment(self.model)

    @property
    def unit(self) -> str:
        """What a token of the model is called."""
        return "byte" if isinstance(self.experiment.data.tokenizer, ByteTokenizer) else "token"

    @property
    def every(self) -> dict[str, Attention]:
        """Layers of attention, by path."""
        return dict(attentions(self.experiment))

    @property
    def far(self) -> dict[str, Attention]:
        """Those that see all of `length` tokens: what a policy or a selector is for. The others are left as they are, as they
        let go of far tokens themselves. Raises SpecError if there are none."""
        reach = {path: mixer.mask.reach for path, mixer in self.every.items()}
        found = {path: mixer for path, mixer in self.every.items() if reach[path] is None or reach[path] >= self.length}
        if not found:
            most = f"at most {max(reach.values())}, what some layer of {self.model} sees"
            raise SpecError(f"length = {self.length}: expected {most}, or codecs alone")
        return found

    def arms(self, caches: Mapping[str, Cache], *, refused: Literal["left out", "raised"]) -> tuple[Arm, ...]:
        """The model with each of the caches. Those that the rules refuse for this model are left out, and logged; or the first
        that cannot be made raises SpecError, as it does if all but full precision are left out."""
        arms, out = [], {}
        for name, cache in caches.items():
            try:
                arm = Arm(name=name, model=self.model, edits=self.edits(cache))
                if refused == "left out" and (said := next(broken(used(self.experiment, arm.edits, "Arm.edits")), None)):
                    raise SpecError(said)
                arms.append(arm)
            except SpecError as error:
                if refused == "raised":
                    raise SpecError(f"{name}: {error}") from None
                out.setdefault(str(error), []).append(name)
        for said, names in out.items():
            _log.info("left out: %s: %s", "; ".join(names), said)
        if out and {arm.name for arm in arms} <= {WHOLE}:
            raise SpecError(f"model = {self.model!r}: nothing to measure: {next(iter(out))}")
        return tuple(arms)

    def edits(self, cache: Cache) -> Edits:
        """The model with this cache: in every layer where it holds all tokens, in the `far` ones where it drops some or reads
        some; unrolled, where layers hold unlike numbers of them."""
        policy = cache.policy if isinstance(cache, KVCache) else None
        chooses = isinstance(cache, KVCache) and (policy or cache.selector) is not None
        there, every = self.far if chooses else self.every, self.every
        caches = {path: self._fitting(cache, every[path]) for path in there}
        if policy is not None and len(there) < len(every):
            near = ", ".join(path for path in every if path not in there)
            if isinstance(policy, DuoAttention) or policy.layers != Even():
                kind = "gates" if isinstance(policy, DuoAttention) else "layers"
                policy.fail(kind, getattr(policy, kind), f"a policy of each layer, as {near} see a window, not all tokens")
            if policy.rereads:  # what a second reading leaves no trace in
                caches |= {path: self._fitting(KVCache(), every[path]) for path in every if path not in there}
        found = [(f"{path}.cache", caches[path]) for path in every if path in caches]
        if policy is not None and self.experiment.model.unroll != "all" and self._unlike(cache):
            found.append(("model.unroll", "all"))
        return tuple(found)

    def keeps(self, share: float) -> Edits:
        """Of a cache with a policy: how many tokens stay."""
        return tuple((f"{path}.cache.policy.keep", share) for path in self.far)

    def known(self, argument: str, given: str | None, part: type[Measured], asked: bool) -> str:
        """The name of what was measured: what is given, or the model itself, whose folder holds it; "" where no arm that is
        `asked` reads it. Raises SpecError, with the command that measures it, where it is not there."""
        file = part.MEASURED[1]
        if given is not None or (run_folder(self.model) / file).is_file():
            return self.model if given is None else given
        if not asked:
            return ""
        command = f"python -m experiments.calibrate --run_dir={self.model} --method={part.__name__} --to={self.model}/{file}"
        raise SpecError(
            f"{argument}: {self.model} has no {file}: expected a file that `{command}` makes, there or at the path given as "
            f'{argument}, or {argument}="" without {part.__name__}'
        )

    def _fitting(self, cache: Cache, mixer: Attention) -> Cache:
        """With raw keys where the layer's rope turns keys anew."""
        if isinstance(self.experiment.model.rope_of(mixer), LengthRule):
            try:
                return dataclasses.replace(cache, keys="raw")
            except SpecError:  # the rules say what stands against it
                pass
        return cache

    def _unlike(self, cache: KVCache) -> bool:
        depth = self.experiment.model.depth
        try:
            shares = {cache.policy.share(n, depth) for n in range(depth)}
        except SpecError:  # the rules refuse it
            return False
        return len(shares) > 1 or {cache.leads(n) for n in range(depth)} != {None}
