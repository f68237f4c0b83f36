"""The jobs that wait to be started: each model's in the order they came, places counted."""

import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator

from mlx_cerebrum.server.jobs import BusyError
from mlx_cerebrum.server.task import Task


class Waiting:
    """Shared between threads: whoever calls holds `changed`, or is told that it is held here.

    max_batch: places of one model. max_queue: jobs that may wait besides.
    """

    def __init__(self, changed: threading.Condition, max_batch: int, max_queue: int) -> None:
        self.never_started = 0  # cancelled while they waited
        self._changed, self._max_batch, self._max_queue = changed, max_batch, max_queue
        self._queues: dict[str, deque[Task]] = {}
        self._arrived: dict[Task, int] = {}  # all of them, each with its number
        self._number = 0
        self._places_taken: dict[str, int] = {}  # by sequences that wait or run

    def __len__(self) -> int:
        return len(self._arrived)

    def add_model(self, name: str) -> None:
        """Take jobs for it. Holds `changed`."""
        with self._changed:
            self._queues[name], self._places_taken[name] = deque(), 0

    def add(self, task: Task, follows: bool) -> None:
        """Raises BusyError where too many wait, and the job `follows` none of its request."""
        job = task.job
        task.overflows = self._places_taken[job.model] + job.n > self._max_batch
        waiting = sum(queued.overflows for queued in self._arrived)
        if task.overflows and waiting >= self._max_queue and not follows:
            raise BusyError(f"{waiting} requests are waiting already; try again later")
        self._places_taken[job.model] += job.n
        self._queues[job.model].append(task)
        self._arrived[task] = self._number
        self._number += 1

    def forget(self, task: Task) -> None:
        """It was cancelled: if it still waits, it leaves at once. Holds `changed`."""
        with self._changed:
            if self.take(task):
                self.free(task)
                self.never_started += 1

    def take(self, task: Task) -> bool:
        """Let it leave, to be started; its places stay taken. Whether it was still there."""
        if task not in self._arrived:
            return False
        self._queues[task.job.model].remove(task)
        del self._arrived[task]
        return True

    def free(self, task: Task) -> None:
        """It is over; its places are free."""
        self._places_taken[task.job.model] -= task.job.n

    def give_up(self, tasks: Iterable[Task]) -> list[Task]:
        """Let these leave for good; those that were still there. Holds `changed`."""
        with self._changed:
            left = [task for task in tasks if self.take(task)]
            for task in left:
                self.free(task)
        return left

    def of(self, models: Collection[str] | None = None) -> list[Task]:
        """Those for these models, or all, the oldest first. Holds `changed`."""
        with self._changed:
            tasks = sorted(self._arrived, key=self._arrived.__getitem__)
        return [task for task in tasks if models is None or task.job.model in models]

    def oldest_first(self) -> Iterator[Task]:
        """The oldest first. After one that was not started, none of its model's. Holds `changed`
        now and then."""
        passed: set[str] = set()
        while True:
            with self._changed:
                heads = [
                    queue[0] for name, queue in self._queues.items() if queue and name not in passed
                ]
                if not heads:
                    return
                task = min(heads, key=self._arrived.__getitem__)
            yield task
            with self._changed:
                if task in self._arrived:
                    passed.add(task.job.model)
