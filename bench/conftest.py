"""What every benchmark records beside its times: the machine and the versions that they were taken with."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def pytest_benchmark_update_machine_info(config, machine_info):
    kept = {key: machine_info[key] for key in ("machine", "system", "python_version") if key in machine_info}
    machine_info.clear()
    machine_info.update(kept)
    machine_info["cpu"] = {
        "name": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }
    machine_info["torch"] = torch.__version__
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None


def pytest_benchmark_update_commit_info(config, commit_info):
    for key in ("author_time", "project", "branch"):
        commit_info.pop(key, None)
