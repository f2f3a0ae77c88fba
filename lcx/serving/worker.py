"""One thread that runs an engine, for a server whose own thread must not wait: requests in, pieces back to the event loop."""

import asyncio
import collections
import itertools
import logging
import threading
from collections.abc import AsyncIterator, Sequence

from lcx.inference.engine import Ask, Engine, Piece

_log = logging.getLogger(__name__)


class Busy(RuntimeError):
    """More requests are unfinished than the server keeps."""


class Failed(RuntimeError):
    """The engine failed, and serves nothing any more, or it failed one request."""


class Worker:
    """waiting: the most requests that may be unfinished at a time. Only the worker's thread touches the engine's state; others
    leave requests, and numbers that are cancelled, in an inbox."""

    def __init__(self, engine: Engine, waiting: int = 256):
        self.engine, self.waiting = engine, waiting
        self._lock = threading.Condition()
        self._numbers = itertools.count()
        self._inbox: collections.deque[tuple[int, Ask | None]] = collections.deque()
        self._answers: dict[int, Answer] = {}
        self._failure: Exception | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, asks: Sequence[Ask]) -> list["Answer"]:
        """Must be called in an event loop. Raises Busy, Failed, and what `Engine.check` raises; then none is taken."""
        for ask in asks:
            self.engine.check(ask)
        with self._lock:
            if self._failure is not None:
                raise Failed(str(self._failure))
            if (unfinished := len(self._answers)) + len(asks) > self.waiting:
                raise Busy(
                    f"{unfinished} requests are unfinished and {len(asks)} more asked for: expected {self.waiting} at most"
                )
            made = [Answer(self, next(self._numbers), asyncio.get_running_loop()) for _ in asks]
            self._answers |= {answer.number: answer for answer in made}
            self._inbox.extend((answer.number, ask) for answer, ask in zip(made, asks, strict=True))
            self._lock.notify()
        return made

    def cancel(self, number: int) -> None:
        """Forgets a request; nothing where it is finished."""
        with self._lock:
            if self._answers.pop(number, None) is not None:
                self._inbox.append((number, None))
                self._lock.notify()

    @property
    def unfinished(self) -> int:
        return len(self._answers)

    def close(self) -> None:
        """Ends the thread behind the step that it is in."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._thread.join()

    def _run(self) -> None:
        numbers: dict[int, int] = {}  # the engine's, of ours
        try:
            while True:
                with self._lock:
                    self._lock.wait_for(lambda: self._closed or self._inbox or self.engine.busy)
                    if self._closed:
                        return
                    arrived = [self._inbox.popleft() for _ in range(len(self._inbox))]
                for number, ask in arrived:
                    if ask is not None:
                        numbers[number] = self.engine.submit(ask)
                    elif number in numbers:
                        self.engine.cancel(numbers.pop(number))
                ours = {theirs: number for number, theirs in numbers.items()}
                for piece in self.engine.step():
                    number = ours[piece.number]
                    if piece.finish is not None:
                        del numbers[number]
                    told = piece if piece.failure is None else Failed(str(piece.failure))
                    self._tell(number, told, piece.finish is not None)
        except Exception as error:
            _log.exception("the engine failed")
            with self._lock:
                self._failure = error
            for number in list(self._answers):
                self._tell(number, Failed(str(error)), True)

    def _tell(self, number: int, piece: Piece | Failed, last: bool) -> None:
        with self._lock:
            answer = self._answers.pop(number, None) if last else self._answers.get(number)
        if answer is not None and not answer.loop.is_closed():
            answer.loop.call_soon_threadsafe(answer.queue.put_nowait, piece)


class Answer:
    """The pieces of one request, as they come."""

    def __init__(self, worker: Worker, number: int, loop: asyncio.AbstractEventLoop):
        self.number, self.loop = number, loop
        self.queue: asyncio.Queue[Piece | Failed] = asyncio.Queue()
        self._worker = worker

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Raises Failed if the engine does, or tokens of the request found no slot in a cache."""
        while True:
            piece = await self.queue.get()
            if isinstance(piece, Failed):
                raise piece
            yield piece
            if piece.finish is not None:
                return

    def cancel(self) -> None:
        self._worker.cancel(self.number)
