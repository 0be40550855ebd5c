"""CodeCarbon's estimate of what the processor uses, for machines whose counters of energy cannot be read.

CodeCarbon looks the processor's name up in its table of thermal design powers (TDP), and takes 4 W for each CPU of one that it does
not know. What a process used is then its CPU time, as a share of that of all CPUs, of the TDP (`tracking_mode="process"`:
`CPU._get_power_from_cpu_load` in `codecarbon/external/hardware.py`). Nothing is fetched or written, and no tracker is started.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

WITHIN_S = 120


@dataclass(frozen=True)
class Processor:
    """What CodeCarbon takes this machine's processors for.

    Attributes:
        watts: of all of them together when all CPUs are busy.
        cpus: logical ones.
    """

    name: str
    watts: float
    cpus: int
    version: str

    @property
    def source(self) -> str:
        """Whose figure it is and what it follows from."""
        return f"estimate (CodeCarbon {self.version}: {self.watts:g} W for all {self.cpus} CPUs of {self.name}, by CPU time)"

    def joules(self, cpu_s: float) -> float:
        """Of a process that computed for `cpu_s`, seconds of all its threads together."""
        return self.watts * cpu_s / self.cpus


def ask() -> Processor:
    """Ask CodeCarbon, in a process of its own (about 1 s of one core): it imports pandas, and the one that asks measures its memory.

    Raises:
        OSError: it is not installed or knows nothing of this machine.
    """
    try:
        asked = subprocess.run([sys.executable, "-m", __name__], capture_output=True, text=True, timeout=WITHIN_S)
    except subprocess.TimeoutExpired:
        raise OSError(f"CodeCarbon did not answer within {WITHIN_S} s") from None
    if asked.returncode:
        raise OSError(f"CodeCarbon cannot be asked: {(asked.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return Processor(**json.loads(asked.stdout.splitlines()[-1]))


def _look_up() -> Processor:
    import logging
    from importlib import metadata

    from codecarbon.core.cpu import TDP
    from codecarbon.core.util import count_cpus, count_physical_cpus

    logging.getLogger("codecarbon").setLevel(logging.ERROR)  # it warns of what the source says anyway
    found = TDP()
    if not found.tdp:
        raise OSError(f"CodeCarbon has no power of {found.model}")
    # CodeCarbon multiplies by sockets, too (`set_CPU_tracking` in codecarbon/core/resource_tracker.py).
    return Processor(found.model, float(found.tdp * count_physical_cpus()), count_cpus(), metadata.version("codecarbon"))


if __name__ == "__main__":
    print(json.dumps(_look_up().__dict__))
