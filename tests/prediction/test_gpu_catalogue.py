"""The catalogue: which card a name means, and that its figures can be true."""

import pytest

from autobatch.prediction.gpu_catalogue import CATALOGUE, Gpu, custom_gpu, find_gpu, visible_bytes

MIB, GIB = 2**20, 2**30
REPORTED = {  # What torch.cuda.get_device_name says.
    "Tesla P100-PCIE-16GB": "P100",
    "Tesla V100-SXM2-16GB": "V100 16GB",
    "Tesla V100-SXM3-32GB": "V100 32GB",
    "Tesla T4": "T4",
    "NVIDIA GeForce RTX 2080 Ti": "RTX 2080 Ti",
    "NVIDIA GeForce RTX 3080": "RTX 3080",
    "NVIDIA RTX A6000": "RTX A6000",
    "NVIDIA A10G": "A10G",
    "NVIDIA A100-PCIE-40GB": "A100 40GB",
    "NVIDIA A100-SXM4-80GB": "A100 80GB",
    "NVIDIA A100 80GB PCIe": "A100 80GB",
    "NVIDIA L4": "L4",
    "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA GH200 480GB": "GH200",
    "NVIDIA GeForce RTX 5070 Ti": "RTX 5070 Ti",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "RTX PRO 6000",
    "NVIDIA B200": "B200",
}
by_name = pytest.mark.parametrize("gpu", CATALOGUE, ids=lambda gpu: gpu.name)


@pytest.mark.parametrize(("asked", "name"), REPORTED.items())
def test_a_card_is_found_by_the_name_that_torch_gives_it(asked: str, name: str) -> None:
    assert find_gpu(asked).name == name


@pytest.mark.parametrize(
    "asked", ["RTX 4090", "4090", "nvidia-geforce-rtx-4090", "rtx4090", " GeForce_RTX_4090 24 GiB"]
)
def test_a_card_is_found_however_it_is_spelt(asked: str) -> None:
    assert find_gpu(asked).name == "RTX 4090"


@by_name
def test_every_card_is_found_by_its_own_name(gpu: Gpu) -> None:
    assert find_gpu(gpu.name) is gpu
    assert find_gpu(gpu.name.replace(" ", "-").lower()) is gpu
    assert find_gpu(f"{gpu.name} {gpu.also}") is gpu


@pytest.mark.parametrize(
    ("asked", "name"),
    [("A10", "A10"), ("L4", "L4"), ("h100", "H100"), ("3060", "RTX 3060"), ("5070", "RTX 5070")],
)
def test_a_whole_name_wins_over_longer_ones(asked: str, name: str) -> None:
    assert find_gpu(asked).name == name


def test_a_part_of_a_name_will_do_if_only_one_card_has_it() -> None:
    assert find_gpu("Ada").name == "RTX 6000 Ada"
    assert find_gpu("rtxa6000").name == "RTX A6000"


@pytest.mark.parametrize(
    ("asked", "cards"),
    [
        ("A100", "A100 40GB, A100 80GB"),
        ("4060 ti", "RTX 4060 Ti 8GB, RTX 4060 Ti 16GB"),
        ("6000", "RTX A6000, RTX 6000 Ada, RTX PRO 6000"),
    ],
)
def test_a_name_of_several_cards_is_refused_with_all_of_them(asked: str, cards: str) -> None:
    with pytest.raises(ValueError, match=f"'{asked}' may be any of {cards}; say which"):
        find_gpu(asked)


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [("RTX 4091", "RTX 4090"), ("GB200", "GH200"), ("RTX 3090 Ti", "RTX 3080")],
)
def test_an_unknown_name_is_refused_with_the_nearest_and_the_way_out(
    asked: str, nearest: str
) -> None:
    with pytest.raises(ValueError, match=rf"called '{asked}'; nearest: .*{nearest}.*24GiB"):
        find_gpu(asked)


@pytest.mark.parametrize("asked", ["", "NVIDIA GeForce", "RTX"])
def test_a_name_that_says_nothing_is_refused(asked: str) -> None:
    with pytest.raises(ValueError, match="no GPU in the catalogue"):
        find_gpu(asked)


def test_a_gpu_of_any_memory_is_otherwise_like_a_known_one() -> None:
    gpu, like = custom_gpu("24GiB", like="H100"), find_gpu("H100")
    assert (gpu.name, gpu.capacity_bytes, gpu.listed_bytes) == ("24.0 GiB", 24 * GIB, 24 * GIB)
    assert gpu.context_bytes == like.context_bytes
    assert gpu.workspace_bytes == like.workspace_bytes
    assert (gpu.source, gpu.derived, gpu.also) == ("given by the user", False, "")
    assert not custom_gpu(GIB, like="GH200").derived
    assert custom_gpu(GIB).bf16


def test_a_memory_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="memory must be above zero bytes"):
        custom_gpu(0)
    with pytest.raises(ValueError, match="memory cannot be read from 'much'"):
        custom_gpu("much")
    with pytest.raises(ValueError, match="no GPU in the catalogue is called 'none'"):
        custom_gpu("24GiB", like="none")


def test_the_catalogue_holds_at_least_25_cards_of_each_kind_and_age() -> None:
    assert len(CATALOGUE) >= 25
    assert len({gpu.name for gpu in CATALOGUE}) == len(CATALOGUE)
    majors = [gpu.compute_capability[0] for gpu in CATALOGUE]
    assert majors[0] == 6
    assert {6, 7, 8, 9, 10, 12} == set(majors)
    assert sum(gpu.derived for gpu in CATALOGUE) < len(CATALOGUE) / 4


@by_name
def test_a_card_shows_less_than_is_listed_and_no_less_than_the_rule_expects(gpu: Gpu) -> None:
    assert visible_bytes(gpu.listed_bytes) <= gpu.capacity_bytes < gpu.listed_bytes
    assert gpu.derived == (gpu.capacity_bytes == visible_bytes(gpu.listed_bytes))


@by_name
def test_a_context_is_a_small_part_of_the_card(gpu: Gpu) -> None:
    least, most = gpu.context_bytes
    assert 50 * MIB < least < most < GIB
    assert most >= 0.25 * GIB or gpu.name == "T4"  # The one card that was seen to need less.
    assert most < gpu.capacity_bytes / 10


@pytest.mark.parametrize(
    ("name", "seen_gib"),
    [("T4", 0.14), ("L4", 0.25), ("3090", 0.41), ("4090", 0.43), ("L40S", 0.5), ("H200", 0.66)],
)
def test_a_context_can_be_what_was_seen(name: str, seen_gib: float) -> None:
    least, most = find_gpu(name).context_bytes
    assert least <= round(seen_gib * GIB) <= most


@by_name
def test_every_figure_has_a_source(gpu: Gpu) -> None:
    assert "{" not in gpu.source
    shown = f"{gpu.capacity_bytes // MIB} MiB", f"{gpu.capacity_bytes // MIB}MB"
    published = gpu.source.endswith(shown) or gpu.source.startswith("https://")
    assert published or "94.97 GiB" in gpu.source or gpu.derived
    assert gpu.derived == gpu.source.startswith("derived")


@pytest.mark.parametrize(
    ("name", "workspace_bytes", "able"),
    [
        ("P100", 8_519_680, False),
        ("T4", 8_519_680, False),
        ("A30", 8_519_680, True),
        ("4090", 8_519_680, True),
        ("H100", 32 * MIB, True),
        ("B200", 32 * MIB, True),
        ("5090", 32 * MIB, True),
    ],
)
def test_what_a_card_can_do_follows_from_its_compute_capability(
    name: str, workspace_bytes: int, able: bool
) -> None:
    gpu = find_gpu(name)
    assert gpu.workspace_bytes == workspace_bytes
    assert gpu.bf16 == gpu.flash == able


@pytest.mark.parametrize("asked", ["RTX 2080", "RTX 3080 12GB", "3070 Super"])
def test_a_card_is_not_taken_for_its_ti_or_super(asked: str) -> None:
    with pytest.raises(ValueError, match="no GPU in the catalogue"):
        find_gpu(asked)


@pytest.mark.parametrize("asked", ["24GiB", " 24 gib", "24576MiB"])
def test_a_size_is_a_gpu_of_that_size(asked: str) -> None:
    assert find_gpu(asked).capacity_bytes == 24 * 2**30
