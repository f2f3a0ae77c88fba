"""Runs Hopper kernels without a GPU: a warpgroup is a thread, memory is NumPy, barriers block until they are arrived at.

Mosaic GPU's own interpreter refuses layouts. `emulate(monkeypatch)` puts eager stand-ins for the names that `hopper` and
`hopper_kernels` take from JAX: what a kernel computes and how its barriers order it are run as written; registers, layouts and
the asynchrony of copies and products are not. Memory starts as NaN. A barrier that goes a phase ahead of who waits on it, which
a GPU would take for one that has not been reached, and a wait of a minute are errors.
"""

import itertools
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.tile_attention import hopper, hopper_kernels

PATIENCE = 60.0  # seconds
_here = threading.local()  # program, group, how many scopes it has opened


class Ref:
    def __init__(self, array):
        self.array = array

    def give_up(self):
        """Only barriers have who waits on them."""

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    at = property(lambda self: _At(self))

    def __getitem__(self, place):
        return self.array[_numbers(place)].copy()

    def __setitem__(self, place, value):
        self.array[_numbers(place)] = np.asarray(value)

    def transpose(self, axes):
        return Ref(self.array.transpose(axes))


class _At:
    def __init__(self, ref):
        self.ref = ref

    def __getitem__(self, place):
        return Ref(self.ref.array[_numbers(place)])


class Accumulator:
    def __init__(self, value):
        self.value = np.array(value, np.float32)

    def __getitem__(self, place):
        return jnp.asarray(self.value)


class Barrier:
    def __init__(self, arrivals):
        self.arrivals, self.arrived, self.phase, self.waited = arrivals, 0, 0, {}
        self.changed = threading.Condition()

    def arrive(self):
        with self.changed:
            self.arrived += 1
            if self.arrived == self.arrivals:
                self.arrived, self.phase = 0, self.phase + 1
                self.changed.notify_all()

    def wait(self):
        with self.changed:
            mine = self.waited[_here.group] = self.waited.get(_here.group, 0) + 1
            reached = lambda: self.phase >= mine or _here.failures
            assert self.changed.wait_for(reached, PATIENCE) and not _here.failures, f"group {_here.group} waits for ever"
            assert self.phase == mine, f"a barrier is {self.phase - mine} phases ahead of group {_here.group}"

    def give_up(self):
        with self.changed:
            self.changed.notify_all()


class Barriers(list):
    at = property(lambda self: self)


def emulate(monkeypatch):
    lax = types.SimpleNamespace(
        axis_index=lambda name: np.int32(_here.group if name == "group" else _here.program[name]),
        div=lambda a, b: np.int32(a // b),
        rem=lambda a, b: np.int32(a % b),
        fori_loop=_fori_loop,
        optimization_barrier=lambda x: x,
        broadcast_in_dim=lambda x, shape, axes: np.broadcast_to(np.expand_dims(x, 1 - axes[0]), shape),
    )
    pl = types.SimpleNamespace(
        ds=lambda start, size: slice(int(start), int(start) + size),
        when=lambda condition: lambda do: do() if condition else None,
        loop=lambda start, stop: lambda do: [do(np.int32(n)) for n in range(int(start), int(stop))] and None,
        run_scoped=_run_scoped,
        run_state=_run_state,
    )
    mosaic = types.SimpleNamespace(
        TilingTransform=lambda tiling: None,
        SwizzleTransform=lambda swizzle: None,
        SMEM=lambda shape, dtype, transforms=(): lambda: Ref(_poison(shape, dtype)),
        Barrier=lambda num_arrivals=1, num_barriers=1: lambda: _barriers(num_arrivals, num_barriers),
        ACC=_Accumulators(),
        set_max_registers=lambda count, action: None,
        copy_gmem_to_smem=_copy,
        barrier_wait=lambda barrier: _one(barrier).wait(),
        barrier_arrive=lambda barrier: _one(barrier).arrive(),
        wgmma=_wgmma,
        load=lambda ref, place, layout, optimized: ref[()],
        layout_cast=lambda x, layout: np.asarray(x),
    )
    monkeypatch.setattr(hopper_kernels, "jax", types.SimpleNamespace(lax=lax))
    monkeypatch.setattr(hopper_kernels, "pl", pl)
    monkeypatch.setattr(hopper_kernels, "mosaic", mosaic)
    kernel = types.SimpleNamespace(kernel=_kernel, CompilerParams=lambda **options: None)
    monkeypatch.setattr(hopper, "mosaic", kernel)


class _Accumulators:
    def __call__(self, shape, dtype):
        return lambda: Accumulator(np.zeros(shape))

    def init(self, value):
        return Accumulator(value)


def _kernel(body, *, out_type, grid, grid_names, num_threads, thread_name, compiler_params):
    def run(*inputs):
        outs = [Ref(_poison(out.shape, out.dtype)) for out in out_type]
        refs = [Ref(np.asarray(x)) for x in inputs]
        for place in itertools.product(*map(range, grid)):
            _program(lambda: body(*refs, *outs), dict(zip(grid_names, place, strict=True)), num_threads)
        return [jnp.asarray(out.array) for out in outs]

    return run


def _program(body, place, groups):
    failures, scopes, lock = [], [], threading.Lock()

    def group(index):
        _here.group, _here.program, _here.scopes, _here.lock, _here.opened, _here.failures = (
            index,
            place,
            scopes,
            lock,
            0,
            failures,
        )
        try:
            body()
        except BaseException as failure:
            failures.append(failure)
            for barrier in jax.tree.leaves(scopes):
                barrier.give_up()

    threads = [threading.Thread(target=group, args=(i,), daemon=True) for i in range(groups)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    if failures:
        raise failures[0]


def _run_scoped(body, *kinds, collective_axes=None):
    make = lambda: jax.tree.map(lambda kind: kind(), kinds, is_leaf=callable)
    if collective_axes is None:
        return body(*make())
    with _here.lock:  # one allocation for all warpgroups
        if len(_here.scopes) == _here.opened:
            _here.scopes.append(make())
        _here.opened += 1
    return body(*_here.scopes[_here.opened - 1])


def _run_state(body):
    def run(state):
        body(state)
        return jax.tree.map(lambda x: x.value, state, is_leaf=lambda x: isinstance(x, Accumulator))

    return run


def _fori_loop(start, stop, body, carry):
    for n in range(int(start), int(stop)):
        carry = jax.tree.map(np.asarray, body(np.int32(n), carry))
    return carry


def _copy(source, target, barrier):
    target.array[...] = source.array
    _one(barrier).arrive()


def _wgmma(total, a, b):
    a, b = (np.asarray(x.array if isinstance(x, Ref) else x, np.float32) for x in (a, b))
    total.value += a @ b


def _barriers(arrivals, count):
    return Barriers(Barrier(arrivals) for _ in range(count))


def _one(barrier):
    return barrier if isinstance(barrier, Barrier) else barrier[0]


def _poison(shape, dtype):
    return np.full(shape, np.nan if jnp.issubdtype(dtype, jnp.floating) else -(1 << 30), dtype)


def _numbers(place):
    return tuple(int(x) if isinstance(x, np.integer | jax.Array) else x for x in place) if isinstance(place, tuple) else place
