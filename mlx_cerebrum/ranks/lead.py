"""The lead's side: a model like any other, of which other machines run a part.

Decoding asks it for steps as it asks any model. Each is announced to the others, and run by all.
"""

import atexit
from collections.abc import Sequence
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
        self._answered = True  # no machine has a step to run
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

    def run(self, parts: Sequence[Part]) -> list[mx.array]:
        """See `run_together`. Of parts that are not wanted nothing is given back."""
        # What Ctrl-C left half done here, the others would not know of.
        with uninterrupted(), self._heart.step():
            return self._run(parts)

    def _run(self, parts: Sequence[Part]) -> list[mx.array]:
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
        if self.shares.tensor:
            found = self._all_at_once(hidden, own, told)
        else:
            found = self._in_turn(own, told)
        for part in parts:
            first = part.caches[0]
            assert isinstance(first, LeadCache)
            first.told = first.offset
        return found

    def _in_turn(self, own: Sequence[Part], told: list[announcement.Part]) -> list[mx.array]:
        """What is wanted, and behind it as a step of its own what is not, a chunk of a prompt: it
        is computed here while the others run the first, and there during the next step."""
        wanted = [i for i, part in enumerate(told) if part.wanted]
        behind = [i for i, part in enumerate(told) if not part.wanted]
        if not wanted:  # the others go on alone, and this one with the next chunk
            wanted, behind = behind, wanted
        found = self._computed(own, wanted)
        with self.links.held():
            self._hand_on(told, found, wanted)
            if told[wanted[0]].wanted:
                try:
                    found |= self._computed(own, behind)
                finally:  # whatever happened here, it comes
                    found |= self._received(told, found, wanted)
                if behind:
                    self._hand_on(told, found, behind)
        return [found[i] for i in range(len(own))]

    def _computed(self, own: Sequence[Part], which: Sequence[int]) -> dict[int, mx.array]:
        """What the lead's positions give for some of the parts, by number."""
        if not which:
            return {}
        parts = [own[i] for i in which]
        found = run_together(parts)
        mx.eval(found, _states(parts))
        return dict(zip(which, found, strict=True))

    def _hand_on(
        self, told: Sequence[announcement.Part], found: dict[int, mx.array], which: Sequence[int]
    ) -> None:
        step = self._step([told[i] for i in which])
        flat = mx.concatenate([found[i].reshape(-1, found[i].shape[-1]) for i in which])
        mx.eval(flat)
        self._announce(Kind.STEP, step.tokens, step.body())
        self.links.send(flat, self.links.after)
        self._answered = False

    def _received(
        self, told: Sequence[announcement.Part], found: dict[int, mx.array], which: Sequence[int]
    ) -> dict[int, mx.array]:
        like, ends = found[which[0]], [*accumulate(told[i].length for i in which)]
        back = self.links.receive((ends[-1], like.shape[-1]), like.dtype, self.links.before)
        self._answered = True
        return dict(zip(which, mx.split(back[None], ends[:-1], axis=1), strict=True))

    def _all_at_once(
        self, hidden: Sequence[mx.array], own: Sequence[Part], told: list[announcement.Part]
    ) -> list[mx.array]:
        flat, links = mx.concatenate([h.reshape(-1, h.shape[-1]) for h in hidden]), self.links
        mx.eval(flat)
        with links.held():
            step = self._step(told)
            self._announce(Kind.STEP, step.tokens, step.body())
            links.send(flat, links.after)
            with links.in_step():
                found = run_together(own)
                mx.eval(found)  # in the same order on every machine
                mx.eval(_states(own))
        return found

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
        if not self._answered:  # it would wait behind what the others still compute
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
        return self.lead.run

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
        return self.lead.run([Part(self, h, cache)])[0]

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
