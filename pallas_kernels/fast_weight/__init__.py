"""Fast weights: memories that are small networks, trained on a sequence while it is read.

At every token the weights W of one head take a step down the gradient of a loss of its key and value, with decay and momentum

    S_t = eta_t S_{t-1} - theta_t grad l(W_ref; k_t, v_t),   W_t = (1 - alpha_t) W_{t-1} + S_t,   o_t = f(W_t; q_t)

and l = ||f(W; k) - v||^2 / 2. Linear attention, delta rules, TTT and Titans are choices of f, of the place W_ref where the
gradient is taken, and of the coefficients. Chunks are computed exactly with products of matrices alone, no weights between
tokens being made: with the gradients e_j of a chunk known, W_i = beta_i W_0 + f_i S_0 - sum_j G_ij x_j^T e_j.

    coefficients.py   G, beta and f of decay, momentum and step sizes
    network.py        f and its gradient
    chunks.py         one chunk, exactly
    reference.py      the recurrence, token by token
    op.py             a row, chunk by chunk, by XLA or in a kernel
    tpu.py            a group of chunks in one TPU kernel, and its backward pass in another
    gpu.py            a group of chunks of one matrix on a GPU, in one kernel what XLA cannot do at once
    gpu_carry.py      that kernel, and its backward pass in another
    over_mesh.py      the kernels on a mesh
    triangular.py     delta rules without substitution
    traced.py         what a chunk costs
"""
