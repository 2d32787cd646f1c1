"""What a number was measured with: machine, threads and versions, for the head of every table."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

__all__ = ["describe"]


def describe() -> dict[str, str]:
    """Processor, cores, threads, load and versions, {word: value}."""
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "load before": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": sys.version.split()[0],
        "torch": str(torch.__version__),
    }


def _processor() -> str:
    """The processor's own name; platform.processor() is empty on Linux."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
