"""Counters of GPUs and of energy: real code on a driver and a kernel interface that are imitated at their edge."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tasks.core import hardware
from tasks.core.power import Energy, Gpu, first_gpu

pytestmark = pytest.mark.fast


class NVMLError(Exception):
    pass


class Driver(types.ModuleType):
    """NVML with two devices, of which only the second counts energy."""

    NVMLError = NVMLError

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.millijoules = 5_000
        self.mine: int | None = 700_000_000

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index > 1:
            raise NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> int:
        return {"GPU-b": 1}[name]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        others = types.SimpleNamespace(pid=1, usedGpuMemory=9_000_000_000)
        return [others, types.SimpleNamespace(pid=os.getpid(), usedGpuMemory=self.mine)]

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return types.SimpleNamespace(gpu=40)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if handle == 0:
            raise NVMLError("Not Supported")
        return self.millijoules


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    module = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def zone(powercap: Path, name: str, label: str, microjoules: int, wraps_at: int = 1_000_000) -> Path:
    folder = powercap / name
    folder.mkdir(parents=True)
    for file, text in (("name", label), ("energy_uj", str(microjoules)), ("max_energy_range_uj", str(wraps_at - 1))):
        (folder / file).write_text(f"{text}\n")
    return folder / "energy_uj"


def test_only_what_this_process_holds_counts(driver: Driver) -> None:
    gpu = Gpu()
    assert gpu.memory_mb() == 700 and gpu.utilization() == 0.4
    driver.mine = None  # in a container the driver does not tell
    assert gpu.memory_mb() is None


def test_the_device_is_the_one_that_cuda_shows_first(driver: Driver) -> None:
    assert Gpu("1,0").joules() == Gpu("GPU-b").joules() == 5.0
    assert Gpu("0").joules() is None  # does not count energy
    with pytest.raises(OSError, match="Invalid Argument"):
        Gpu("7")


@pytest.mark.skipif(hardware.gpu() is not None, reason="this machine has one")
def test_without_a_gpu_there_is_none_and_nothing_breaks() -> None:
    assert first_gpu("cpu") is None
    assert first_gpu("cuda") is None  # a machine whose driver is missing: the real NVML says so


def test_energy_of_gpu_and_processors_is_added_over_counters_that_wrap(driver: Driver, tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 1)  # a part of the package: it is counted already
    energy = Energy(Gpu("1"), tmp_path)
    package.write_text("400000\n")
    driver.millijoules += 2_500
    assert energy.source == "NVML + RAPL" and energy.joules() == pytest.approx(3.0)
    package.write_text("500000\n")
    assert energy.joules() == pytest.approx(3.1)


def test_where_nothing_counts_energy_there_is_no_figure(tmp_path: Path) -> None:
    energy = Energy(None, tmp_path)
    assert energy.source is None and energy.joules() is None


@pytest.mark.parametrize(("files", "cores"), [
    ({"cpu.max": "max 100000"}, None),
    ({"cpu.max": "200000 100000"}, 2),
    ({"cpu.max": "150000 100000"}, 2),
    ({"cpu.max": "20000 100000"}, 1),
    ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ({}, None),
])  # fmt: skip
def test_a_container_has_as_many_cores_as_its_quota_of_time(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert hardware.quota_of(tmp_path) == cores


def test_cores_keep_to_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000")
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    assert hardware.cores() == 1
