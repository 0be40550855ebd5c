"""Counters of a GPU (NVML) and of the processor's energy (RAPL), read where the machine has them; else CodeCarbon's estimate."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.core import tdp

POWERCAP = Path("/sys/class/powercap")


class Gpu:
    """The GPU that PyTorch calls `cuda:0`, through NVML.

    Raises:
        OSError: there is no driver, no NVML, or no such device.
    """

    def __init__(self, visible: str = "") -> None:
        try:
            import pynvml
        except ImportError as error:
            raise OSError(f"NVML's Python package is missing: {error}") from None
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            first = visible.split(",")[0].strip()
            by_name = first and not first.isdigit()
            self._handle = (
                pynvml.nvmlDeviceGetHandleByUUID(first) if by_name else pynvml.nvmlDeviceGetHandleByIndex(int(first) if first else 0)
            )
        except pynvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from None

    def memory_mb(self) -> float | None:
        """What this process holds on the device, its CUDA context included; None where the driver does not tell (in containers)."""
        try:
            running = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except self._nvml.NVMLError:
            return None
        used = [process.usedGpuMemory for process in running if process.pid == os.getpid() and process.usedGpuMemory is not None]
        return sum(used) / 1e6 if used else None

    def utilization(self) -> float | None:
        """Share of the time in which a kernel ran, over the driver's last sampling period."""
        return self._ask(lambda: self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100)

    def joules(self) -> float | None:
        """Energy since the driver was loaded; None for devices that do not count it."""
        return self._ask(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000)

    def _ask(self, question: Any) -> float | None:
        try:
            return float(question())
        except self._nvml.NVMLError:
            return None


def first_gpu(device: str, visible: str = "") -> Gpu | None:
    """The GPU a model on `device` runs on; None for a CPU, or where NVML does not answer."""
    if device != "cuda":
        return None
    try:
        return Gpu(visible)
    except OSError:
        return None


@dataclass
class _Domain:
    file: Path
    wraps_at: int
    last: int
    total: int = 0


class Energy:
    """Joules used from now on: of the GPU, where there is one that counts them, and of the processors by RAPL, where it can be read.

    Processors count all that they do, not only this process: other programs' work is in the figure.

    Attributes:
        source: what is counted, such as `NVML + RAPL`; None where nothing is.
    """

    def __init__(self, gpu: Gpu | None = None, powercap: Path = POWERCAP) -> None:
        self._gpu = gpu if gpu and gpu.joules() is not None else None
        self._gpu_before = self._gpu.joules() if self._gpu else None
        self._domains = [domain for zone in sorted(powercap.glob("intel-rapl:*")) if (domain := _domain(zone))]
        names = ["NVML"] * bool(self._gpu) + ["RAPL"] * bool(self._domains)
        self.source = " + ".join(names) or None

    def joules(self) -> float | None:
        """Since the beginning; call it more often than every few minutes, since RAPL's counters wrap."""
        if not self.source:
            return None
        for domain in self._domains:
            now = int(domain.file.read_text())
            domain.total += (now - domain.last) % domain.wraps_at
            domain.last = now
        now_on_gpu = self._gpu.joules() if self._gpu else 0.0
        if now_on_gpu is None:
            return None
        return now_on_gpu - (self._gpu_before or 0.0) + sum(domain.total for domain in self._domains) / 1e6


def per_request(energy: Energy, joules: float | None, cpu_s: float, device: str, requests: int) -> dict[str, Any]:
    """What one of `requests` used. Where nothing counts energy this starts a process: call it when all else is measured.

    Args:
        joules: what `energy` counted meanwhile.
        cpu_s: CPU time of this process meanwhile, seconds of all its threads together.
        device: where the model ran. The estimate knows the processor only, so for `cuda` there is none.

    Returns:
        `energy_j_per_request`, `energy_source` (one that begins with `estimate` was not measured), and why there is neither.
    """
    reason = None
    source = energy.source
    if device == "cuda" and (joules is None or not (source or "").startswith("NVML")):  # what the processors used is not what the GPU did
        joules = source = None
        reason = "the GPU's energy counter (NVML) cannot be read, and CodeCarbon's estimate does not know the GPU"
    elif joules is None:
        try:
            processor = tdp.ask()
            source, joules = processor.source, processor.joules(cpu_s)
        except OSError as error:
            source, reason = None, f"this machine's energy counters (RAPL, NVML) cannot be read; {error}"
    return {
        "energy_j_per_request": None if joules is None else joules / requests,
        "energy_source": source,
        "energy_j_per_request_reason": reason,
    }


def _domain(zone: Path) -> _Domain | None:
    """A processor package's counter, microjoules; None for parts of one, and where only root may read it."""
    try:
        if not (zone / "name").read_text().startswith("package"):
            return None
        return _Domain(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text()) + 1, int((zone / "energy_uj").read_text()))
    except OSError:
        return None
