"""Writes golden losses and outer gradients of the code of the authors of TTT-E2E on a tiny model.

    python tests/oracles/ttt_e2e.py CHECKOUTS    # Python 3.12, equinox, optax, einops, hydra-core; writes golden/ttt_e2e.npz

    e2e    test-time-training/e2e a4fc4788ace38e29b5067916d4f4be33da894085, ttt/model/transformer.py

`MetaModel.loss_for_sequence` runs as it is, in JAX float32 on the CPU, with attention of the blocks before the fast ones by JAX
in place of cuDNN. 3 layers of which the last 2 (`suffix`) have fast weights, T = 16 tokens in chunks of C = 4, window W = 6:

    block     x + post(attention(pre(x))); in the suffix x + post(prime(pre(x))) of the fast SwiGLU MLP; x + post(MLP(pre(x)));
              RMSNorms of four or six sets of weights; SwiGLU is w2(silu(w1 x) * w3 x), matrices used as x @ w
    attention q and k RMS-normalised per head; RoPE of pairs (2n, 2n + 1); keys 0 <= distance < W
    prefix    the first layer reads the whole row once; the suffix reads it chunk by chunk, from the keys and values of the W
              tokens before the chunk that the suffix made then, with the weights it had then (keys normalised, before RoPE,
              places within [cache ‖ chunk])
    inner     of each chunk the mean loss L_n at the weights W_{n-1}; g = dL_n / dW of w1, w2, w3 of the suffix's fast MLPs,
              caches held (no gradient of L_n into an earlier chunk); W_n = W_{n-1} - lr r g min(1, clip / |g|), |g| over all of
              them together, per sequence; r, the rate's share, is (init + (lr - init) min(1, (step + 1) / warm)) / lr, of outer
              steps
    outer     mean over chunks of L_n, each before its own update; its gradient goes through updates, caches and clipping, to
              start values of the fast weights and everything else; only the fast weights differ from chunk to chunk

    tokens, targets [16] (targets are the tokens one on)
    weights/<name>, layers in front; <case>/{loss, chunk_loss [4], token_loss [16]}; grad/<name>: outer gradients of `plain`
    case: plain (lr 1, clip 1.0, which all chunks but the third exceed), still (lr 0), warm (init 0.1, lr 1 after 4, at step 0)

Written with jax 0.5 and equinox.
"""

import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np

os.environ["JAX_PLATFORMS"] = "cpu"
CASES = {"plain": {"lr": 1.0}, "still": {"lr": 0.0}, "warm": {"lr": 1.0, "init": 0.1, "steps": 4}}
LENGTH, CHUNK, WINDOW, VOCAB = 16, 4, 6, 16


def config(lr: float, init: float = 1.0, steps: int = 0):
    from ttt.config import Config, ModelConfig, SGDOptimizerConfig, TrainingConfig

    model = ModelConfig(
        vocab_size=VOCAB,
        output_size=VOCAB,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        mini_batch_size=CHUNK,
        sliding_window_size=WINDOW,
        seq_len=LENGTH,
        tie_word_embeddings=True,
        seq_modeling_block="SWA",
        compute_dtype="fp32",
        suffix_len=2,
        prime=True,
    )
    training = TrainingConfig(
        seq_length=LENGTH,
        train_mode="meta",
        spec_inner=["language_model.**.suffix_blocks.feed_forward_prime.**"],
        optimizer_inner=SGDOptimizerConfig(lr=lr, clip_gradient=1.0),
        ilr_warmup_steps=steps,
        ilr_init=init,
    )
    return Config(training=training, model=model)


def drawn(model, rng):
    """Every weight anew: norms near 1, matrices wide enough for gradients above the clip."""
    import equinox as eqx
    import jax

    def one(path, leaf):
        if not eqx.is_inexact_array(leaf):
            return leaf
        norm = leaf.ndim - ("blocks" in jax.tree_util.keystr(path) or "prime" in jax.tree_util.keystr(path)) == 1
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return jax.numpy.asarray(1 + 0.2 * noise if norm else 0.3 * noise)

    return jax.tree_util.tree_map_with_path(one, model)


def named(tree) -> dict:
    import equinox as eqx
    import jax

    leaves, _ = jax.tree_util.tree_flatten_with_path(eqx.filter(tree, eqx.is_inexact_array))
    return {
        jax.tree_util.keystr(path).removeprefix(".language_model.").replace(".", "/"): np.asarray(leaf) for path, leaf in leaves
    }


def arrays() -> dict[str, np.ndarray]:
    import equinox as eqx
    import jax
    from ttt.model.data import Batch
    from ttt.model.transformer import MetaModel

    attend = jax.nn.dot_product_attention

    def by_jax(*args, implementation=None, **options):
        return attend(*args, **options)

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, LENGTH + 1).astype(np.int32)
    row = Batch(input_ids=tokens[:-1], target_tokens=tokens[1:], loss_masks=np.ones(LENGTH, np.float32))
    row = jax.tree.map(jax.numpy.asarray, row)
    found = {"tokens": tokens[:-1], "targets": tokens[1:]}
    here = mock.patch.object(jax.nn, "dot_product_attention", by_jax)
    anywhere = mock.patch.object(jax.lax, "with_sharding_constraint", lambda x, _: x)
    with here, anywhere, jax.default_matmul_precision("highest"):
        for name, options in CASES.items():
            model, state = eqx.nn.make_with_state(MetaModel)(config(**options), key=jax.random.PRNGKey(0))
            model = drawn(model, np.random.default_rng(1))
            run = eqx.filter_value_and_grad(lambda model, state=state: model.loss_for_sequence(row, state), has_aux=True)
            (loss, metrics), grads = eqx.filter_jit(run)(model)
            kinds = MetaModel.MetricType
            one = {"loss": loss, "chunk_loss": metrics[kinds.loss], "token_loss": metrics[kinds.token_nll_loss]}
            found |= {f"{name}/{key}": np.asarray(value).reshape(-1) for key, value in one.items()}
            if name == "plain":
                found |= {f"grad/{key}": value for key, value in named(grads).items()}
                found |= {f"weights/{key}": value for key, value in named(model).items()}
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(sys.argv[1]) / "e2e"))
    np.savez_compressed(Path(__file__).parent / "golden" / "ttt_e2e.npz", **arrays())
