"""Digests of trainings are the same for the same training, and for no other."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import digest

FAST = ("mlp", "Accumulator", "find_batch_size")


def fed(value: object) -> bytes:
    taken: list[bytes] = []
    digest.feed(taken.append, value)
    return b"".join(taken)


@pytest.mark.parametrize("name", FAST)
def test_the_same_training_has_the_same_digest_and_another_seed_another(name: str) -> None:
    first = digest.digest(name, seed=3)
    assert digest.digest(name, seed=3) == first
    assert digest.digest(name, seed=4) != first


def test_a_digest_sees_one_bit() -> None:
    model = nn.Linear(3, 2)
    before = fed(digest.of_module(model))
    assert fed(digest.of_module(model)) == before
    with torch.no_grad():
        model.bias[1].copy_(torch.nextafter(model.bias[1], torch.tensor(9.0)))
    assert fed(digest.of_module(model)) != before
    assert fed(0.0) != fed(-0.0)
    assert fed([1, [2]]) != fed([[1], 2])


def test_a_difference_is_told_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "digest.json"
    arguments = ["--file", str(file), "--only", "Accumulator, fp16"]
    assert digest.main([*arguments, "--write"]) == 0
    assert digest.main(arguments) == 0
    kept = json.loads(file.read_text())
    kept["digests"]["Accumulator, fp16"] = "another"
    file.write_text(json.dumps(kept))
    assert digest.main(arguments) == 1
    assert "DIFFERENT       Accumulator, fp16" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["cpu", "torch"])
def test_another_machine_is_refused(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "digest.json"
    file.write_text(json.dumps({"machine": {**digest.machine(), key: "other"}, "digests": {}}))
    assert digest.main(["--file", str(file)]) == 2
    assert f"written with {key} other" in capsys.readouterr().err
