"""Functions that wait, each in a greenlet, for results that the server computes for many of them at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from greenlet import greenlet


class Waiting:
    """A function that runs in a greenlet until it calls `wait`, and continues with `resume`.

    Attributes:
        request: the argument of `wait`; None before the start and after the end.
        is_over: whether it has ended.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        """Take a function, which the first `resume` starts, possibly in another thread."""
        self.request: Any = None
        self.is_over = False
        self._function = function
        self._greenlet: greenlet | None = None
        self._result: Any = None

    def resume(self, result: Any = None) -> None:
        """Start the function, or return `result` from its `wait`, which raises it if it is an exception.

        An exception given before the start is raised here, and the function never runs.

        Raises:
            Exception: what the function raises.
        """
        if self._greenlet is None:
            if isinstance(result, Exception):
                self.is_over = True
                raise result
            self._greenlet = greenlet(self._function)  # it belongs to the thread that makes it
        self._result, self.request = result, None
        try:
            self._greenlet.switch()
        finally:
            self.is_over = self._greenlet.dead

    def wait(self, request: Any) -> Any:
        """Wait for the result of a request, and return it; called within the function.

        Raises:
            Exception: the result, if it is one.
        """
        self.request = request
        current = greenlet.getcurrent()
        if current.parent is None:
            raise RuntimeError("only the function of this object may wait")
        current.parent.switch()
        result, self._result = self._result, None
        if isinstance(result, Exception):
            raise result
        return result
