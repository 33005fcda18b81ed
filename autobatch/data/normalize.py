"""The entrance of a batch: arrays become tensors, and lists of examples are marked."""

from collections.abc import Mapping, Sequence, Sized
from itertools import chain
from typing import TypeGuard

from torch import Tensor

from autobatch.data.containers import children_of, is_dataclass, rebuilt
from autobatch.data.markers import MARKS, Examples, RaggedBatch, Shared
from autobatch.data.tree import BatchTree, counted, from_numpy, plain_size, size_of


def as_batch(nest: BatchTree) -> BatchTree:
    """Return the batch with arrays as tensors, and each list of examples marked as ``Examples``.

    A list in a batch can mean two things. ``([x1, x2], y)`` holds two inputs, each with one row an
    example. ``([image, image, ...], [{"boxes": ..., "labels": ...}, ...])``, as detectors take it,
    holds one item an example. The batch is read in the second way if all its members are plain
    lists or tuples of one length of at least 1, or tensors of that length along dimension 0; if at
    least one is such a list; and if

    * an item of such a list is a mapping or a dataclass, or
    * no member is a tensor, and one list holds nothing with a dimension: captions, labels, or
    * the first way fails: not all tensors agree in length along dimension 0.

    A member that is ``Shared``, a string, a number, ``None``, an object without tensors or a tensor
    without dimensions does not count. Where it is nothing else, a batch is read in the first way.

    The limit: a list of images beside a tensor of labels cannot be told from several inputs where
    the batch has just as many examples as the images have channels. It is read in the first way
    then. Labels in a list, or in a mapping an example, are always told. Nor can it be told that a
    list of class names, as long as the batch, is meant for the batch as a whole: say ``Shared``.

    To be read once, as the loader or the caller made it: what is cut from a batch may look like
    another kind. A plain tuple of tensors is returned at once, and so are ``RaggedBatch``.
    """
    return BatchReader()(nest)


class BatchReader:
    """Reads the batches of an epoch, all in the way of those before.

    A last batch of three images beside three labels looks like another kind.
    """

    def __init__(self) -> None:
        self._held = False  # Whether lists held examples in one before.

    def __call__(self, nest: BatchTree) -> BatchTree:
        """Return it as ``as_batch`` does."""
        if plain_size(nest) is not None or isinstance(nest, RaggedBatch):
            return nest
        nest = from_numpy(nest)
        members = children_of(nest)
        if members is None or isinstance(nest, MARKS):
            return nest
        told = [member for member in members if not _is_whole(member)]
        if not _may_hold_examples(told) or not (self._held or _hold_examples(told, nest)):
            return nest
        self._held = True
        return rebuilt(nest, [Examples(m) if _is_plain_list(m) else m for m in members])


def _may_hold_examples(told: Sequence[BatchTree]) -> bool:
    """Whether all that says something is as long: lists, one at least, and tensors."""
    lists = list(filter(_is_plain_list, told))
    if not lists or not all(_is_plain_list(m) or isinstance(m, Tensor) for m in told):
        return False
    lengths = {len(member) for member in told if isinstance(member, Sized)}
    items = chain.from_iterable(lists)
    # What is shared is not one example's.
    return len(lengths) == 1 and 0 not in lengths and not any(isinstance(i, Shared) for i in items)


def _hold_examples(told: Sequence[BatchTree], nest: BatchTree) -> bool:
    """Whether the lists among what ``nest`` tells, which may, hold one item an example."""
    lists = list(filter(_is_plain_list, told))
    items = chain.from_iterable(lists)
    if any(isinstance(item, Mapping) or is_dataclass(item) for item in items):
        return True
    is_listed = len(lists) == len(told) and not all(map(_has_dimension, lists))
    return is_listed or not _has_size(nest)


def _is_plain_list(nest: BatchTree) -> TypeGuard[list[object] | tuple[object, ...]]:
    return type(nest) is list or type(nest) is tuple


def _is_whole(nest: BatchTree) -> bool:
    """Whether this says nothing of how the batch is to be read."""
    if isinstance(nest, Tensor):
        return not nest.ndim
    return isinstance(nest, Shared) or children_of(nest) is None


def _has_dimension(nest: BatchTree) -> bool:
    return any(True for _ in counted(nest))


def _has_size(nest: BatchTree) -> bool:
    try:
        size_of(nest)
    except ValueError:
        return False
    return True
