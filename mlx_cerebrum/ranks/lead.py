"""The lead's side: a model like any other, of which other machines run a part.

Decoding asks it for steps as it asks any model. Each is announced to the others, and run by all.
"""

import atexit
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_cerebrum.errors import MachineError, RequestError
from mlx_cerebrum.model.cache import Cache, WindowedKVCache
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.entries import check_kv_bits
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.together import Part, run_together
from mlx_cerebrum.ranks import announcement
from mlx_cerebrum.ranks.announcement import BEATS, HEAD, Announcement, Kind, Step, View
from mlx_cerebrum.ranks.lead_cache import Journal, LeadCache
from mlx_cerebrum.ranks.links import Heart, Links, uninterrupted
from mlx_cerebrum.ranks.share import Share
from mlx_cerebrum.ranks.shares import Shares


class Lead:
    """Runs steps on all machines. `base` has the lead's own blocks, with embedding and head."""

    def __init__(self, links: Links, shares: Shares, base: Model) -> None:
        self.links, self.shares, self.base = links, shares, base
        self.journal = Journal()
        self._views: dict[tuple[Any, Any], tuple[View, Share]] = {}
        self._untold: list[View] = []
        self._serial = 0
        self._steps = 0  # that were begun in turn
        self._due: deque[_Due] = deque()  # of those, what has yet to come back
        self._heard = -1  # the last that all machines have run, as far as is known
        atexit.unregister(links.over)
        self._heart = Heart(links, self._beat)
        atexit.register(self.close)

    def view(self, config: ModelConfig) -> tuple[int, Share]:
        """The number of an order of the blocks, and the lead's own part of it.

        Raises RequestError for one that the machines can't run in turn.
        """
        key = config.layer_map, config.residual_scales
        if key not in self._views:
            cuts = self.shares.cut(config.layer_map)
            view = View(len(self._views), config.layer_map, cuts, config.residual_scales)
            self._views[key] = view, self.shares.part(self.base, view, 0)
            self._untold.append(view)
        view, share = self._views[key]
        return view.number, share

    @property
    def lanes(self) -> int:
        """How many steps may be under way: one on each machine of a pipeline."""
        return 1 if self.shares.tensor else self.links.size

    def begin(self, parts: Sequence[Part]) -> Callable[[], list[mx.array]]:
        """Start a step, which is to be waited for by calling what comes back. That gives what
        `run_together` does; of parts that are not wanted nothing that could be used."""
        # What Ctrl-C left half done here, the others would not know of.
        with uninterrupted(), self._heart.step():
            hidden, own, told = [], [], []
            for model, tokens, caches, wanted in parts:
                assert isinstance(model, LeadModel)
                first = caches[0]
                assert isinstance(first, LeadCache)
                # `embed` may have been asked for already.
                h = tokens if tokens.ndim == 3 else model.embed(tokens)
                hidden.append(h)
                own.append(Part(model.share, h, caches))
                number, length = first.sequence, h.shape[1]
                told.append(
                    announcement.Part(number, first.view, length, first.offset, first.marks, wanted)
                )
            begun = self._all_at_once if self.shares.tensor else self._in_turn
            come = begun(hidden, own, told)
            for part in parts:
                first = part.caches[0]
                assert isinstance(first, LeadCache)
                first.told = first.offset
        return come

    def _in_turn(
        self, hidden: Sequence[mx.array], own: Sequence[Part], told: list[announcement.Part]
    ) -> Callable[[], list[mx.array]]:
        found = run_together(own)
        flat = mx.concatenate([h.reshape(-1, h.shape[-1]) for h in found])
        mx.eval(flat, _states(own))
        lengths = [part.length for part in told if part.wanted]
        due = _Due(self._steps, (sum(lengths), flat.shape[-1]), flat.dtype)
        with self.links.held():
            # A machine that sends a step's hidden states takes no other step before they are
            # taken: so many steps are under way as others can take, and none waits for itself.
            while self._due and self._steps - self._due[0].number > self.links.size - 2:
                self._receive()
            step = self._step(told)
            self._announce(Kind.STEP, step.tokens, step.body())
            self.links.send(flat, self.links.after)
            self._steps += 1
            if lengths:
                self._due.append(due)

        def come() -> list[mx.array]:
            if not lengths:
                return found
            back = iter(mx.split(self._received(due)[None], [*accumulate(lengths)][:-1], axis=1))
            return [next(back) if part.wanted else h for h, part in zip(found, told, strict=True)]

        return come

    def _received(self, due: "_Due") -> mx.array:
        with uninterrupted(), self._heart.step(), self.links.held():
            while due.come is None:
                self._receive()
        return due.come

    def _receive(self) -> None:
        """What comes next, of the oldest step under way."""
        due = self._due[0]
        due.come = self.links.receive(due.shape, due.dtype, self.links.before)
        self._due.popleft()
        self._heard = due.number

    def _all_at_once(
        self, hidden: Sequence[mx.array], own: Sequence[Part], told: list[announcement.Part]
    ) -> Callable[[], list[mx.array]]:
        flat, links = mx.concatenate([h.reshape(-1, h.shape[-1]) for h in hidden]), self.links
        mx.eval(flat)
        with links.held():
            step = self._step(told)
            self._announce(Kind.STEP, step.tokens, step.body())
            links.send(flat, links.after)
            with links.bound(summing=True), links.in_step():
                found = run_together(own)
                mx.eval(found)  # in the same order on every machine
                mx.eval(_states(own))
        return lambda: found

    def _step(self, told: list[announcement.Part]) -> Step:
        """With all that changed until now; so to be told before anything else is."""
        views, self._untold = self._untold, []
        return Step(told, self.journal.take(), views)

    def _announce(self, kind: Kind, number: int, body: list[int]) -> None:
        said = Announcement(kind, self._serial, number, body)
        self._serial += kind not in BEATS
        for array in said.packed():
            self.links.send(mx.array(array), self.links.after)

    def _beat(self, milliseconds: int) -> None:
        if self.journal:  # caches that nobody needs any more should not wait for the next step
            self._announce(Kind.STEP, 0, self._step([]).body())
        while milliseconds and self._due:  # nobody waits for it any more
            self._receive()
        if self._heard < self._steps - 1:  # it would wait behind what the others still compute
            self._announce(Kind.BEAT, milliseconds, [])
            return
        self._announce(Kind.ROUND, milliseconds, [])
        back = np.array(self.links.receive((HEAD,), mx.int32, self.links.before))
        if Announcement.more(back) or Announcement.of(back, None, 0).kind != Kind.ROUND:
            raise MachineError(f"{self.links.name(self.links.before)} answers what was not asked")

    def close(self) -> None:
        """The program is over: the others end too."""
        atexit.unregister(self.close)
        self._heart.stop()
        self.links.close(lambda: self._announce(Kind.END, 0, []))


@dataclass(eq=False)
class _Due:
    """Hidden states that come back at the end of a step."""

    number: int  # of the step
    shape: tuple[int, int]
    dtype: mx.Dtype
    come: mx.array | None = None


class LeadModel(Model):
    """A whole model to everyone who decodes. It holds the lead's blocks."""

    share: Share  # the lead's part of it

    def __init__(self, lead: Lead, config: ModelConfig) -> None:
        super().__init__(config, lead.base.model)
        self.number, share = lead.view(config)
        object.__setattr__(self, "share", share)  # as a module its weights would count twice
        if not config.tie_word_embeddings:
            self.lm_head = lead.base.lm_head
        self.lead = lead

    @property
    def elsewhere(self) -> Any:
        return self.lead

    def run(
        self,
        h: mx.array,
        cache: Sequence[Cache] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> mx.array:
        if start or stop is not None:
            raise RequestError("on several machines a step runs through all positions")
        cache = self.make_cache() if cache is None else cache
        return self.lead.begin([Part(self, h, cache)])()[0]

    def make_cache(self, kv_bits: int | None = None) -> list[WindowedKVCache]:
        """One for each position of the lead's; the first stands for all machines'."""
        check_kv_bits(self.config, kv_bits)
        window, count = self.config.sliding_window, self.share.config.num_positions
        elsewhere = self.config.num_positions - count
        if self.lead.shares.tensor:  # the others have as many, of their own heads
            elsewhere = 0
        first = LeadCache(self.lead.journal, self.number, window, kv_bits, 1 + elsewhere)
        return [first, *(WindowedKVCache(window, kv_bits=kv_bits) for _ in range(count - 1))]

    def view(
        self,
        layer_map: tuple[int, ...],
        residual_scales: tuple[tuple[float, float], ...] | None = None,
    ) -> "LeadModel":
        """As before; also raises RequestError for an order that the machines can't run in turn."""
        return LeadModel(self.lead, self.config.with_map(layer_map, residual_scales))


def _states(parts: Sequence[Part]) -> list[Any]:
    return [cache.state[:2] for part in parts for cache in part.caches]
