"""What is told to a server that may be slow or dead, by a thread, so that whoever has something to tell never waits."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

MOST = 100_000  # kept while the server does not answer; the oldest give way
BATCH = 1000  # points at once, which is MLflow's limit
LONGEST_WAIT_S = 30.0  # between two tries
log = logging.getLogger(__name__)


class Outbox:
    """Sends points and makes calls; what fails goes to the end of the line and is tried again, ever less often.

    So a call that fails forever holds up nothing else. `send` takes up to BATCH points; `is_hopeless` tells the errors
    that another try cannot mend, after which points or a call are given up. `server` is how it is named to people.
    """

    def __init__(
        self, server: str, send: Callable[[list[Any]], None], is_hopeless: Callable[[Exception], bool]
    ) -> None:
        self._server, self._send, self._is_hopeless = server, send, is_hopeless
        self._queue: deque[Any] = deque(maxlen=MOST)
        self._changed = threading.Condition()
        self._failures = 0  # since the server last answered
        self._lost = 0
        self._warned = False
        self._deadline: float | None = None
        # A daemon, since a request that hangs must not keep the process: `close` is what waits for it.
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
        self._thread.start()

    def put(self, entries: Iterable[Any]) -> None:
        """Has points sent, many at once if many wait, and calls (of nothing) made."""
        with self._changed:
            for entry in entries:
                self._lost += len(self._queue) == MOST
                self._queue.append(entry)
            self._changed.notify()

    def close(self, timeout_s: float) -> bool:
        """Whether all is told, for which it waits `timeout_s` at most; how much was not told by then is said."""
        with self._changed:
            self._deadline = time.monotonic() + timeout_s
            self._changed.notify()
        self._thread.join(timeout_s)
        with self._changed:
            lost = self._lost + len(self._queue)
        if lost or self._thread.is_alive():
            log.warning("%s did not take all it was told in time: %d points or files are lost", self._server, lost)
            return False
        return True

    def _work(self) -> None:
        while entries := self._take():
            try:
                entries[0]() if callable(entries[0]) else self._send(entries)
                self._failures = 0
            except Exception as error:  # whatever it is, it must not end the telling of the rest
                self._fail(entries, error)

    def _take(self) -> list[Any]:
        """Waits for the next points or the next call; nothing once all is told and no more will come, or time is up."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._deadline)
            if not self._queue or (self._deadline and time.monotonic() > self._deadline):
                return []
            entries = [self._queue.popleft()]
            while self._queue and len(entries) < BATCH and not (callable(entries[0]) or callable(self._queue[0])):
                entries.append(self._queue.popleft())
            return entries

    def _fail(self, entries: list[Any], error: Exception) -> None:
        if not self._warned:
            log.warning("%s fails, the job goes on without it: %s", self._server, (str(error).splitlines() or [""])[0])
        self._warned = True
        if self._is_hopeless(error):
            self._lost += len(entries)
            return
        self.put(entries)
        self._failures += 1
        with self._changed:
            if self._deadline:
                self._changed.wait(1.0)
            else:  # `close` ends the pause
                self._changed.wait_for(lambda: self._deadline, min(LONGEST_WAIT_S, 2.0 ** min(self._failures, 10) / 2))
