"""How many programs JAX has compiled, for whoever wants none to be compiled for a prompt of another length."""

import jax

EVENT = "/jax/core/compile/backend_compile_duration"  # JAX's name of a compilation


class Compilations:
    """`count` and `seconds` of this process since `listen`."""

    def __init__(self):
        self.count, self.seconds = 0, 0.0

    def listen(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event: str, seconds: float, **_) -> None:
        if event == EVENT:
            self.count, self.seconds = self.count + 1, self.seconds + seconds
