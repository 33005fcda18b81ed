"""Signals wait for the end of a block or of a step; a second one does not wait for a step."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from reference import small_model
from states import fingerprint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autobatch import StepResult, find_and_train
from autobatch.signals import GracefulStop, deferred_interrupt, deferred_signals

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def rows(examples: int = 42) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (examples,), generator=generator)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def _handlers_are_as_they_were() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted(number: int) -> None:
    reached = False
    expected = (KeyboardInterrupt, SystemExit)
    with pytest.raises(expected), deferred_signals() as stop:  # noqa: PT012  # The end raises.
        send(number)
        reached = True
        assert stop.signal == number
    assert reached


@pytest.mark.parametrize(
    ("first", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_one_is_obeyed_at_once(
    first: int, second: int, kind: type[BaseException]
) -> None:
    reached = False
    with pytest.raises(kind), deferred_signals():  # noqa: PT012  # It is raised inside.
        send(first)
        send(second)
        reached = True
    assert not reached


def test_sigterm_ends_with_the_status_that_a_shell_shows() -> None:
    with pytest.raises(SystemExit) as ended:
        GracefulStop(signal=signal.SIGTERM).go()
    assert ended.value.code == 143


def test_a_signal_that_nobody_looked_at_is_obeyed_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), deferred_signals():
        send(signal.SIGINT)


def test_an_error_goes_before_a_signal() -> None:
    with pytest.raises(LookupError), deferred_signals():  # noqa: PT012  # In this order.
        send(signal.SIGINT)
        raise LookupError


def test_without_a_signal_nothing_happens() -> None:
    with deferred_signals() as stop:
        pass
    assert stop.signal is None


def test_handlers_of_the_users_own_are_put_back() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with deferred_signals():
            pass
        send(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def elsewhere(run: Callable[[], object]) -> object:
    """What ``run`` returns in another thread, or the error that it raises."""
    found: list[object] = []

    def catch() -> None:
        try:
            found.append(run())
        except BaseException as error:  # noqa: BLE001  # It is returned.
            found.append(error)

    thread = threading.Thread(target=catch)
    thread.start()
    thread.join()
    return found[0]


def test_another_thread_leaves_the_handlers_alone() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]

    def inside() -> list[object]:
        with deferred_signals():
            return [signal.getsignal(number) for number in SIGNALS]

    assert elsewhere(inside) == before


# To the end of a block.


def test_ctrl_c_is_held_back_to_the_end_and_delivered_once() -> None:
    reached = []

    def press_twice() -> None:
        with deferred_interrupt():
            send(signal.SIGINT)
            send(signal.SIGINT)
            reached.append("end")

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert reached == ["end"]


def test_the_control_is_interrupted_at_once() -> None:
    reached = []

    def press() -> None:
        send(signal.SIGINT)
        reached.append("end")

    with pytest.raises(KeyboardInterrupt):
        press()
    assert reached == []


@pytest.fixture
def own_handler() -> Iterator[list[int]]:
    """A handler of the user's, which notes that it was called."""
    called: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: called.append(number))
    yield called
    signal.signal(signal.SIGINT, before)


def test_the_users_own_handler_is_called_afterwards_and_stays(own_handler: list[int]) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with deferred_interrupt():
        send(signal.SIGINT)
        assert own_handler == []
    assert own_handler == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred_interrupt():
            send(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_nothing_is_held_back_where_nothing_is_pressed(own_handler: list[int]) -> None:
    with deferred_interrupt():
        pass
    assert own_handler == []


def test_an_error_while_ctrl_c_is_deferred_puts_the_handler_back() -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="inside"), deferred_interrupt():
        raise ValueError("inside")
    assert signal.getsignal(signal.SIGINT) is handler


def test_outside_the_main_thread_no_handler_is_touched() -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with deferred_interrupt():
                pass
        except ValueError as error:  # What signal.signal raises there.
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == []


# In a training.


def train(directory: Path | None, on_step: Callable[[StepResult], object]) -> object:
    return find_and_train(
        small_model(),
        rows(),
        16,
        epochs=2,
        checkpoint_dir=directory,
        on_step=on_step,
        progress=False,
    )


def test_without_a_directory_ctrl_c_is_what_it_always_was() -> None:
    steps: list[StepResult] = []
    handlers: set[object] = set()

    def on_step(step: StepResult) -> None:
        handlers.update(signal.getsignal(number) for number in SIGNALS)
        send(signal.SIGINT)
        steps.append(step)

    with pytest.raises(KeyboardInterrupt):
        train(None, on_step)
    assert not steps, "it was obeyed within on_step"
    assert handlers == {signal.getsignal(number) for number in SIGNALS}


def test_a_second_ctrl_c_does_not_wait_for_the_checkpoint(tmp_path: Path) -> None:
    def on_step(_: StepResult) -> None:
        send(signal.SIGINT)
        send(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, on_step)
    assert list(tmp_path.iterdir()) == []


def test_a_training_in_another_thread_saves_too(tmp_path: Path) -> None:
    elsewhere(lambda: train(tmp_path, lambda _: None))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "step-00000003.pt",
        "step-00000006.pt",
    ]


class Interrupted(Dataset[Tensor]):
    """Its worker gets what a terminal sends to all processes."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, row: int) -> Tensor:
        send(signal.SIGINT)
        return torch.tensor(row)


def test_ctrl_c_leaves_a_worker_at_its_work() -> None:
    with deferred_signals() as stop:
        loader = DataLoader(Interrupted(), 1, num_workers=2, multiprocessing_context="fork")
        assert [int(batch) for batch in loader] == [0, 1]
    assert stop.signal is None


SCRIPT = """
    import os, signal, sys
    import torch
    torch.set_num_threads(1)
    sys.path[:0] = [{root!r}, {tests!r}]
    from reference import small_model
    from test_signals import rows
    from autobatch import find_and_train

    left = [4]
    def on_step(step):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGTERM)
    model = small_model()
    torch.manual_seed(1)
    find_and_train(model, rows(), 16, epochs=2, checkpoint_dir=sys.argv[1],
                   on_step=on_step, progress=False)
"""


def test_a_process_that_got_sigterm_goes_on_where_it_was(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    script = textwrap.dedent(SCRIPT.format(root=str(tests.parent), tests=str(tests)))

    arguments = [sys.executable, "-c", script, str(tmp_path)]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert ended.returncode == 143, ended.stderr
    assert [path.name for path in sorted(tmp_path.iterdir())][-1] == "step-00000004.pt"

    steps: list[StepResult] = []
    model = small_model()
    torch.manual_seed(99)
    again = find_and_train(
        model,
        rows(),
        16,
        epochs=2,
        checkpoint_dir=tmp_path,
        on_step=steps.append,
        progress=False,
    )
    other = small_model()
    torch.manual_seed(1)
    whole = find_and_train(other, rows(), 16, epochs=2, progress=False)
    assert len(steps) == 2
    assert again.losses == whole.losses
    assert fingerprint(model) == fingerprint(other)
