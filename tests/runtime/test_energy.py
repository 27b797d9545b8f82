"""Counters of energy: RAPL's files, and NVML in place of which stands a module of the test."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from alexnet_ddp.runtime import energy


def zone(folder: Path, number: str, name: str, counts: int) -> Path:
    place = folder / f"intel-rapl:{number}"
    place.mkdir(parents=True)
    (place / "name").write_text(f"{name}\n")
    (place / "max_energy_range_uj").write_text("1000000\n")
    (place / "energy_uj").write_text(f"{counts}\n")
    return place / "energy_uj"


def test_the_packages_of_a_machine_are_added_and_begin_again_at_their_limit(tmp_path):
    first, second = (zone(tmp_path, str(k), f"package-{k}", 900_000) for k in range(2))
    zone(tmp_path, "0:0", "core", 5)  # a part of package 0
    zone(tmp_path, "2", "psys", 5)
    counters = energy.cpu_counters(tmp_path)
    assert len(counters) == 2
    first.write_text("950000\n")
    second.write_text("100000\n")
    assert sum(one.used() for one in counters) == pytest.approx(0.05 + 0.2)
    assert sum(one.used() for one in counters) == 0


def test_without_a_readable_counter_there_is_none(tmp_path):
    assert energy.cpu_counters(tmp_path) == []
    zone(tmp_path, "0", "package-0", 5)
    zone(tmp_path, "1", "package-1", 5).unlink()
    assert energy.cpu_counters(tmp_path) == []


class NVMLError(Exception):
    pass


def fake_nvml(monkeypatch: pytest.MonkeyPatch, read) -> None:
    nvml = ModuleType("pynvml")
    nvml.NVMLError, nvml.nvmlInit = NVMLError, lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    nvml.nvmlDeviceGetTotalEnergyConsumption = read
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(energy, "find_spec", lambda name: nvml)
    properties = SimpleNamespace(uuid="ab-cd")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_a_gpus_counter_is_found_by_its_uuid(monkeypatch):
    counts, asked = [5000, 8000], []

    def read(handle):
        asked.append(handle)
        return counts.pop(0)

    fake_nvml(monkeypatch, read)
    (counter,) = energy.gpu_counters(torch.device("cuda", 0))
    assert counter.used() == 3.0
    assert asked == ["GPU-ab-cd"] * 2


def test_a_gpu_without_a_counter_has_none(monkeypatch):
    def read(handle):
        raise NVMLError("not supported")

    fake_nvml(monkeypatch, read)
    assert energy.gpu_counters(torch.device("cuda", 0)) == []


def test_a_gpus_counter_that_fails_later_raises_oserror(monkeypatch):
    answers = [5000]

    def read(handle):
        if not answers:
            raise NVMLError("GPU is lost")
        return answers.pop()

    fake_nvml(monkeypatch, read)
    (counter,) = energy.gpu_counters(torch.device("cuda", 0))
    with pytest.raises(OSError, match="NVML: GPU is lost"):
        counter.used()
