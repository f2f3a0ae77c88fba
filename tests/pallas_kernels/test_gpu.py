"""Which form a GPU gets, lists of tiles; on a machine with a GPU (JAX_PLATFORMS=cuda) both forms equal the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import MASKS, OneForm, arrays, compare, described, listed, random_tokens, with_gradient

from lcx.attention.attend import choose
from lcx.attention.mask import Causal, Window
from pallas_kernels.target import platform
from pallas_kernels.tile_attention import gpu, gpu_bench, gpu_few, gpu_lists, hopper, op, reference, triton
from pallas_kernels.tile_attention.bench import Causal as OneDocument
from pallas_kernels.tile_attention.tile_list import TileList
from pallas_kernels.tile_attention.tiling import EMPTY, FULL, PARTIAL
from pallas_kernels.tile_attention.tokens import Bias
from pallas_kernels.tile_attention.triton_blocks import this_gpu

KINDS = (FULL, PARTIAL)
on_a_gpu = pytest.mark.skipif(platform() != "gpu", reason="needs a GPU")


@pytest.mark.parametrize("kind, name", [("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA L4", None)])
def test_the_gpu_is_the_one_that_is_compiled_for(kind, name):
    with described(kind):
        assert this_gpu() == name and choose("auto") == "gpu"


@pytest.mark.parametrize(
    "kind, T, width, dtype, scale, form",
    [
        ("NVIDIA H100 80GB HBM3", 4096, 128, jnp.bfloat16, 0.1, "mosaic_gpu"),
        ("NVIDIA A100-SXM4-80GB", 4096, 128, jnp.bfloat16, 0.1, "triton"),
        ("NVIDIA H200", 1, 128, jnp.bfloat16, 0.1, "mosaic_gpu"),
        ("NVIDIA H200", 4096, 320, jnp.bfloat16, 0.1, "triton"),
        ("NVIDIA H200", 4096, 64, jnp.float32, 0.1, "triton"),
        ("NVIDIA H200", 4096, 64, jnp.bfloat16, -0.1, "triton"),
    ],
)
def test_the_form_follows_from_gpu_and_call(kind, T, width, dtype, scale, form):
    shape = lambda T, heads: jax.ShapeDtypeStruct((1, T, heads, width), dtype)
    fold = op.Tiled("gpu", OneDocument(), scale)
    tokens = gpu_bench.Tokens(*(jax.ShapeDtypeStruct((1, T), jnp.int32),) * 4)
    with described(kind):
        lowered = (
            jax.jit(fold.forward)
            .trace(shape(T, 4), shape(T, 2), shape(T, 2), tokens, tokens)
            .lower(lowering_platforms=("cuda",))
        )
    text = lowered.as_text()
    assert [name for name in ("mosaic_gpu", "triton") if f"custom_call @{name}" in text or f"xla.gpu.{name}" in text] == [form]


def test_lists_of_states():
    """Full tiles, then partial ones, in order."""
    states = np.random.default_rng(0).choice([FULL, PARTIAL, EMPTY], (2, 5, 7)).astype(np.int32)
    states[0, 3] = EMPTY
    minors, ends = map(np.asarray, gpu_lists.from_states(jnp.asarray(states)))
    for b, row in np.ndindex(2, 5):
        start, full, some = ends[b, 0, row]
        expected = [*np.flatnonzero(states[b, row] == FULL), *np.flatnonzero(states[b, row] == PARTIAL)]
        assert minors[b, 0, start : start + some].tolist() == expected
        assert full == (states[b, row] == FULL).sum()


@pytest.mark.parametrize("parts", [(1, 1), (2, 1), (1, 2)])
def test_lists_of_tiles(parts):
    """As given, in any order, cut into parts; what stands behind the count is left out."""
    rng = np.random.default_rng(0)
    places = np.stack([rng.permutation(35)[:12] for _ in range(4)]).reshape(2, 2, 12)
    kind = rng.choice([FULL, PARTIAL, EMPTY], places.shape)
    count = rng.integers(0, 13, (2, 2))
    tiles = TileList(
        *(jnp.asarray(x, jnp.int32) for x in (places // 7, places % 7)),
        jnp.asarray(kind, jnp.int8),
        jnp.asarray(count, jnp.int32),
    )
    rows, columns = parts
    inside = 5 * rows, 6 * columns  # what lies outside of the arrays is left out too
    minors, ends = map(np.asarray, gpu_lists.from_list(gpu_lists.split(tiles, *parts), inside))
    for b, g, row in np.ndindex(2, 2, 5 * rows):
        start, full, some = ends[b, g, row]
        listed = [(kind[b, g, n], places[b, g, n] % 7) for n in range(count[b, g]) if places[b, g, n] // 7 == row // rows]
        listed = [(kind, col) for kind, col in sorted(listed) if col < 6]
        expected = [[col * columns + i for k, col in listed if k == wanted for i in range(columns)] for wanted in KINDS]
        assert [minors[b, g, start : start + full].tolist(), minors[b, g, start + full : start + some].tolist()] == expected


def test_the_benchmark_says_that_there_is_no_gpu(capsys):
    if platform() == "gpu":
        pytest.skip("there is one")
    assert gpu_bench.main([]) == 2
    assert capsys.readouterr().err == "gpu_bench: no GPU: this machine's default device is cpu\n"


@pytest.mark.parametrize("mask", [gpu_bench.All(), OneDocument(), gpu_bench.near(400)], ids=["all", "causal", "near"])
def test_the_benchmark_counts_pairs_as_the_mask_lets_them_through(mask):
    index = jnp.arange(400)[None]
    tokens = gpu_bench.Tokens(index, index, jnp.ones_like(index), jnp.zeros_like(index))
    assert mask.visible(tokens.rows(), tokens.columns()).sum() == gpu_bench.pairs(400, mask)
    assert gpu_bench.pairs(400, gpu_bench.near(400)) == pytest.approx(0.1 * 400**2, rel=0.01)


@pytest.mark.parametrize(
    "T, S, heads",
    [(1, 400, (8, 2)), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((5, 640, (4, 4)), (40, 300, (6, 2))))],
)
def test_few_queries_over_split_keys_equal_the_reference(T, S, heads):
    """Parts of the keys that see nothing, and rows that see nothing in any."""
    rng = np.random.default_rng(0)
    q, k, v, *_ = arrays(rng, 2, T, S, *heads, 40, 64)
    tokens = random_tokens(rng, 2, T, "special"), random_tokens(rng, 2, S, "packed")
    options = {"mask": Window(size=200), "scale": 0.2, "softcap": None}
    assert gpu_few.serves(q, k)
    run = functools.partial(triton.forward, interpret=True)
    got = gpu_few.forward(run, q, k, v, *tokens, **options)
    expected = reference.forward(q, k, v, *tokens, **options)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=3e-6)


CASES = [
    (MASKS[0], (2, 2), (64, 64), None),
    (MASKS[1], (6, 2), (128, 40), 2.0),
    (MASKS[2], (4, 1), (40, 64), None),
    (MASKS[3], (2, 1), (128, 128), None),
    (MASKS[0], (4, 2), (256, 256), 30.0),
]


@on_a_gpu
@pytest.mark.parametrize("form", [hopper, triton], ids=lambda form: form.__name__.rpartition(".")[2])
@pytest.mark.parametrize("mask, heads, widths, softcap", CASES, ids=["causal", "window or sink", "chunk", "beyond", "wide"])
def test_equals_the_reference_on_this_gpu(mask, heads, widths, softcap, form):
    """bfloat16, several documents, shared and shuffled tokens, rows that see nothing."""
    options = {"mask": mask, "scale": 0.1, "softcap": softcap}
    dense = with_gradient(functools.partial(reference.forward, **options))
    run = with_gradient(functools.partial(op.attention, OneForm(form, **options)))
    for seed, kind in enumerate(("packed", "special", "shuffled", "padding")):
        rng = np.random.default_rng(seed)
        q, k, v, *rest = arrays(rng, 2, 371, 501, *heads, *widths, jnp.bfloat16)
        rest += [random_tokens(rng, 2, length, kind) for length in (371, 501)]
        compare(run(q, k, v, *rest), dense(*(x.astype(jnp.float32) for x in (q, k, v)), *rest), 1e-2)


@on_a_gpu
@pytest.mark.parametrize("T, heads", [(1, (32, 8)), (7, (4, 4))])
def test_few_queries_equal_the_reference_on_this_gpu(T, heads):
    rng = np.random.default_rng(0)
    q, k, v, *_ = arrays(rng, 2, T, 5000, *heads, 128, 128, jnp.bfloat16)
    tokens = [random_tokens(rng, 2, length, "special") for length in (T, 5000)]
    options = {"mask": Causal(), "scale": 0.1, "softcap": None}
    got = jax.jit(functools.partial(gpu.forward, **options))(q, k, v, *tokens)
    expected = reference.forward(*(x.astype(jnp.float32) for x in (q, k, v)), *tokens, **options)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-2)


@on_a_gpu
def test_float32_equals_the_reference_on_this_gpu():
    options = {"mask": Causal(), "scale": 0.2, "softcap": None}
    rng = np.random.default_rng(0)
    given = *arrays(rng, 2, 300, 300, 4, 2, 64, 64), *(random_tokens(rng, 2, 300, "packed"),) * 2
    got = with_gradient(functools.partial(op.attention, OneForm(gpu, **options)))(*given)
    compare(got, with_gradient(functools.partial(reference.forward, **options))(*given), 1e-5)


@on_a_gpu
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)], ids=["float32", "bfloat16"])
def test_a_bias_equals_the_reference_on_this_gpu(dtype, tolerance):
    rng = np.random.default_rng(0)
    q, k, v, *rest = arrays(rng, 2, 300, 401, 4, 2, 64, 64, dtype)
    rest += random_tokens(rng, 2, 300, "packed"), random_tokens(rng, 2, 401, "packed")
    slopes = jnp.broadcast_to(jnp.array([0.5, 0.25, 0.01, 0.3], jnp.float32), (2, 300, 4))
    options = {"mask": MASKS[1], "scale": 0.2, "bias": Bias(slopes, "index")}
    got = with_gradient(functools.partial(op.attention, OneForm(gpu, **options)))(q, k, v, *rest)
    dense = with_gradient(functools.partial(reference.forward, **options))
    compare(got, dense(*(x.astype(jnp.float32) for x in (q, k, v)), *rest), tolerance)


@on_a_gpu
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("form", ["hopper", "triton"])
def test_lists_of_tiles_equal_the_reference_on_this_gpu(form, groups, monkeypatch):
    if form == "triton":
        monkeypatch.setattr(gpu, "takes", lambda *call: False)
    given, tiles, pairs = listed(groups, 500, 640)
    options = {"mask": Causal(), "scale": 0.1}
    q, k, v, *rest = given
    got = with_gradient(functools.partial(op.attention, OneForm(gpu, **options, tiles=tiles, tile=(128, 128))))(*given)
    dense = functools.partial(reference.forward, **options, allowed=pairs)
    compare(got, with_gradient(dense)(*(x.astype(jnp.float32) for x in (q, k, v)), *rest), 1e-2)


def test_tiles_come_with_their_size():
    q, k, v, *_, q_tokens, k_tokens = listed(1, 141, 201)[0]
    with pytest.raises(ValueError, match=r"tile = \(128, 128\) without a list of tiles: expected both or neither"):
        gpu.forward(q, k, v, q_tokens, k_tokens, mask=Causal(), scale=1.0, tile=(128, 128))
