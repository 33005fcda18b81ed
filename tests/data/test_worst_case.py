"""The longest examples that can be found without reading all the data."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler

from autobatch import SearchOptions, Shared, find_and_train, find_batch_size
from autobatch.data.sample import read_sample
from autobatch.data.source import open_source
from autobatch.data.tree import size_of
from autobatch.data.worst_case import WorstCase, worst_case_of

Example = tuple[Tensor, Tensor]


class Texts(Dataset[Example]):
    """Sequences of ``lengths`` words; it remembers which were read."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> Example:
        if not 0 <= row < len(self.lengths):
            raise IndexError(row)
        self.read.append(row)
        return torch.full((self.lengths[row],), row % 7), torch.tensor(row % 3)


def padded(examples: list[Example]) -> Example:
    words = pad_sequence([words for words, _ in examples], batch_first=True)
    return words, torch.stack([label for _, label in examples])


def loader(texts: Dataset[Example], **options: Any) -> DataLoader[Example]:
    own: dict[str, Any] = {} if "batch_sampler" in options else {"batch_size": 4}
    return DataLoader(texts, collate_fn=padded, **own, **options)


def chosen(data: Any, worst_case: WorstCase = "longest") -> tuple[Any, str]:
    source = open_source(data, batch_size=4)
    return worst_case_of(source, read_sample(source), worst_case)


def lengths(longest_at: int, count: int = 200) -> list[int]:
    return [90 if row == longest_at else 5 + row % 3 for row in range(count)]


@pytest.mark.parametrize("row", [4, 100, 199])
def test_the_longest_is_found_wherever_it_lies(row: int) -> None:
    batch, said = chosen(loader(Texts(lengths(row))))
    assert batch[0].shape == (1, 90)
    assert said == "the longest of 200 examples read: (int64[1, 90], int64[1])"


def test_of_much_data_256_examples_are_looked_at_from_all_over() -> None:
    texts = Texts([5 + row % 50 for row in range(10_000)])
    source = open_source(loader(texts), batch_size=4)
    sample = read_sample(source)
    texts.read.clear()
    _, said = worst_case_of(source, sample, "longest")
    assert len(texts.read) == len(set(texts.read)) == 256
    assert max(texts.read) > 9900
    assert said.startswith("the longest of 256 examples read")


def test_sixteen_of_one_length_are_enough() -> None:
    texts = Texts([5] * 1000)
    source = open_source(loader(texts), batch_size=4)
    sample = read_sample(source)
    texts.read.clear()
    batch, said = worst_case_of(source, sample, "longest")
    assert batch is sample
    assert len(texts.read) == 16
    assert max(texts.read) > 900, "from all over"
    assert said == "the first batch; 16 examples read have one size"


@given(count=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_all_of_a_little_data_is_looked_at(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1, 9, (count,), generator=generator).tolist()
    batch, said = chosen(loader(Texts(drawn)))
    if "alike" in said:
        assert len(set(drawn[: count if count < 16 else 0] or [0])) == 1
    else:
        assert batch[0].shape[1] == max(drawn)


def test_a_first_batch_that_is_longer_stays() -> None:
    texts = Texts([50, *[3, 4] * 20])
    batch, said = chosen(loader(texts))
    assert batch[0].shape[1] == 50
    assert size_of(batch) in (1, 4)
    assert said.startswith(("the first batch; none of", "the longest of"))


def test_a_dataset_is_looked_at_as_well() -> None:
    texts = Texts([7] * 30)
    _, said = chosen(texts)
    assert said == "the first batch; 16 examples read have one size"


def test_lists_and_texts_have_a_length_before_they_are_collated() -> None:
    class Tokens(Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, row: int) -> dict[str, Any]:
            return {"text": "ab", "ids": [1] * (30 if row == 17 else 4)}

    def collate(rows: list[dict[str, Any]]) -> Example:
        return padded([(torch.tensor(row["ids"]), torch.tensor(1)) for row in rows])

    batch, _ = chosen(DataLoader(Tokens(), batch_size=4, collate_fn=collate))
    assert batch[0].shape == (1, 30)


class Stream(IterableDataset[Example]):
    def __iter__(self) -> Any:
        return iter([(torch.ones(3), torch.tensor(1))] * 9)


@pytest.mark.parametrize(
    "data",
    [
        loader(Texts(lengths(100)), num_workers=1),
        loader(Texts(lengths(100)), sampler=SubsetRandomSampler(range(9))),
        loader(Subset(Texts(lengths(100)), range(50)), batch_sampler=[[0, 1], [2, 3]]),
        loader(Stream()),
        (torch.ones(9, 2), torch.ones(9)),
        [(torch.ones(9, 2), torch.ones(9))],
    ],
    ids=["workers", "sampler", "batch sampler", "stream", "tensors", "list"],
)
def test_what_cannot_be_looked_at_without_harm_is_not(data: Any) -> None:
    """Workers would inherit what a dataset opens here; a sampler may leave rows out."""
    _, said = chosen(data)
    assert said == "the first batch"


def refusing(examples: list[Example]) -> Example:
    return padded(examples[::2])[0][:1] + padded(examples[1::2])[0][:1], examples[0][1][None]


def dropping(examples: list[Example]) -> Example:
    words, labels = padded(examples)
    return words[: len(words) // 2], labels[: len(words) // 2]


@pytest.mark.parametrize("collate", [refusing, dropping])
def test_a_collate_function_that_wants_pairs_is_left_in_peace(
    collate: Callable[[list[Example]], Example],
) -> None:
    texts = Texts([6, 6, 6, 6, *lengths(100)])
    pairs = DataLoader(texts, batch_size=4, collate_fn=collate)
    source = open_source(pairs, batch_size=4)
    first = read_sample(source)
    found, said = worst_case_of(source, first, "longest")
    assert found is first
    assert said.startswith(
        "the first batch; the longest of 204 examples cannot be collated alone: "
    )


def test_first_looks_at_nothing_else() -> None:
    texts = Texts(lengths(100))
    _, said = chosen(loader(texts), "first")
    assert said == "the first batch"
    assert texts.read == [0, 1, 2, 3]


def test_a_batch_of_the_users_own() -> None:
    own = (torch.ones(2, 77, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
    batch, said = chosen(loader(Texts(lengths(100))), own)
    assert batch[0].shape == (2, 77)
    assert said == "the batch given as worst_case"


def test_a_slow_dataset_is_looked_at_for_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Slow(Texts):
        def __getitem__(self, row: int) -> Example:
            nonlocal now
            now += 0.3
            return super().__getitem__(row)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    _, said = chosen(loader(Slow(lengths(3))))
    assert " 4 examples read" in said


@pytest.mark.parametrize(
    ("worst_case", "words"),
    [
        ("shortest", 'worst_case must be "longest", "first" or a batch, got \'shortest\''),
        ((torch.ones(0, 3), torch.ones(0)), "worst_case must hold an example"),
        (Shared(3), "size|example|tensor"),
    ],
)
def test_bad_worst_cases_are_refused(worst_case: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        SearchOptions(worst_case=worst_case)


class Reader(nn.Module):
    """Memory by the word: 4 KiB each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 256)
        self.head = nn.Linear(256, 3)

    def forward(self, words: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.tanh(self.embedding(words)).mean(1))
        return scores


def test_a_search_on_the_longest_finds_less_and_says_so() -> None:
    texts = Texts(lengths(100))
    limit = 2 * 2**20
    longest = find_batch_size(Reader(), loader(texts), memory_limit=limit)
    first = find_batch_size(
        Reader(), loader(texts), memory_limit=limit, search=SearchOptions(worst_case="first")
    )
    assert longest.size * 5 < first.size
    assert longest.worst_case.startswith("the longest of 200 examples read")


def test_training_goes_on_as_if_nothing_had_been_looked_at() -> None:
    def losses(worst_case: WorstCase) -> tuple[float, ...]:
        torch.manual_seed(0)
        shuffled = loader(Texts(lengths(100)), shuffle=True)
        options = SearchOptions(worst_case=worst_case)
        return find_and_train(
            Reader(), shuffled, desired=16, search=options, seed=3, progress=False
        ).losses

    assert losses("longest") == losses("first")
