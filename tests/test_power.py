"""Counters of GPUs and of energy: real code on a driver and a kernel interface that are imitated at their edge, and the real CodeCarbon."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tasks.core import hardware, tdp
from tasks.core.power import Energy, Gpu, first_gpu, per_request
from tasks.qlora import FinetuneConfig, can_compile, why_slow

pytestmark = [pytest.mark.fast, pytest.mark.slow]


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


def test_where_energy_is_counted_nothing_is_estimated(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 100_000, 10**9)
    energy = Energy(None, tmp_path)
    package.write_text("8100000\n")
    figures = per_request(energy, energy.joules(), cpu_s=1000.0, device="cpu", requests=4)
    assert figures == {"energy_j_per_request": 2.0, "energy_source": "RAPL", "energy_j_per_request_reason": None}


def test_where_nothing_counts_energy_it_is_estimated_from_cpu_time_and_called_so(tmp_path: Path) -> None:
    energy = Energy(None, tmp_path)
    assert energy.source is None and energy.joules() is None
    short, long = (per_request(energy, None, cpu_s, "cpu", requests=5) for cpu_s in (1.0, 3.0))
    assert short["energy_source"].startswith("estimate (CodeCarbon ") and short["energy_j_per_request_reason"] is None
    assert 0.05 < short["energy_j_per_request"] < 200  # a CPU takes between 0.25 and 1,000 W
    assert long["energy_j_per_request"] == pytest.approx(3 * short["energy_j_per_request"])
    assert "codecarbon" not in sys.modules  # it was asked in another process: memory of this one is measured


def test_of_a_gpu_that_counts_no_energy_the_processors_share_is_not_taken_for_all(tmp_path: Path) -> None:
    figures = per_request(Energy(None, tmp_path), None, 1.0, "cuda", requests=5)
    assert figures["energy_j_per_request"] is figures["energy_source"] is None and "GPU" in figures["energy_j_per_request_reason"]


def test_nor_is_what_rapl_counts(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 100_000, 10**9)
    energy = Energy(None, tmp_path)
    package.write_text("8100000\n")
    figures = per_request(energy, energy.joules(), 1.0, "cuda", requests=4)
    assert figures["energy_j_per_request"] is figures["energy_source"] is None and "NVML" in figures["energy_j_per_request_reason"]


def test_a_gpu_that_stops_counting_gives_no_figure(driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    energy = Energy(Gpu("1"), tmp_path)
    monkeypatch.setattr(energy._gpu, "joules", lambda: None)
    figures = per_request(energy, energy.joules(), 1.0, "cuda", requests=5)
    assert figures["energy_j_per_request"] is figures["energy_source"] is None and figures["energy_j_per_request_reason"]


def test_without_codecarbon_the_reason_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "codecarbon.py").write_text("raise ImportError('No module named codecarbon')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    figures = per_request(Energy(None, tmp_path), None, 1.0, "cpu", requests=5)
    assert figures["energy_j_per_request"] is None and "No module named codecarbon" in figures["energy_j_per_request_reason"]


def test_the_estimate_is_codecarbons_own() -> None:
    """Its meter of a process, beside ours, in a process of their own that computes for a while."""
    code = (
        "import time; from codecarbon.external.hardware import CPU; from tasks.core import tdp\n"
        "ours = tdp._look_up(); theirs = CPU('.', 'cpu_load', ours.name, ours.watts, tracking_mode='process')\n"
        "theirs._get_power_from_cpus(); began, cpu = time.time(), time.process_time()\n"
        "while time.process_time() < cpu + 1: pass\n"
        "print(ours.joules(time.process_time() - cpu), theirs._get_power_from_cpus().W * (time.time() - began))"
    )
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours, theirs = map(float, asked.stdout.split())
    assert ours == pytest.approx(theirs, rel=0.15)  # CodeCarbon reads CPU time in hundredths of a second


def test_codecarbon_is_asked_without_network_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter whose sockets raise, with an empty home and working directory."""
    home, guard = tmp_path / "home", tmp_path / "guard"
    home.mkdir(), guard.mkdir()
    (guard / "sitecustomize.py").write_text(
        "import sys\n"
        "def watch(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'):\n"
        "        raise RuntimeError('network: ' + event)\n"
        "sys.addaudithook(watch)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(guard), str(Path(tdp.__file__).parents[2])]))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(home))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.chdir(home)
    probe = subprocess.run(
        [sys.executable, "-c", "import socket; socket.create_connection(('127.0.0.1', 9))"], capture_output=True, text=True
    )
    assert "network: " in probe.stderr  # the guard works
    assert tdp.ask().watts > 0
    assert not list(home.rglob("*"))


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
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # tests that run side by side have set it to 1
    assert hardware.cores() == 1


@pytest.mark.parametrize(("asked", "cores"), [("2", 2), ("1", 1), ("2,4", 2), ("99", 4), ("0", 1), ("", 4), ("many", 4)])
def test_cores_keep_to_omp_num_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, cores: int) -> None:
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert hardware.cores() == cores


@pytest.mark.parametrize(
    ("bf16", "compiler", "config", "words"),
    [
        (False, True, {}, ["bfloat16"]),
        (False, False, {}, ["compiler", "bfloat16"]),
        (True, False, {"compile": False}, []),
        (False, True, {"precision": "fp32"}, []),  # as was asked for
    ],
)
def test_what_training_would_be_quicker_with_is_said(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, compiler: bool, config: dict[str, Any], words: list[str]
) -> None:
    monkeypatch.setattr(hardware, "gpu", lambda: None)
    monkeypatch.setattr(hardware, "native_bf16", lambda: bf16)
    monkeypatch.setattr(hardware, "lacks_to_compile", lambda: [] if compiler else ["the C++ compiler g++"])
    said = why_slow(FinetuneConfig(**config))
    assert len(said) == len(words) and all(word in line for word, line in zip(words, said, strict=True))


@pytest.mark.parametrize(
    ("there", "cxx", "lacks"),
    [
        (["g++", "Python.h"], None, []),
        (["c++", "Python.h"], None, ["g++"]),  # torch does not ask for the compiler by its other name
        (["g++"], None, ["Python.h"]),
        ([], None, ["g++", "Python.h"]),
        (["g++", "Python.h"], "clang++", ["clang++"]),
        (["clang++", "Python.h"], "clang++", []),
    ],
)
def test_what_torch_compile_needs_is_looked_for_where_torch_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[str], cxx: str | None, lacks: list[str]
) -> None:
    for name in there:
        (tmp_path / name).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CXX", cxx) if cxx else monkeypatch.delenv("CXX", raising=False)
    found = hardware.lacks_to_compile()
    assert len(found) == len(lacks) and all(name in said for name, said in zip(lacks, found, strict=True))
    assert can_compile() == (not lacks)


@pytest.mark.parametrize(
    ("visible", "found"),
    [(None, "A100"), ("", None), ("-1", None), ("1", "T4"), ("1,0", "T4"), ("GPU-bb", "T4"), ("MIG-cc33", "A100"), ("7", None)],
)
def test_the_gpu_a_measurement_is_known_by_is_the_one_cuda_may_see(
    visible: str | None, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bus, name, uuid in (("0000:01:00.0", "A100", "GPU-aa11"), ("0000:02:00.0", "T4", "GPU-bb22")):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text(f"Model: \t\t {name}\nGPU UUID: \t {uuid}\nBus Location: \t {bus}\n")
    monkeypatch.setattr(hardware, "NVIDIA", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.gpu.__wrapped__() == found
