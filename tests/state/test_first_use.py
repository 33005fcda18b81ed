"""A first import and a first call leave the process as they found it."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

TESTS: Final = Path(__file__).parents[1]
# Each case runs in a fork of one process: what a case imports, no other case has imported.
LAUNCHER: Final = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
asked = json.load(sys.stdin)
exec(asked["beforehand"])
from process_state import differences, process_state
for name, code in asked["cases"].items():
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)  # What a case writes is no answer.
        given = {{}}
        exec(asked["setup"], given)
        before = process_state()
        try:
            exec(code, given)
            found = differences(before, process_state())
        except BaseException as error:
            found = [f"it failed: {{error!r}}"]
        os.write({answers}, (json.dumps([name, found]) + "\\n").encode())
        os._exit(0)
    os.waitpid(child, 0)
"""


def left_by(
    cases: Mapping[str, str], *, beforehand: str = "", setup: str = "pass"
) -> dict[str, list[str]]:
    """Return what each case changed in a process.

    Args:
        cases: Python code by name.
        beforehand: What the process has run before it forks for the first case.
        setup: What each case runs before its process is looked at.
    """
    script = LAUNCHER.format(root=str(TESTS.parent), tests=str(TESTS), answers=3)
    ended = subprocess.run(
        ["bash", "-c", 'exec 3>&1 "$0" -c "$1"', sys.executable, script],
        input=json.dumps({"cases": cases, "beforehand": beforehand, "setup": setup}),
        capture_output=True,
        text=True,
        check=True,
    )
    found = dict(json.loads(line) for line in ended.stdout.splitlines())
    assert found.keys() == cases.keys(), ended.stderr
    return found


# A script that makes an optimizer of torch has imported torch._dynamo by that, which sets a
# variable of the environment and a filter of warnings: plain torch leaves these, not autobatch.
PLAIN_TORCH: Final = """
import numpy, torch
torch.set_num_threads(1)
torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
"""
SETUP: Final = """
import os, random, sys, tempfile, numpy, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
rows = torch.randn(42, 5), torch.randint(0, 3, (42,))
own = torch.Generator().manual_seed(0)
loader = DataLoader(TensorDataset(*rows), 4, shuffle=True, drop_last=True, generator=own)
folder = tempfile.mkdtemp()
cpu = {"device": "cpu"}
quiet = {**cpu, "progress": False}
"""
TRAIN: Final = (
    "import autobatch; autobatch.find_and_train(model, loader, 8, drop_last=True, {arguments})"
)
FIND: Final = "import autobatch; autobatch.find_batch_size(model, rows, ceiling=16, {arguments})"
USES: Final = {
    "import": "import autobatch",
    "every public name": "import autobatch; [getattr(autobatch, n) for n in autobatch.__all__]",
    "training": TRAIN.format(arguments="**quiet"),
    "training with progress": TRAIN.format(arguments="**cpu"),
    "training with checkpoints": TRAIN.format(arguments="checkpoint_dir=folder, **quiet"),
    "training at the fastest size": TRAIN.format(arguments="prefer='fastest', **quiet"),
    "search": FIND.format(arguments="**quiet"),
    "search with progress": FIND.format(arguments="**cpu"),
    "search on a terminal": (
        "import pty; _, end = pty.openpty(); kept = os.dup(2); os.dup2(end, 2)\n"
        + FIND.format(arguments="**cpu")
        + "\nos.dup2(kept, 2), os.close(kept), os.close(_), os.close(end)"
    ),
    "search in a process": FIND.format(
        arguments="search=autobatch.SearchOptions(isolate=True), **quiet"
    ),
    "picture": (
        "import autobatch; found = autobatch.find_batch_size(model, rows, ceiling=16, **quiet)\n"
        "found.plot(folder + '/found.png')"
    ),
    "one size": "import autobatch; autobatch.check(model, rows, 8, **cpu)",
    "any function": "import autobatch; autobatch.find_largest(torch.zeros, ceiling=64, **quiet)",
    "own loop": (
        "import autobatch; optimizer = torch.optim.SGD(model.parameters(), 0.1)\n"
        "loss = nn.CrossEntropyLoss()\n"
        "autobatch.Accumulator(model, optimizer, loss, micro_batch=4).step(rows)"
    ),
    "prediction": "import autobatch; autobatch.predict(model, rows, gpu='RTX 3090')",
    "an error": "import autobatch; autobatch.verdict_of(ValueError())",
    "commands": "import autobatch.cli, autobatch.cli.commands, autobatch.demo",
    "command line": "from autobatch.cli import main; main(['devices'])",
}


def test_a_first_use_leaves_nothing_behind() -> None:
    left = left_by(USES, beforehand=PLAIN_TORCH, setup=SETUP)
    assert {name: found for name, found in left.items() if found} == {}


def test_without_torch_an_import_leaves_what_the_import_of_torch_leaves() -> None:
    light = ["BatchPlan", "DoesNotFitError", "SearchResult", "Shared"]
    cases = {name: f"import autobatch; autobatch.{name}" for name in (*light, "find_and_train")}
    left = left_by({"autobatch": "import autobatch", "torch": "import torch", **cases})
    assert [name for name in ("autobatch", *light) if left[name]] == []
    assert set(left["find_and_train"]) <= set(left["torch"])


def test_a_hand_written_loop_leaves_the_environment_and_a_filter_of_warnings() -> None:
    """The control of ``PLAIN_TORCH``: without it a search leaves what an optimizer leaves."""
    cases = {
        "an optimizer": "torch.optim.SGD(model.parameters(), 0.1)",
        "a search": USES["search"],
    }
    left = left_by(cases, beforehand="import numpy, torch", setup=SETUP)
    assert left["a search"] == left["an optimizer"]


CHANGES: Final = {
    "python: random": "random.random()",
    "python: warnings.filters": "warnings.simplefilter('error')",
    "python: warnings.showwarning": "warnings.showwarning = print",
    "python: signal handlers": "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "python: logging root": "logging.basicConfig()",
    "python: logging disabled": "logging.disable()",
    "python: logger torch": "logging.getLogger('torch').setLevel(1)",
    "python: os.environ": "os.environ['ANYTHING'] = '1'",
    "python: cwd": "os.chdir('/')",
    "python: umask": "os.umask(0o007)",
    "python: hooks": "sys.excepthook = print",
    "python: threads": "threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
    "python: trace": "tracemalloc.start()",
    "python: streams": "sys.stdout = sys.stderr",
    "python: sys.path": "sys.path.append('/')",
    "python: import hooks": "sys.meta_path.append(None)",
    "python: last error": "sys.last_value = ValueError()",
    "python: limits": "sys.setrecursionlimit(2000)",
    "python: locale": "locale.setlocale(locale.LC_ALL, 'C.UTF-8')",
    "python: decimal": "decimal.getcontext().prec = 3",
    "python: gc": "gc.disable()",
    "python: gc callbacks": "gc.callbacks.append(print)",
    "python: asyncio policy": "asyncio.get_event_loop_policy()",
    "python: faulthandler": "faulthandler.enable()",
    "python: open files": "os.dup(2)",
    "numpy: random": "numpy.random.rand()",
    "numpy: errors": "numpy.seterr(all='ignore')",
    "numpy: printing": "numpy.set_printoptions(3)",
    "torch: random": "torch.rand(1)",
    "torch: default dtype": "torch.set_default_dtype(torch.float64)",
    "torch: default device": "torch.set_default_device('meta')",
    "torch: threads": "torch.set_num_threads(2)",
    "torch: grad": "torch.set_grad_enabled(False)",
    "torch: anomaly": "torch.autograd.set_detect_anomaly(True)",
    "torch: multithreading": "torch._C._set_multithreading_enabled(False)",
    "torch: deterministic": "torch.use_deterministic_algorithms(True)",
    "torch: autocast": "torch.set_autocast_enabled('cpu', True)",
    "torch: matmul": "torch.set_float32_matmul_precision('high')",
    "torch: cudnn": "torch.backends.cudnn.benchmark = True",
    "torch: attention": "torch.backends.cuda.enable_flash_sdp(False)",
    "torch: mkldnn": "torch.backends.mkldnn.set_flags(False)",
    "torch: denormal": "torch.set_flush_denormal(True)",
    "torch: warn always": "torch.set_warn_always(True)",
    "torch: printing": "torch.set_printoptions(precision=2)",
    "torch: modes": "torch.utils.flop_counter.FlopCounterMode().__enter__()",
    "torch: module hooks": "nn.modules.module.register_module_forward_hook(print)",
    "torch: sharing": "torch.multiprocessing.set_sharing_strategy('file_system')",
    "torch: start method": "torch.multiprocessing.set_start_method('spawn')",
    "torch: loading": "torch.serialization.add_safe_globals([Path])",
    "torch: patched": "nn.Module.__call__ = print",
    "matplotlib: settings": "matplotlib.rcParams['font.size'] = 3",
    "matplotlib: backend": "matplotlib.use('svg')",
    "matplotlib: pyplot": "import matplotlib.pyplot",
}
IMPORTS: Final = """
import asyncio, decimal, faulthandler, gc, locale, logging, os, random, signal, sys, threading
import time, tracemalloc, warnings
from pathlib import Path
import matplotlib, numpy, torch
import torch.utils.flop_counter
from torch import nn
logging.getLogger("torch")
"""


def test_each_kind_of_change_is_noticed() -> None:
    left = left_by(CHANGES, beforehand=PLAIN_TORCH + IMPORTS, setup=IMPORTS)
    assert [name for name in CHANGES if name not in left[name]] == []
