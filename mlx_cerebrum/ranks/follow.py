"""A follower's side: it runs its part of each step that is announced, and decides nothing.

Every sequence has caches of its own here. Before a step they are brought to where the lead says
they are: entries of guesses that did not hold, or of a question that was edited, go then.
"""

import copy
import time
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_cerebrum.errors import ConfigError, MachineError
from mlx_cerebrum.model.cache import WindowedKVCache
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.together import Part, run_together
from mlx_cerebrum.ranks import announcement
from mlx_cerebrum.ranks.announcement import BEATS, HEAD, Announcement, Kind, Step, What
from mlx_cerebrum.ranks.links import Links, Numbers
from mlx_cerebrum.ranks.share import Share
from mlx_cerebrum.ranks.shares import Shares

_ASLEEP = 0.9  # of the time until the next beat; MLX's wait takes a whole core
_THERE = 0.002  # seconds; a word that is heard sooner had been there already, and more may be
_KV_BITS = {0: None, 4: 4, 8: 8}


class Follower:
    """`base` has this machine's blocks; hidden states are of `dtype`, `width` numbers a token."""

    def __init__(self, links: Links, shares: Shares, base: Model, dtype: mx.Dtype) -> None:
        self.links, self.shares, self.base = links, shares, base
        self.dtype, self.width = dtype, base.config.hidden_size
        self.views: dict[int, Share] = {}
        self.caches: dict[int, list[WindowedKVCache]] = {}  # of each sequence
        self._of: dict[int, int] = {}  # each sequence's view
        self._serial = 0

    @property
    def last(self) -> bool:
        return self.links.after == 0

    def run(self) -> None:
        """Follow until the lead ends. Raises MachineError where it is gone, or out of step."""
        while True:
            asked = time.monotonic()
            said, arrays = self._hear()
            behind = time.monotonic() - asked < _THERE
            if not self.last or said.kind == Kind.ROUND:  # at once: the next machine may sleep
                for array in arrays:
                    self.links.send(array, self.links.after)
            if said.kind == Kind.END:
                return
            if said.kind in BEATS:
                if not behind:
                    time.sleep(_ASLEEP * min(said.number, 1000) / 1000)
                continue
            with self.links.bound(self.shares.tensor):
                self._step(Step.of(said.body), said.number)

    def _hear(self) -> tuple[Announcement, list[mx.array]]:
        links = self.links
        head = links.receive((HEAD,), mx.int32, links.before)
        more = Announcement.more(_numbers(head))
        rest = [links.receive((more,), mx.int32, links.before)] if more else []
        said = Announcement.of(_numbers(head), _numbers(rest[0]) if rest else None, self._serial)
        self._serial += said.kind not in BEATS
        return said, [head, *rest]

    def _step(self, step: Step, tokens: int) -> None:
        links = self.links
        if step.tokens != tokens:
            raise MachineError(f"machine 0 sent a step of {step.tokens} tokens as one of {tokens}")
        if not tokens:  # only what changed
            self._parts(step, mx.array([]))
            mx.clear_cache()
            return
        hidden = links.receive((tokens, self.width), self.dtype, links.before)
        if self.shares.tensor and not self.last:
            links.send(hidden, links.after)
        own = self._parts(step, hidden)
        with links.in_step():
            found = run_together(own)
            mx.eval(found)  # in the same order on every machine
            mx.eval([cache.state[:2] for part in own for cache in part.caches])
        if self.shares.tensor:
            return
        kept = zip(found, step.parts, strict=True)
        back = [h.reshape(-1, self.width) for h, part in kept if part.wanted or not self.last]
        if back:
            out = mx.concatenate(back)
            mx.eval(out)
            links.send(out, links.after)
        if tokens > len(step.parts):
            mx.clear_cache()  # a prompt's chunk leaves large buffers

    def _parts(self, step: Step, hidden: mx.array) -> list[Part]:
        """Its own part of a step, and its caches as the lead has them."""
        try:
            return self._checked(step, hidden)
        except (KeyError, ValueError, IndexError, ConfigError) as error:
            raise MachineError(f"machine 0 asks for what is not here: {error}") from None

    def _checked(self, step: Step, hidden: mx.array) -> list[Part]:
        for view in step.views:
            self.views[view.number] = self.shares.part(self.base, view, self.links.rank)
        for what, sequence, first, second in step.changes:
            self._change(what, sequence, first, second)
        parts, start = [], 0
        for part in step.parts:
            share = self.views[self._of[part.sequence]]
            caches = self.caches[part.sequence]
            bring(caches, part)
            end = start + part.length
            parts.append(Part(share, hidden[None, start:end], caches))
            start = end
        return parts

    def _change(self, what: What, sequence: int, first: int, second: int) -> None:
        if what == What.BEGUN:
            share, bits = self.views[first], _KV_BITS[second]
            self.caches[sequence] = share.make_cache(bits)
            self._of[sequence] = first
        elif what == What.COPIED:
            self.caches[sequence] = copy.deepcopy(self.caches[first])
            self._of[sequence] = self._of[first]
        elif what == What.COMPACTED:
            for cache in self.caches[sequence]:
                cache.compact()
                mx.eval(cache.state[:2])
        else:
            del self.caches[sequence], self._of[sequence]


def bring(caches: Sequence[WindowedKVCache], part: announcement.Part) -> None:
    """Have caches where the lead says they are. Raises ValueError where they can't go."""
    for cache in caches:
        back = cache.offset - part.offset
        if back < 0:
            raise ValueError(f"{part.offset} tokens were seen, here {cache.offset}")
        if back > cache.rewindable():
            cache.rewind_to(part.offset)
        else:
            cache.trim(back)
        cache.keep_marks(part.marks)


def _numbers(array: mx.array) -> Numbers:
    return np.array(array)
