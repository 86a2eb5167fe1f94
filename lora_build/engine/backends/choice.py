"""Which backend makes what: told at plan time, before any of them is loaded. A further one is a file and an offer."""

import importlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol

from lora_build._native import levels, problem
from lora_build.dtypes import MERGEABLE
from lora_build.engine.blocks import Block, Cast, Data, Merger, Piece
from lora_build.methods.combine.interface import Combination, is_sum_of_products
from lora_build.planning.operations import Merge, Operation, Segment
from lora_build.planning.plan import MergePlan


class Backend(Protocol):
    """What makes blocks in one way, loaded."""

    def start(self, targets: Collection[str]) -> None:
        """Put the arithmetic of merges into these dtypes to the test.

        Raises:
            MergeError: this machine's fails it.
        """

    def on_one_core(self) -> AbstractContextManager[None]:
        """Keep to the calling thread meanwhile: others of ours merge beside it."""

    def merger(self, piece: Piece) -> Merger:
        """Return what merges the rows of a piece."""

    def converted(self, cast: Cast, data: Data, out: memoryview, first: int) -> Block:
        """Return elements in another dtype, in `out` or elsewhere; the first of them is element `first`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a backend can do, told without loading it.

    Attributes:
        module: its module in this folder, whose `BACKEND` makes one for a run.
        uses_torch: whether it needs torch.
        merges: whether it merges rows, with these updates and this combination.
        converts: whether it converts elements of one dtype to another.
        is_alone: whether it merges a whole tensor at a time, with as many threads as it likes, in the caller's.
    """

    module: str
    uses_torch: bool
    merges: Callable[[Combination, Merge, Segment], bool]
    converts: Callable[[str, str], bool]
    is_alone: bool = False

    def load(self) -> Backend:
        """Return the backend, for one run."""
        backend: Backend = importlib.import_module(f"{__package__}.{self.module}").BACKEND()
        return backend


def _sums(combination: Combination, op: Merge, segment: Segment) -> bool:
    """Whether the compiled pass merges a segment, if it is there."""
    return {op.dtype, op.source.dtype} <= MERGEABLE and is_sum_of_products(combination, segment.updates)


_COMPILED = Offer(
    module="compiled",
    uses_torch=False,
    merges=lambda *merge: bool(levels()) and _sums(*merge),
    converts=lambda _, target: bool(levels()) and target != "F64",
)
_TORCH = Offer(module="torch", uses_torch=True, merges=lambda *_: True, converts=lambda *_: True)
_PEFT = Offer(module="peft", uses_torch=True, merges=lambda *_: True, converts=lambda *_: True, is_alone=True)

EXACT = (_COMPILED, _TORCH)
"""The backends of exact-1, the fastest first: all of them give the same bits."""


def offers_for(plan: MergePlan) -> Sequence[Offer]:
    """Return the backends that a plan may use, the one to prefer first."""
    return (_PEFT,) if plan.repeats_peft else EXACT


class Backends:
    """The backends of one run, each loaded and put to the test when it is first needed."""

    def __init__(self, offers: Sequence[Offer], combination: Combination, on_one_core: ExitStack | None = None) -> None:
        """Take what may be used; `on_one_core` is given where each backend has to keep to the threads that call it."""
        self.combination = combination
        self._offers = offers
        self._on_one_core = on_one_core
        self._loaded: dict[str, Backend] = {}
        self._tested: dict[str, set[str]] = {}

    @property
    def is_alone(self) -> bool:
        """Whether nothing else is to be merged beside a tensor, which is merged whole."""
        return any(offer.is_alone for offer in self._offers)

    def pieces(self, op: Merge) -> Iterator[tuple[Offer, Segment]]:
        """Yield the rows of a tensor that are merged, in order, with the backend for each."""
        if alone := next((offer for offer in self._offers if offer.is_alone), None):
            num_rows = op.source.num_elements // op.columns
            yield alone, Segment(start=0, stop=num_rows, updates=op.updates)
            return
        for segment in op.segments:
            yield next(o for o in self._offers if o.merges(self.combination, op, segment)), segment

    def for_merge(self, offer: Offer, target: str) -> Backend:
        """Return a backend whose merges into a dtype have passed the test."""
        self.test(offer, (target,))
        return self._load(offer)

    def for_conversion(self, source: str, target: str) -> Backend:
        """Return the backend that converts elements of one dtype to another."""
        return self._load(self.conversion(source, target))

    def conversion(self, source: str, target: str) -> Offer:
        """Return what converts elements of one dtype to another."""
        return next(offer for offer in self._offers if offer.converts(source, target))

    def test(self, offer: Offer, targets: Collection[str]) -> None:
        """Put a backend to the test for dtypes that it has not been tested for."""
        tested = self._tested.setdefault(offer.module, set())
        if untested := set(targets) - tested:
            self._load(offer).start(untested)
            tested |= untested

    def test_for(self, operations: Iterable[Operation], *, with_torch: bool) -> None:
        """Put to the test what some operations need; only what is at hand at once, unless torch is to be loaded too."""
        wanted: dict[str, tuple[Offer, set[str]]] = {}
        for op in operations:
            for offer, _ in self.pieces(op) if isinstance(op, Merge) else ():
                if with_torch or not offer.uses_torch:
                    wanted.setdefault(offer.module, (offer, set()))[1].add(op.dtype)
        for offer, targets in wanted.values():
            self.test(offer, targets)

    def _load(self, offer: Offer) -> Backend:
        if offer.module not in self._loaded:
            backend = offer.load()
            if self._on_one_core is not None:
                self._on_one_core.enter_context(backend.on_one_core())
            self._loaded[offer.module] = backend
        return self._loaded[offer.module]


def uses_torch(plan: MergePlan, merges: Iterable[Merge]) -> bool:
    """Whether what a plan merges (of merges that are alike, one will do) or converts is computed with torch."""
    backends = Backends(offers_for(plan), plan.options.combination)
    conversions = {(op.source.dtype, op.dtype) for op in plan.operations if op.source.dtype != op.dtype}
    return any(offer.uses_torch for op in merges for offer, _ in backends.pieces(op)) or any(
        backends.conversion(*dtypes).uses_torch for dtypes in conversions
    )


def missing_loops(plan: MergePlan) -> str | None:
    """Return why there are no compiled loops, where a plan would merge with them."""
    if plan.repeats_peft:
        return None
    merges = (op for op in plan.operations if isinstance(op, Merge))
    return (
        problem()
        if any(_sums(plan.options.combination, op, segment) for op in merges for segment in op.segments)
        else None
    )
