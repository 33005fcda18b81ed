"""Normalize a batch: convert arrays to tensors, and mark lists of examples."""

from collections.abc import Mapping, Sequence, Sized
from itertools import chain
from typing import TypeGuard

from torch import Tensor

from autobatch.data.containers import children_of, is_dataclass, rebuilt
from autobatch.data.markers import MARKERS, Examples, RaggedBatch, Shared
from autobatch.data.tree import BatchTree, from_numpy, per_example, plain_size, size_of


def as_batch(tree: BatchTree) -> BatchTree:
    """Return the batch with arrays as tensors, and each list of examples marked as ``Examples``.

    A list in a batch can mean two things:

    1. Several inputs, each with one row per example: ``([x1, x2], y)``.
    2. One item per example, as detectors take them:
       ``([image, image, ...], [{"boxes": ..., "labels": ...}, ...])``.

    The second meaning is chosen if every member of the batch is a plain list or tuple, or a tensor,
    all of one length of at least 1 along dimension 0; if at least one member is a list or tuple;
    and if

    * an item of a list is a mapping or a dataclass, or
    * no member is a tensor, and one list holds no tensor with a dimension (captions, labels), or
    * the first meaning is impossible, because the tensors differ in length along dimension 0.

    Members without a batch dimension are ignored: ``Shared``, a string, a number, ``None``, an
    object without tensors, a tensor without dimensions. In all other cases the first meaning is
    chosen.

    Limits: a list of images beside a tensor of labels looks like several inputs if the batch has as
    many examples as the images have channels; the first meaning is chosen. Labels in a list, or in
    one mapping per example, avoid the ambiguity. A list of class names that is as long as the batch
    is cut with the batch; wrap it in ``Shared`` if it belongs to the batch as a whole.

    Call this once, on the batch of the loader or the caller: a part that was cut from a batch may
    look like the other meaning. A plain tuple of tensors and a ``RaggedBatch`` are returned as they
    are.
    """
    return BatchReader()(tree)


class BatchReader:
    """Normalizes the batches of one epoch, and gives a list the same meaning in all of them.

    Without this memory, a last batch of three images of three channels could change the meaning.
    """

    def __init__(self) -> None:
        self._found_examples = False  # Whether the lists of an earlier batch held examples.

    def __call__(self, tree: BatchTree) -> BatchTree:
        """Return the batch as ``as_batch`` does."""
        if plain_size(tree) is not None or isinstance(tree, RaggedBatch):
            return tree
        tree = from_numpy(tree)
        members = children_of(tree)
        if members is None or isinstance(tree, MARKERS):
            return tree
        informative = [member for member in members if not _is_whole(member)]
        if not _may_hold_examples(informative):
            return tree
        if not (self._found_examples or _hold_examples(informative, tree)):
            return tree
        self._found_examples = True
        return rebuilt(tree, [Examples(m) if _is_plain_list(m) else m for m in members])


def _may_hold_examples(informative: Sequence[BatchTree]) -> bool:
    """Return whether all members are lists or tensors of one length, and at least one is a list."""
    lists = list(filter(_is_plain_list, informative))
    if not lists or not all(_is_plain_list(m) or isinstance(m, Tensor) for m in informative):
        return False
    lengths = {len(member) for member in informative if isinstance(member, Sized)}
    items = chain.from_iterable(lists)
    # A Shared value does not belong to one example.
    return len(lengths) == 1 and 0 not in lengths and not any(isinstance(i, Shared) for i in items)


def _hold_examples(informative: Sequence[BatchTree], tree: BatchTree) -> bool:
    """Return whether the lists among ``informative`` hold one item per example."""
    lists = list(filter(_is_plain_list, informative))
    items = chain.from_iterable(lists)
    if any(isinstance(item, Mapping) or is_dataclass(item) for item in items):
        return True
    is_listed = len(lists) == len(informative) and not all(map(_has_dimension, lists))
    return is_listed or not _has_size(tree)


def _is_plain_list(tree: BatchTree) -> TypeGuard[list[object] | tuple[object, ...]]:
    return type(tree) is list or type(tree) is tuple


def _is_whole(tree: BatchTree) -> bool:
    """Return whether this member belongs to the batch as a whole."""
    if isinstance(tree, Tensor):
        return not tree.ndim
    return isinstance(tree, Shared) or children_of(tree) is None


def _has_dimension(tree: BatchTree) -> bool:
    return any(True for _ in per_example(tree))


def _has_size(tree: BatchTree) -> bool:
    try:
        size_of(tree)
    except ValueError:
        return False
    return True
