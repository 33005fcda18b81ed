"""PyTorch's CUDA caching allocator as rules over integers: what it holds, and where memory ends.

The rules are those of ``c10/cuda/CUDACachingAllocator.cpp`` for one device and one stream, with
every option at its default but ``expandable_segments``. They were read at commits eb42ad6
and 001074d of pytorch/pytorch and in a later version, which agree; the constants and the
defaults are those of ``c10/core/AllocatorConfig.h`` in torch 2.13.0. Each rule names the function
that it follows.

Assumed, and not modelled: no ``max_split_size_mb``, ``roundup_power2_divisions``,
``garbage_collection_threshold`` or ``large_segment_size_mb``; no CUDA graphs or memory pools; no
``record_stream``. The driver is taken to hand out rising addresses, which decide only between
free blocks of equal size, and to fail exactly when its bytes are gone. An expandable segment has
endless addresses here, and 9/8 of the GPU's memory in torch.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

Event = tuple[int, int]
"""``(name, bytes)``: above zero bytes are allocated under the name, zero bytes free it."""

_MIB: Final = 2**20
_UNIT: Final = 512  # kMinBlockSize: what every block is a multiple of.
_SMALL: Final = _MIB  # kSmallSize: the largest block of the small pool.
_SMALL_SEGMENT: Final = 2 * _MIB  # kSmallBuffer: a segment, or a page, of the small pool.
_LARGE_SEGMENT: Final = 20 * _MIB  # kLargeBuffer, large_segment_size(): the same of the large.
_OWN_SEGMENT: Final = 10 * _MIB  # kMinLargeAlloc: from here a request has a segment of its own.
_STEP: Final = 2 * _MIB  # kRoundLarge: what such a segment is a multiple of.
_ENDLESS: Final = 2**40  # Pages of addresses in an expandable segment.


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def block_bytes(requested: int) -> int:
    """Return the bytes of a block for ``requested`` bytes (``round_size``): a multiple of 512."""
    return _rounded(requested, _UNIT)


def segment_bytes(block: int) -> int:
    """Return the bytes asked of the driver for a block (``get_allocation_size``)."""
    if block <= _SMALL:
        return _SMALL_SEGMENT
    if block < _OWN_SEGMENT:
        return _LARGE_SEGMENT
    return _rounded(block, _STEP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a stream of events came to. All sizes are bytes.

    Attributes:
        peak_allocated: The most in blocks in use at once, as ``torch.cuda.max_memory_allocated``.
        peak_reserved: The most held from the driver, as ``torch.cuda.max_memory_reserved``. It is
            not what the events need: under a limit the cache is given back before they fail.
        failed_at: The event that ran out of memory and ended the replay, or None.
        peak_at: The event that first reached ``peak_allocated``; None where nothing was allocated.
    """

    peak_allocated: int
    peak_reserved: int
    failed_at: int | None
    peak_at: int | None

    @property
    def fits(self) -> bool:
        """Whether every event went through."""
        return self.failed_at is None


def replay(
    events: Iterable[Event], *, limit_bytes: int | None = None, expandable: bool = False
) -> Replay:
    """Return what the allocator makes of ``events``, up to the first that runs out of memory.

    Args:
        events: In order. Tensors of no bytes take no block and have no events.
        limit_bytes: What the driver can give this process in all, without what the context and
            libraries hold beside the allocator; None for no end. More is not always better: a
            stream that fits can, under a slightly larger limit, be one that fragments and fails.
        expandable: Replay with ``expandable_segments:True``.

    Raises:
        ValueError: If an event allocates a name in use, frees one that is not, or counts below
            zero.
    """
    allocator = CachingAllocator(limit_bytes, expandable=expandable)
    peak, peak_at, failed_at = 0, None, None
    for index, (name, size) in enumerate(events):
        if size == 0:
            allocator.free(name)
        elif not allocator.allocate(name, size):
            failed_at = index
            break
        elif allocator.allocated_bytes > peak:
            peak, peak_at = allocator.allocated_bytes, index
    return Replay(
        peak_allocated=peak,
        peak_reserved=allocator.peak_reserved_bytes,
        failed_at=failed_at,
        peak_at=peak_at,
    )


class CachingAllocator:
    """The state of one GPU's allocator, event by event.

    Args:
        limit_bytes: What the driver gives in all; None for no end. With plain segments
            ``torch.cuda.set_per_process_memory_fraction`` is the same limit. With expandable ones
            it is not quite: before torch maps the pages that are missing it holds a whole new
            segment against the fraction, so it refuses up to a request earlier than the driver,
            or maps up to a page more than the fraction.
        expandable: Whether segments grow.
    """

    def __init__(self, limit_bytes: int | None = None, *, expandable: bool = False) -> None:
        self.allocated_bytes = 0
        self._driver = _Driver(limit_bytes)
        pool = _ExpandablePool if expandable else _Pool
        self._small = pool(self._driver, small=True)
        self._large = pool(self._driver, small=False)
        self._live: dict[int, _Block] = {}

    @property
    def reserved_bytes(self) -> int:
        """Bytes held from the driver now."""
        return self._driver.reserved_bytes

    @property
    def peak_reserved_bytes(self) -> int:
        """The most bytes held from the driver so far."""
        return self._driver.peak_bytes

    def allocate(self, name: int, requested: int) -> bool:
        """Give ``name`` a block, and return whether there was memory for it (``malloc``).

        The cache comes first, then the driver. If that fails, whatever of the cache is wholly
        free goes back to the driver, and the driver is asked once more.
        """
        if requested < 1 or name in self._live:
            raise ValueError(f"cannot allocate {requested} bytes as {name}: below 1, or in use")
        size = -(-requested // _UNIT) * _UNIT  # block_bytes, written out: this line runs hot.
        pool = self._small if size <= _SMALL else self._large
        block = pool.best_fit(size) or pool.grow(size)
        if block is None:
            self.release_cached()
            block = pool.grow(size)
            if block is None:
                return False
        pool.trim(block, size)
        self._live[name] = block
        self.allocated_bytes += block.size
        return True

    def free(self, name: int) -> None:
        """Put the block of ``name`` back into the cache (``free_block``)."""
        block = self._live.pop(name, None)
        if block is None:
            raise ValueError(f"cannot free {name}: it is not allocated")
        self.allocated_bytes -= block.size
        (self._small if block.size <= _SMALL else self._large).put_back(block)

    def release_cached(self) -> None:
        """Give whatever is wholly free back to the driver (``release_cached_blocks``)."""
        self._large.release()
        self._small.release()

    def segments(self) -> list[list[tuple[int, bool]]]:
        """Return each segment's blocks by address, as ``(bytes, in use)``; small segments first.

        An expandable segment counts once for each run of pages that are mapped, as in
        ``torch.cuda.memory_snapshot``.
        """
        return [*self._small.segments(), *self._large.segments()]


class _Driver:
    """The memory of the GPU: so many bytes, in any pieces."""

    def __init__(self, limit_bytes: int | None) -> None:
        self.reserved_bytes = self.peak_bytes = 0
        self._limit_bytes = limit_bytes

    def take(self, size: int) -> bool:
        reserved = self.reserved_bytes + size
        if self._limit_bytes is not None and reserved > self._limit_bytes:
            return False
        self.reserved_bytes = reserved
        self.peak_bytes = max(self.peak_bytes, reserved)
        return True

    def give_back(self, size: int) -> None:
        self.reserved_bytes -= size


@dataclass(slots=True, eq=False)
class _Block:
    """A stretch of a segment between two others. Only free ones can be unmapped."""

    address: int
    size: int
    before: "_Block | None" = None
    after: "_Block | None" = None
    free: bool = True
    mapped: bool = True

    def cut(self, size: int) -> "_Block":
        """Keep the first ``size`` bytes, and return the rest."""
        rest = _Block(self.address + size, self.size - size, self, self.after)
        if self.after is not None:
            self.after.before = rest
        self.after = rest
        self.size = size
        return rest

    def absorb(self, after: "_Block") -> None:
        """Take the bytes of the block after this one, which is no more."""
        self.size += after.size
        self.after = after.after
        if after.after is not None:
            after.after.before = self


class _Pool:
    """One pool with plain segments: each is what one ``cudaMalloc`` gave, and never grows."""

    def __init__(self, driver: _Driver, *, small: bool) -> None:
        self._driver = driver
        # should_split: the least that is worth cutting off.
        self._least_rest = _UNIT if small else _SMALL + 1
        self._cached: list[tuple[int, int, _Block]] = []  # By size, then address.
        self._heads: dict[int, _Block] = {}  # The first block of each segment, by address.
        self._next_address = 0

    def best_fit(self, size: int) -> _Block | None:
        """Take the smallest cached block that holds ``size`` bytes (``get_free_block``)."""
        cached = self._cached
        position = bisect_left(cached, (size,))
        return cached.pop(position)[2] if position < len(cached) else None

    def grow(self, size: int) -> _Block | None:
        """Return a new segment, or None if the driver has no room (``alloc_block``)."""
        total = segment_bytes(size)
        if not self._driver.take(total):
            return None
        block = self._heads[self._next_address] = _Block(self._next_address, total)
        self._next_address += total
        return block

    def trim(self, block: _Block, size: int) -> None:
        """Mark the block as in use, and cache what is worth cutting off (``should_split``)."""
        block.free = False
        if block.size - size >= self._least_rest:
            self._cache(block.cut(size))

    def put_back(self, block: _Block) -> None:
        """Cache a block, as one with its free neighbours (``free_block``)."""
        block.free = True
        self._cache(self._merged(block))

    def release(self) -> None:
        """Give each segment back that is free from end to end (``release_blocks``)."""
        for _, address, block in tuple(self._cached):
            if block.before is None and block.after is None:
                self._forget(block)
                del self._heads[address]
                self._driver.give_back(block.size)

    def segments(self) -> list[list[tuple[int, bool]]]:
        """Each run of mapped blocks, by address."""
        runs: list[list[tuple[int, bool]]] = []
        for head in self._heads.values():
            runs.append([])
            block: _Block | None = head
            while block is not None:
                if block.mapped:
                    runs[-1].append((block.size, not block.free))
                elif runs[-1]:
                    runs.append([])
                block = block.after
        return [run for run in runs if run]

    def _merged(self, block: _Block) -> _Block:
        """Join a block that is in no list with its like neighbours (``try_merge_blocks``)."""
        after, before = block.after, block.before
        if after is not None and after.free and after.mapped == block.mapped:
            self._forget(after)
            block.absorb(after)
        if before is not None and before.free and before.mapped == block.mapped:
            self._forget(before)
            before.absorb(block)
            return before
        return block

    def _cache(self, block: _Block) -> None:
        insort(self._cached, (block.size, block.address, block))

    def _forget(self, block: _Block) -> None:
        del self._cached[bisect_left(self._cached, (block.size, block.address))]


class _ExpandablePool(_Pool):
    """One pool with ``expandable_segments:True``: one segment, mapped page by page as it grows.

    Pages are 2 MiB in the small pool and 20 MiB in the large. Behind the last mapped page lies an
    unmapped block without end; further ones are the holes that giving pages back has left.
    """

    def __init__(self, driver: _Driver, *, small: bool) -> None:
        super().__init__(driver, small=small)
        self._least_rest = _UNIT
        self._page = _SMALL_SEGMENT if small else _LARGE_SEGMENT
        end = self._heads[0] = _Block(0, self._page * _ENDLESS, mapped=False)
        self._unmapped: list[tuple[int, _Block]] = [(0, end)]  # By address.

    def best_fit(self, size: int) -> _Block | None:
        """Take the cached block that holds ``size`` bytes and can grow the least.

        A block before unmapped pages counts with them, so that the end of the segment is used
        last (``get_free_block``).
        """
        cached = self._cached
        position = bisect_left(cached, (size,))
        if position == len(cached):
            return None
        reach = _reach(cached[position][2])
        while position + 1 < len(cached) and (further := _reach(cached[position + 1][2])) < reach:
            position, reach = position + 1, further
        return cached.pop(position)[2]

    def grow(self, size: int) -> _Block | None:
        """Map pages at the lowest address where they make ``size`` bytes with what is free there.

        What was mapped before the driver ran out stays mapped (``try_allocate_expandable_block``).
        """
        block = self._lowest_room(size)
        if not block.mapped and not self._map(block, min(size, block.size)):
            return None
        while block.size < size:
            hole = block.after
            assert hole is not None, "the end of the segment is unmapped"
            if not self._map(hole, min(size - block.size, hole.size)):
                return None
        self._forget(block)
        return block

    def release(self) -> None:
        """Unmap each page that is free from end to end (``unmap_block``)."""
        for _, _, block in tuple(self._cached):
            self._unmap(block)

    def _lowest_room(self, size: int) -> _Block:
        """The first of free blocks that have room together (``find_expandable_block``)."""
        for _, hole in self._unmapped:
            start = hole.before if hole.before is not None and hole.before.free else hole
            block: _Block | None = start
            room = 0
            while room < size and block is not None and block.free:
                room += block.size
                block = block.after
            if room >= size:
                return start
        raise AssertionError("the end of the segment has room for anything")

    def _map(self, block: _Block, size: int) -> bool:
        """Map the pages of the first ``size`` bytes, all or none (``map_block``)."""
        size = _rounded(size, self._page)
        if not self._driver.take(size):
            return False
        self._forget(block)
        if size < block.size:
            rest = block.cut(size)
            rest.mapped = False
            self._cache(rest)
        block.mapped = True
        self._cache(self._merged(block))
        return True

    def _unmap(self, block: _Block) -> None:
        start = _rounded(block.address, self._page)
        end = (block.address + block.size) // self._page * self._page
        if start >= end:
            return
        self._forget(block)
        if start > block.address:
            front, block = block, block.cut(start - block.address)
            self._cache(front)
        if end < block.address + block.size:
            self._cache(block.cut(end - block.address))
        block.mapped = False
        self._cache(self._merged(block))
        self._driver.give_back(end - start)

    def _cache(self, block: _Block) -> None:
        if block.mapped:
            super()._cache(block)
        else:
            insort(self._unmapped, (block.address, block))

    def _forget(self, block: _Block) -> None:
        if block.mapped:
            super()._forget(block)
        else:
            del self._unmapped[bisect_left(self._unmapped, (block.address,))]


def _reach(block: _Block) -> int:
    """The bytes of a block and of the unmapped pages right behind it."""
    after = block.after
    return block.size + (after.size if after is not None and not after.mapped else 0)
