"""The versions of the libraries: bounds, and names that newer versions remove."""

import importlib.util
import re
import tomllib
from pathlib import Path

import hydra
import pytest
import torch.distributed as dist
from packaging.requirements import Requirement

from alexnet_ddp.cli import compose
from alexnet_ddp.parallel import group

PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
GROUPS = [
    PYPROJECT["build-system"]["requires"],
    PYPROJECT["project"]["dependencies"],
    *EXTRAS.values(),
]


@pytest.mark.parametrize("requirement", [requirement for group in GROUPS for requirement in group])
def test_a_dependency_has_a_lower_and_an_upper_bound(requirement):
    assert re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+", requirement)


def test_the_malicious_versions_of_lightning_are_excluded():
    """2.6.2 and 2.6.3, published on PyPI with code that steals credentials."""
    (lightning,) = [
        requirement for requirement in EXTRAS["bench"] if requirement.startswith("lightning")
    ]
    lowest = re.search(r">=([\d.]+)", lightning)[1]
    assert tuple(map(int, lowest.split("."))) >= (2, 6, 4)


def test_a_peer_that_needs_older_libraries_is_refused_beside_dev_at_once():
    """mosaicml-streaming needs transformers<5, hence huggingface_hub<1: pip searched for minutes, or downgraded."""
    assert not [peer for peer in EXTRAS["bench"] if peer.startswith("mosaicml")]
    theirs, ours, same = (
        next(Requirement(line).specifier for line in EXTRAS[extra] if "huggingface_hub" in line)
        for extra in ("bench-streaming", "dev", "hub")
    )
    assert ours == same
    assert not list((theirs & ours).filter(f"{n}.{m}" for n in range(6) for m in range(100)))


@pytest.mark.skipif(
    not hasattr(dist, "all_gather_single"), reason="torch < 2.14 has only the old names"
)
def test_the_collectives_that_torch_deprecates_are_not_needed(monkeypatch):
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        monkeypatch.delattr(dist, name, raising=False)
    spec = importlib.util.spec_from_file_location("group_of_a_newer_torch", group.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module._all_gather is dist.all_gather_single


@pytest.mark.filterwarnings("error")
def test_hydra_composes_without_a_warning():
    """Hydra 1.3 warns if version_base is missing, Hydra 1.4 if it is given."""
    assert compose([]).seed == 0, hydra.__version__
