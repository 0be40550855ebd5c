"""Facts about the machine: what it is, what it can do, how much memory a process takes."""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import platform
import shutil
import sysconfig
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from tasks.core import settings

CGROUP = Path("/sys/fs/cgroup")
# What speeds depend on, as Linux calls it.
INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL = 1 << 20  # bytes: with less, neither a database nor a stage gets on, whatever its error says
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "optimum",
    "gptqmodel",
    "llama-cpp-python",
    "gguf",
    "prefect",
    "mlflow",
)


def disk_is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < FULL
    except OSError:  # gone: what happened to it says another error
        return False


def says_full(error: BaseException | None) -> bool:
    """Whether an error is that of a full disk, a quota or a limit on the size of files, or was raised because of one."""
    while error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return True
        error = error.__cause__ or error.__context__
    return False


@functools.cache
def _cpuinfo() -> tuple[str, ...]:
    """What Linux says of the processors, line by line; nothing elsewhere."""
    try:
        return tuple(Path("/proc/cpuinfo").read_text().splitlines())
    except OSError:
        return ()


def cpu_model() -> str:
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def cpu_flags() -> frozenset[str]:
    return frozenset(next((line.partition(":")[2].split() for line in _cpuinfo() if line.startswith(("flags", "Features"))), []))


def cores() -> int:
    """Cores this process may use: in a container often fewer than the machine has, by its affinity or by its quota of time.

    OMP_NUM_THREADS lowers that, for those who share a machine; llama.cpp, torch and what is forked keep to it alike.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, quota_of(CGROUP) or allowed, settings.asked_threads() or allowed)


def quota_of(cgroup: Path) -> int | None:
    """Cores' worth of time that a control group may use, rounded up (`cpu.max` of version 2, `cpu.cfs_*` of version 1); None: no limit.

    More threads than that wait for each other while the kernel keeps some of them from running.
    """
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if quota == "max" or int(quota) <= 0 else max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        return None


def native_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 itself; where it does not, bf16 training is slower than fp32."""
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())


def native_int8() -> bool:
    """Whether the CPU multiplies and sums 8-bit integers in one instruction, twice as many of them as bfloat16."""
    return bool({"avx512_vnni", "avx_vnni", "amx_int8"} & cpu_flags())


def has_amx() -> bool:
    """Whether the CPU multiplies whole tiles of bfloat16 or 8-bit integers at once."""
    return {"amx_bf16", "amx_int8"} <= cpu_flags()


def lacks_to_compile() -> list[str]:
    """What torch.compile needs on a CPU and would not find here, each with Debian's package of it.

    Looked for where torch does (torch/_inductor/cpp_builder.py; what codecache.py has compiled includes Python.h): a compiler that is
    called `c++` only is none to it.
    """
    compiler, header = settings.cpp_compiler(), Path(sysconfig.get_path("include"), "Python.h")
    lacks = [] if shutil.which(compiler) else [f"the C++ compiler {compiler} (Debian's package g++, or set CXX)"]
    version = ".".join(platform.python_version_tuple()[:2])
    return lacks if header.is_file() else [*lacks, f"{header} (Debian's package python{version}-dev)"]


def cpu_generation() -> str:
    """Family and model: virtual machines call very different processors by one name."""
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in _cpuinfo()[:40])}
    return "/".join(facts[name] for name in ("cpu family", "model", "stepping") if name in facts)


NVIDIA = Path("/proc/driver/nvidia/gpus")


@functools.cache
def gpu() -> str | None:
    """Name of the first CUDA device that this process may see, or None. Looks at the driver's files, so that torch need not be imported.

    They are in the order of the PCI bus; CUDA's is another where the fastest device is not the first, unless `CUDA_DEVICE_ORDER` says PCI_BUS_ID.
    """
    files = sorted(NVIDIA.glob("*/information"))
    devices = [{k.strip(): v.strip() for k, _, v in (line.partition(":") for line in file.read_text().splitlines())} for file in files]
    if (visible := settings.visible_gpus()) is not None:
        first = visible.split(",")[0].strip()
        if not first or first.lstrip("-").isdigit():
            devices = devices[int(first) : int(first) + 1] if first.isdigit() else []
        else:  # a UUID, or its beginning; that of a part of a GPU (MIG) is in none of these files
            devices = [device for device in devices if device.get("GPU UUID", "").startswith(first)] or devices
    return devices[0].get("Model") if devices else None


def hardware_class() -> str:
    """What two measurements must share to be comparable; part of the key of every measurement."""
    return f"{cpu_model()} {cpu_generation()}|{cores()} cores|{gpu() or 'no GPU'}"


def versions(libraries: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Installed versions by name; `missing` for one that is not there."""
    return {name: _version(name) for name in libraries}


@functools.cache  # each look reads and parses the package's whole description, and every stage asks
def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "missing"


def machine() -> str:
    """This machine in a few words."""
    return ", ".join(filter(None, [cpu_model(), f"{cores()} cores", gpu()]))


def environment() -> dict[str, Any]:
    """The `environment` of a report."""
    found = gpu()
    return {
        "cpu": cpu_model(),
        "instructions": " ".join(flag for flag in INSTRUCTIONS if flag in cpu_flags()),
        "cores": cores(),
        "ram_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": found,
        **({} if found else {"gpu_reason": "there is none"}),
        "python": platform.python_version(),
        "packages": versions(),
    }


def memory_mb() -> dict[str, float]:
    """Resident, proportional and private memory of this process and its children, MB."""
    own = psutil.Process()
    found = [own.memory_full_info()]
    for child in own.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            found.append(child.memory_full_info())
    return {
        "rss_mb": sum(memory.rss for memory in found) / 1e6,
        "pss_mb": sum(getattr(memory, "pss", memory.rss) for memory in found) / 1e6,
        "private_mb": sum(memory.uss for memory in found) / 1e6,
    }


def peak_rss_mb() -> float:
    """Largest resident set this process ever had, MB. VmHWM, since ru_maxrss starts at the size of the process that forked it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024 / 1e6
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _used(process: psutil.Process) -> float:
    """Seconds of processor time of a process and of its children that have ended; 0 if it has ended itself."""
    try:
        used = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(used.user + used.system + getattr(used, "children_user", 0.0) + getattr(used, "children_system", 0.0))


class Disturbance:
    """How much the processor does for others from now on: other programs here, and other machines on the same host.

    A measurement beside them is slower than the machine. Where a container shows its host's counters, others are the host's.
    """

    def __init__(self) -> None:
        self._before = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float, float]:
        """Seconds: wall clock, busy on all cores, stolen by the hypervisor, and this process's own with its children's."""
        times, own = psutil.cpu_times(), psutil.Process()
        busy = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
        mine = sum(_used(process) for process in (own, *own.children(recursive=True)))
        return time.monotonic(), busy, getattr(times, "steal", 0.0), mine

    def cores(self) -> dict[str, float]:
        """`others_cores` and `stolen_cores`: how many cores on average were busy for others since the beginning."""
        wall, busy, stolen, mine = (now - before for now, before in zip(self._read(), self._before, strict=True))
        wall = max(wall, 1e-3)
        return {"others_cores": round(max(busy - mine, 0.0) / wall, 3), "stolen_cores": round(stolen / wall, 3)}
