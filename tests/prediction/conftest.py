"""What the tests of predictions run under."""

from collections.abc import Iterator

import pytest
from forked_workers import Servers


@pytest.fixture(scope="session")
def _servers() -> Iterator[Servers]:
    with Servers() as servers:
        yield servers


@pytest.fixture(scope="module", autouse=True)
def _workers_are_forked(_servers: Servers) -> Iterator[None]:
    with _servers.serving():
        yield
