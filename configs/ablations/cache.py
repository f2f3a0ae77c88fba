"""The KV cache on the shipped readers: what bits cost, and what is left when most tokens go.

    python -m experiments.ablate --config='config:ablations.cache.bits(only="KIVI, 2 bits")'       # one arm, minutes
    python -m experiments.ablate --config='config:ablations.cache.kept(only="SnapKV")'             # at 12, 20 and 50 %
    python -m experiments.ablate --config='config:ablations.cache.streams(only="DuoAttention")'    # heads, layers, channels
    python -m experiments.ablate --config='config:ablations.cache.prefixes(only="Squeezed, 0.1")'  # clusters of a long prompt

A run or a folder of `transformers` is measured as a shipped model is. Tables of KVQuant, directions of Q-Filters and gates of
DuoAttention are looked for in its folder, and left out where calibration="" or measured="" says so:

    python -m experiments.calibrate --run_dir=models/my-folder --to=models/my-folder/kvquant.npz
    python -m experiments.ablate --config='config:ablations.cache.bits(model="models/my-folder", length=4096)'

Codecs go into every layer of attention, policies and selectors into those that see all tokens. Arms that the model's layers
refuse are left out, and logged; asked for with only=, they are refused with the reason.

Models are measured as a server reads: prompts in chunks of 512, each compressed before the next comes, answers token by token;
held-out text 32 tokens a pass. So a policy sees the question, which is the end of the prompt, before it drops.

Expected (papers, at 7B): KVQuant loses less than 0.1 perplexity at 3 bits, less than KIVI, each ingredient less than without;
8 bits lose nothing. Squeezed loses nothing at 30 % of a prompt, little at 10 %, less than chance or as many for each head;
two levels are as one. WindowKV is near the whole cache at 12 %, Chelsea at 20 %; SnapKV and expected attention are ahead of
H2O, and H2O of the newest tokens alone.

Measured at 2,048 (docs/results/cache.md), nats a byte lost of 1.101: int8 0.0000, fp8 0.0005, KIVI-4 0.0001, KIVI-2 0.0159,
KVQuant-4 0.0007, -3 0.0056 (equally spaced 0.0105, no outliers 0.0084, keys rotated 0.0055, no sink 0.0054), -2 0.0179 (Q-Norm
0.0190): rotation, sinks and Q-Norm make no difference on this model. At 20 % of the tokens, nats a byte, passkey, one of eight:
WindowKV 1.155 0.53 0.45, newest 1.171 0.20 0.23, Chelsea 1.178 0.27 0.03, SnapKV 1.179 0.50 0.33, TOVA 1.181 0.00 0.03, H2O
1.235 0.77 0.15, expected attention 1.263 0.93 0.93, KeyDiff 1.271 0.67 0.40, chance 1.277 0.20 0.03.
At 512 on `reader` (`model="reader", length=512`), of 1.278: KVQuant-3 0.0008, keys rotated 0.0051, no outliers 0.0037, -2
0.0112, KIVI-2 0.0068; policies as at 2,048 read at once.
Read in one chunk, so that policies choose once with the question before them (`kept(chunk=2048)`), passkey and one of eight at
20 %: WindowKV 0.73 0.70, SnapKV 0.83 0.47, expected attention 0.93 0.95, Chelsea 0.20 0.00. KVzip, which reads all
twice: 1.00 0.88.
Behind a prompt of 1,920 of which 10 % are read (`prefixes`), nats a byte, 1.176 with all: Squeezed 1.184, two levels 1.182,
each head its best clusters 1.180 (a difference within its noise), clusters by chance 1.205, Quest 1.218.
"""

import dataclasses
import functools
import math

from configs.ablations.arms import chosen
from lcx.cache.cache import Cache
from lcx.cache.codecs.codec import Codec
from lcx.cache.codecs.groups import KIVI, IntGroups
from lcx.cache.codecs.kvquant import KVQuant
from lcx.cache.codecs.scaled import Fp8, Int8
from lcx.cache.dense import DenseCache
from lcx.cache.kv_cache import KVCache
from lcx.cache.policies.budgets import Pyramid
from lcx.cache.policies.cam import CaM
from lcx.cache.policies.chelsea import Chelsea
from lcx.cache.policies.duo_attention import DuoAttention
from lcx.cache.policies.evict import Evict
from lcx.cache.policies.fold import Fold
from lcx.cache.policies.kvzip import FIRST, LATER, KVzip
from lcx.cache.policies.policy import Policy
from lcx.cache.policies.simlayerkv import SimLayerKV
from lcx.cache.policies.think import ThinK
from lcx.cache.policies.windowkv import WindowKV
from lcx.cache.scorers.chance import Chance
from lcx.cache.scorers.chunks import WholeChunks
from lcx.cache.scorers.compactor import Compactor
from lcx.cache.scorers.critical import Critical
from lcx.cache.scorers.curdkv import CurDKV
from lcx.cache.scorers.expected_attention import ExpectedAttention
from lcx.cache.scorers.key_difference import KeyDifference
from lcx.cache.scorers.key_norm import KeyNorm
from lcx.cache.scorers.lag import Lag
from lcx.cache.scorers.leverage import Leverage
from lcx.cache.scorers.non_causal import NonCausal
from lcx.cache.scorers.observed import Observed
from lcx.cache.scorers.q_filters import QFilters
from lcx.cache.scorers.recency import Recency
from lcx.cache.scorers.scorer import Scorer
from lcx.cache.scorers.snapkv import SnapKV
from lcx.cache.scorers.tova import TOVA
from lcx.cache.selectors.quest import Quest
from lcx.cache.selectors.selector import Selector
from lcx.cache.selectors.squeezed import Coarse, Squeezed, SqueezedHeads
from lcx.data.recall import Needles
from lcx.data.sources import StandardLibrary
from lcx.evaluation.ablation import Ablation, Variant
from lcx.evaluation.cache_places import WHOLE, Places
from lcx.evaluation.panels import Panel
from lcx.evaluation.tasks.perplexity import Perplexity
from lcx.evaluation.tasks.retrieval import Retrieval
from lcx.spec import SpecError

SHARES = (0.12, 0.2, 0.5)
SINKS = 4
READ = (0.1, 0.2, 0.3)


def bits(model: str = "reader_2k", length: int = 2048, calibration: str | None = None, only: str | None = None) -> Ablation:
    """Codecs, all tokens kept. calibration: of KVQuant, for this model, by default what its folder holds; "" leaves it out."""
    at = Places(model, length)
    calibration = at.known("calibration", calibration, KVQuant, _asked(only, "KVQuant"))
    arms = {name: _cache(codec) for name, codec in _codecs(calibration).items()}
    return _ablation(at, {WHOLE: DenseCache()} | arms, (_variant("as read", length),), only)


def kept(
    model: str = "reader_2k", length: int = 2048, chunk: int = 512, measured: str | None = None, only: str | None = None
) -> Ablation:
    """Policies at shares of the tokens. chunk: of a prompt, behind each of which they choose; at `length` they choose once, the
    question at the end of the prompt read. measured: directions of Q-Filters, for this model, by default what its folder holds;
    "" leaves them out."""
    at = Places(model, length)
    measured = at.known("measured", measured, QFilters, _asked(only, "Q-Filters"))
    name = "{:g} kept" if chunk < length else "{:g} kept, read at once"
    variants = tuple(_variant(name.format(share), length, at.keeps(share), chunk) for share in SHARES)
    policies = _policies(measured, at)
    _check_room(policies, length)
    arms = {name: KVCache(keys="raw" if policy.raw else "rotated", policy=policy) for name, policy in policies.items()}
    return _ablation(at, arms, variants, only)


def streams(model: str = "reader_2k", length: int = 2048, measured: str | None = None, only: str | None = None) -> Ablation:
    """Policies that choose layers, heads or channels, which say themselves how many. measured: gates of this model, by default
    what its folder holds; "" leaves them out."""
    at = Places(model, length)
    measured = at.known("measured", measured, DuoAttention, _asked(only, "DuoAttention"))
    duo = lambda share: DuoAttention(gates=measured, streaming=share, sinks=4, recent=256)
    lazy = lambda threshold: SimLayerKV(threshold=threshold, recent=256)
    heads = {"DuoAttention, a quarter of heads": 0.25, "DuoAttention": 0.5, "DuoAttention, three quarters of heads": 0.75}
    policies: dict[str, Policy] = {name: duo(share) for name, share in heads.items()} if measured else {}
    policies |= {
        "SimLayerKV, 0.9": lazy(0.9),
        "SimLayerKV": lazy(0.65),
        "ThinK": ThinK(),
        "ThinK, 0.6 of channels": ThinK(channels=0.6),
    }
    arms = {name: KVCache(policy=policy) for name, policy in policies.items()}
    return _ablation(at, {WHOLE: DenseCache()} | arms, (_variant("as read", length),), only)


def prefixes(model: str = "reader_2k", length: int = 2048, scored: int = 128, only: str | None = None) -> Ablation:
    """What queries behind a prompt read of it: a share of all but its last 100 tokens, and these. scored: tokens behind it,
    read one by one. Quest's pages hold as many at the last of them, those behind the prompt among them, and more before."""
    at = Places(model, length)
    arms: dict[str, Cache] = {WHOLE: DenseCache()}
    for share in READ:
        pages = Quest(page=16, dense_layers=0, budget=int(share * (length - scored - 100)) + 100 + scored)
        selectors: dict[str, Selector] = {
            "Squeezed": Squeezed(quantile=1 - share),
            "Squeezed, two levels": Squeezed(quantile=1 - share, coarse=Coarse()),
            "Squeezed, threshold of means": Squeezed(quantile=1 - share, calibrated="mean"),
            "each head its best clusters": SqueezedHeads(quantile=1 - share),
            "clusters by chance": SqueezedHeads(quantile=1 - share, by="chance"),
            "Quest": pages,
        }
        arms |= {f"{name}, {share:g}": KVCache(selector=selector) for name, selector in selectors.items()}
    text = Perplexity(source=StandardLibrary(split="heldout"), windows=16, fewer="take", buckets=2, prompt=length - scored)
    panels = (Panel(title=f"code behind a prompt, nats a {at.unit}", task="text", metric="nll", where=(("bucket", "all"),)),)
    return dataclasses.replace(_ablation(at, arms, (_variant("as read", length),), only), tasks=(text,), panels=panels)


def _codecs(calibration: str) -> dict[str, Codec]:
    plain = {
        "fp8": Fp8(),
        "int8": Int8(),
        "int4 groups": IntGroups(),
        "int3 groups": IntGroups(bits=3),
        "int2 groups": IntGroups(bits=2),
        "KIVI, 4 bits": KIVI(bits=4),
        "KIVI, 2 bits": KIVI(),
        "KIVI, 2 bits, no residual": KIVI(residual=0),
    }
    if not calibration:
        return plain
    known = {"calibration": calibration}
    return plain | {
        "KVQuant, 4 bits": KVQuant(bits=4, **known),
        "KVQuant, 3 bits": KVQuant(bits=3, **known),
        "KVQuant, 3 bits, keys rotated": KVQuant(bits=3, rotated=True, **known),
        "KVQuant, 3 bits, equally spaced": KVQuant(bits=3, codebook="uniform", **known),
        "KVQuant, 3 bits, no outliers": KVQuant(bits=3, outliers=0.0, **known),
        "KVQuant, 3 bits, no sink": KVQuant(bits=3, sinks=0, **known),
        "KVQuant, 2 bits": KVQuant(bits=2, **known),
        "KVQuant, 2 bits, Q-Norm": KVQuant(bits=2, codebook="normed", **known),
        "KVQuant, 2 bits, no outliers": KVQuant(bits=2, outliers=0.0, **known),
    }


def _policies(measured: str, at: Places) -> dict[str, Policy]:
    encode, depth = at.experiment.data.tokenizer.encode, at.experiment.model.depth
    group = max(n for n in range(1, 9) if depth % n == 0)  # the authors' 8, or what divides the layers
    asks = {name: tuple(encode(text).tolist()) for name, text in (("first", FIRST), ("later", LATER), ("suffix", "\n"))}
    twice = functools.partial(KVzip, keep=1.0, every=at.length, **asks)  # room for all that answers and held-out text take
    evict = lambda score, **options: Evict(score=score, keep=1.0, **options)
    snap: Scorer = SnapKV(window=32)
    known: dict[str, Policy] = {"Q-Filters": evict(QFilters(directions=measured), sinks=SINKS)} if measured else {}
    return known | {
        "chance": evict(Chance()),
        "newest and sinks": evict(Recency(), sinks=SINKS),
        "key norm": evict(KeyNorm(), sinks=SINKS),
        "KeyDiff": evict(KeyDifference()),
        "H2O": evict(Observed(), recent=32),
        "observed, mean": evict(Observed(by="mean")),
        "TOVA": evict(TOVA()),
        "SnapKV": evict(snap),
        "SnapKV, all heads alike": evict(snap, heads="shared"),
        "SnapKV, AdaKV": evict(snap, heads="adaptive"),
        "SnapKV, pyramid": evict(snap, layers=Pyramid(beta=4.0)),
        "SnapKV, whole chunks": evict(WholeChunks(of=snap)),
        "SnapKV, folded": Fold(score=snap, keep=1.0),
        "expected attention": evict(ExpectedAttention()),
        "expected, CriticalKV": evict(Critical(of=ExpectedAttention(values="left out"))),
        "LagKV": evict(Lag(block=32)),
        "CurDKV": evict(CurDKV()),
        "leverage": evict(Leverage(sketch=16), sinks=SINKS),
        "attention of neighbours": evict(NonCausal(), sinks=SINKS),
        "Compactor": evict(Compactor(sketch=16)),
        "SnapKV, ThinK": ThinK(score=snap, keep=1.0),
        "SnapKV, CaM": CaM(score=snap, keep=1.0),
        "KVzip": twice(spread=8.0),
        "KVzip, at most twice the mean": twice(),
        "KVzip, each layer": twice(over="layer", spread=4.0),
        "WindowKV": WindowKV(keep=1.0, layers=Pyramid(beta=14.0, group=group)),
        "Chelsea": Chelsea(keep=1.0),
        "Chelsea, each counts one": Chelsea(keep=1.0, mass="one"),
    }


def _cache(codec: Codec) -> Cache:
    return KVCache(codec=codec, keys="raw" if codec.raw else "rotated")


def _variant(method: str, length: int, edits: tuple = (), chunk: int = 512) -> Variant:
    return Variant(method=method, lengths=(length,), edits=edits, chunk=chunk)


def _asked(only: str | None, part: str) -> bool:
    """Whether an arm of the part is to be measured."""
    return only is None or only.startswith(part)


def _check_room(policies: dict[str, Policy], length: int) -> None:
    """Raises SpecError where the smallest share of a text is less than what policies keep in any case."""
    least = max(getattr(policy, "sinks", 0) + getattr(policy, "recent", 0) for policy in policies.values()) / min(SHARES)
    if length < least:
        held = f"of which {min(SHARES):.0%} hold the first and newest tokens that policies always keep"
        raise SpecError(f"length = {length}: expected at least {math.ceil(least)}, {held}")


def _ablation(at: Places, caches: dict[str, Cache], variants: tuple[Variant, ...], only: str | None) -> Ablation:
    return Ablation(
        arms=at.arms(chosen(caches, only), refused="left out" if only is None else "raised"),
        variants=variants,
        tasks=(
            Perplexity(name="text", source=StandardLibrary(split="heldout"), windows=8, fewer="take"),
            Retrieval(name="needle", generator=Needles(), examples_each=6, depths=(0.0, 0.25, 0.5, 0.75, 1.0), mode="greedy"),
            Retrieval(name="multi_key", generator=Needles(needles=8, queries=1), examples_each=40, mode="greedy"),
        ),
        panels=(
            Panel(title=f"held-out code, nats a {at.unit}", task="text", metric="nll", where=(("bucket", "all"),)),
            Panel(title="one of eight keys, exact", task="multi_key", metric="exact"),
        ),
    )
