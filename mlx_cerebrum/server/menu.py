"""The models on the shelf: which of them are answered with, and having one more.

A client names a model as the shelf lists it, never a path.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import mlx.core as mx
from pydantic import Field

from mlx_cerebrum.errors import CerebrumError, PlanError
from mlx_cerebrum.machine import facts as machine
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.memory import human
from mlx_cerebrum.plan.layer_plan import LayerPlan, named_plans
from mlx_cerebrum.server.answers import LoadProgress, Memory, ShelfList, ShelfModel
from mlx_cerebrum.server.bodies import Open
from mlx_cerebrum.server.engine import BatchEngine
from mlx_cerebrum.server.faults import ApiError
from mlx_cerebrum.server.holding import Holding, Laid, Source, pathless
from mlx_cerebrum.server.jobs import ClosedError
from mlx_cerebrum.server.loader import Coming
from mlx_cerebrum.server.refusals import too_little
from mlx_cerebrum.shelf.entries import Entry, entries
from mlx_cerebrum.weights.opening import ModelSpec, open_model

REMEMBERED = 30.0  # seconds for which the shelf says that a model could not be loaded
_Signature = tuple[tuple[str, int, int, int], ...]  # of a folder's files


@dataclass(frozen=True)
class _Known:
    """What the headers of a model say; `fault`: that they say nothing that can be run."""

    source: Source | None = None
    plan: str | None = None  # the order of its blocks
    fault: str | None = None


class LoadRequest(Open):
    """The body of /shelf/load."""

    id: str = Field(description="A model's id, as /shelf lists it")


class Menu:
    """What `/shelf` answers. Its methods read files: not for the event loop.

    spec: how a model is to be held. served: called on the engine's thread with a model's name,
    once it is there.
    """

    def __init__(
        self,
        engine: BatchEngine,
        spec: Callable[[Entry], ModelSpec],
        served: Callable[[str, Laid], None],
    ) -> None:
        self._engine, self._spec, self._served = engine, spec, served
        self._lock = threading.Lock()  # of all that follows
        self._known: dict[str, tuple[_Signature, _Known]] = {}  # by the shelf's name
        self._coming: dict[str, Coming] = {}  # what was asked for
        self._failed: dict[str, tuple[str, float]] = {}  # why one could not be loaded, and when

    def list(self) -> ShelfList:
        """The shelf, the last used first."""
        with self._lock:
            return self._list()

    def load(self, name: str) -> ShelfModel:
        """Begin to load a model, unless it is there or on its way; its row.

        Raises ApiError for one that is not on the shelf, or that can't be loaded now.
        """
        with self._lock:
            here = entries()
            entry = next((entry for entry in here if entry.called == name), None)
            if entry is None:
                names = ", ".join(entry.called for entry in here[:20]) or "nothing"
                message = f"{name[:200]!r} is not on the shelf, where there is {names}"
                raise ApiError(404, message, code="model_not_found", param="id")
            row = self._row(entry)
            if row.state != "on the shelf":
                return row
            self._failed.pop(name, None)
            known = self._look(entry)
            problem = self._why_not(entry, known)
            if problem is not None and (known.source is None or name in self._engine.laid):
                raise ApiError(409, problem, code="cannot_load", param="id")
            if problem is not None:
                rows = (self._row(each) for each in here)
                could = (row for row in rows if row.state == "on the shelf" and not row.why_not)
                fits = [row.id for row in islice(could, 3)]
                hint = f"{' or '.join(fits)} would fit" if fits else "no other would fit"
                if not self._engine.rests:
                    hint += "; with --unload-after 15m idle models make room"
                raise ApiError(409, f"{problem}; {hint}", code="does_not_fit", param="id")
            try:
                opened = open_model(self._spec(entry))
                self._coming[name] = self._engine.load(
                    name, opened, lambda problem: self._over(name, problem)
                )
            except ClosedError:
                raise
            except CerebrumError as error:
                message = pathless(error, entry.path, name)
                raise ApiError(409, message, code="cannot_load", param="id") from None
            entry.mark_used()
            return self._row(entry)

    def meant(self, name: str) -> str | None:
        """The name in /v1/models of a model that the shelf calls so; None where there is none.

        Raises ApiError for one that is not answered with yet.
        """
        with self._lock:
            entry = next((entry for entry in entries() if entry.called == name), None)
            if entry is None:
                return None
            state, model = self._state(entry, self._look(entry))
        if model is None:
            message = f"{name} is on the shelf, and not answered with yet: POST /shelf/load"
            if state == "loading":
                message = f"{name} is being loaded; /shelf says how far it is"
            raise ApiError(404, message, code="model_not_found", param="model")
        return model

    def _over(self, name: str, problem: str | None) -> None:
        """On the engine's thread. It must not wait for the lock: files may be read under it."""
        if problem is None:
            self._served(name, self._engine.laid[name])
        else:
            self._failed[name] = problem, time.monotonic()

    def _list(self) -> ShelfList:
        rows = [self._row(entry) for entry in entries()]
        memory = Memory(
            held=mx.get_active_memory(),
            free=max(0, self._engine.room),
            total=machine.memory_bytes(),
        )
        words = f"{machine.summary()}; {human(memory.held)} held, {human(memory.free)} free"
        return ShelfList(models=rows, machine=words, memory=memory)

    def _row(self, entry: Entry) -> ShelfModel:
        known = self._look(entry)
        config = None if known.source is None else known.source.config
        state, model = self._state(entry, known)
        loading = None
        if state == "loading":
            loading = self._progress(entry, known)
        idle = state == "on the shelf"
        return ShelfModel(
            id=entry.called,
            bytes=_nbytes(entry),
            bits=entry.bits or None,
            blocks=None if config is None else config.num_hidden_layers,
            positions=None if config is None else config.num_positions,
            plan=known.plan,
            window=None if config is None else config.sliding_window,
            state=state,
            model=model,
            why_not=self._why_not(entry, known) or self._fault(entry.called) if idle else None,
            loading=loading,
        )

    def _state(
        self, entry: Entry, known: _Known
    ) -> tuple[Literal["loaded", "at rest", "loading", "on the shelf"], str | None]:
        """Also what it is called in /v1/models, where it can be asked."""
        coming = self._coming.get(entry.called)
        if coming is not None and not coming.ended:
            return "loading", None
        for holding in self._engine.holdings:
            if (model := _answers_as(holding, entry, known)) is not None:
                if holding.models is not None:
                    return "loaded", model
                return ("at rest" if holding.loading is None else "loading"), model
        return "on the shelf", None

    def _progress(self, entry: Entry, known: _Known) -> LoadProgress:
        coming = self._coming.get(entry.called)
        found = None if coming is None or coming.ended else coming.holding
        for holding in self._engine.holdings if coming is None or coming.ended else ():
            if _answers_as(holding, entry, known) is not None:
                found = holding
        done, total = (None if found is None else found.loading) or (0, 0)
        if not total and known.source is not None:
            total = known.source.storage.nbytes
        return LoadProgress(done=done, total=total)

    def _why_not(self, entry: Entry, known: _Known) -> str | None:
        """Why it can't be loaded now, in one line."""
        if known.source is None:
            return known.fault
        if any(
            h.source is not None and h.source.shares(known.source) for h in self._engine.holdings
        ):
            return None  # a view takes no memory
        if entry.called in self._engine.laid:
            return f"{entry.called} is answered with from other files; start the server anew"
        needed, room = known.source.needed, self._engine.room
        return None if needed <= room else too_little(entry.called, needed, room)

    def _fault(self, name: str) -> str | None:
        """Why it could not be loaded a moment ago; later it may be tried again."""
        problem, when = self._failed.get(name, ("", 0.0))
        return problem if problem and time.monotonic() - when < REMEMBERED else None

    def _look(self, entry: Entry) -> _Known:
        """What its headers say, read anew where its files have changed."""
        signature = _signature(entry)
        before = self._known.get(entry.called)
        if before is not None and before[0] == signature:
            return before[1]
        try:
            opened = open_model(self._spec(entry))
            known = _Known(Source.of(opened), _plan(opened.config))
        except CerebrumError as error:
            known = _Known(fault=pathless(error, entry.path, entry.called))
        except OSError as error:
            known = _Known(fault=f"{entry.called} can't be read: {error.strerror}")
        self._known[entry.called] = signature, known
        return known


def _answers_as(holding: Holding, entry: Entry, known: _Known) -> str | None:
    """The name under which a checkpoint answers as this model does, if it does."""
    if holding.source is None or known.source is None or not holding.source.shares(known.source):
        return None
    own = known.source.config
    order = own.layer_map, own.residual_scales
    laid = {
        name: (of.config.layer_map, of.config.residual_scales) for name, of in holding.laid.items()
    }
    if laid.get(entry.called) == order:
        return entry.called
    return next((name for name, of in laid.items() if of == order), None)


def _plan(config: ModelConfig) -> str | None:
    """The named plan whose order this is; None: the blocks as they are stored."""
    blocks, scales = config.num_hidden_layers, config.residual_scales
    for name in named_plans():
        try:
            plan = LayerPlan.named(name)
            if (plan.layer_map(blocks), plan.residual_scales(blocks)) == (config.layer_map, scales):
                return name
        except PlanError:  # of other blocks
            continue
    stored = config.layer_map == tuple(range(blocks)) and scales is None
    return None if stored else "custom"


def _signature(entry: Entry) -> _Signature:
    try:
        stats = [(file.name, file.stat()) for file in sorted(entry.path.iterdir())]
    except OSError:  # removed meanwhile
        return ()
    own = [(name, stat) for name, stat in stats if name[0] != "."]
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in own)


def _nbytes(entry: Entry) -> int:
    try:
        return entry.nbytes
    except OSError:
        return 0
