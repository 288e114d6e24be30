"""Which GPU, driver and libraries figures come from, and at which power limit and clocks."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from typing import Any

import torch

# Distribution: how it is called where versions are listed.
LIBRARIES = ("smalt", "triton", "numpy", "liger-kernel", "flash-attn", "apex")
# Query of nvidia-smi: our name, and the unit that it is in.
_QUERY = {
    "driver_version": "driver",
    "power.limit": "power_limit_w",
    "power.draw": "power_w",
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.sm": "max_sm_mhz",
    "clocks.max.mem": "max_memory_mhz",
    "temperature.gpu": "temperature_c",
}
NOW = ("power_w", "sm_mhz", "memory_mhz", "temperature_c")  # what changes from moment to moment


def versions() -> dict[str, str | None]:
    """Versions of what figures depend on; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    found["cuda"] = torch.version.cuda or torch.version.hip
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


class Machine:
    """One GPU, asked through nvidia-ml-py, else nvidia-smi, else not at all: then its figures are None, and ``source`` says so."""

    def __init__(self, gpu: str, uuid: str | None):
        self.gpu = gpu
        self._uuid = uuid if uuid is None or uuid.startswith("GPU-") else f"GPU-{uuid}"
        self.source, self._read = self._find()

    @classmethod
    def current(cls) -> Machine:
        """Of the current CUDA device, by its UUID: CUDA_VISIBLE_DEVICES renumbers devices."""
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        uuid = getattr(properties, "uuid", None)
        return cls(properties.name, None if uuid is None else str(uuid))

    def state(self) -> dict[str, Any]:
        """Everything that is known, as JSON holds it."""
        return {"gpu": self.gpu, "source": self.source, **self._all()}

    def now(self) -> dict[str, Any]:
        """Power, clocks and temperature at this moment."""
        found = self._all()
        return {name: found[name] for name in NOW}

    def _all(self) -> dict[str, Any]:
        return dict.fromkeys(_QUERY.values()) | self._read()

    def _find(self) -> tuple[str, Callable[[], dict[str, Any]]]:
        reasons = []
        for name, read in (("nvidia-ml-py", self._nvml), ("nvidia-smi", self._smi)):
            try:
                read()
                return name, read
            except Exception as error:
                reasons.append(f"{name}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}")
        return f"none ({'; '.join(reasons)})", dict

    def _nvml(self) -> dict[str, Any]:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(self._uuid) if self._uuid else pynvml.nvmlDeviceGetHandleByIndex(0)
        driver = pynvml.nvmlSystemGetDriverVersion()
        clock, most = pynvml.nvmlDeviceGetClockInfo, pynvml.nvmlDeviceGetMaxClockInfo
        return {
            "driver": driver.decode() if isinstance(driver, bytes) else driver,
            "power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "sm_mhz": clock(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": clock(handle, pynvml.NVML_CLOCK_MEM),
            "max_sm_mhz": most(handle, pynvml.NVML_CLOCK_SM),
            "max_memory_mhz": most(handle, pynvml.NVML_CLOCK_MEM),
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        }

    def _smi(self) -> dict[str, Any]:
        command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
        command += ["-i", self._uuid] if self._uuid else ["-i", "0"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        if done.returncode:
            raise RuntimeError(done.stderr or done.stdout or f"ended with {done.returncode}")
        return parse_smi(done.stdout)


def parse_smi(text: str) -> dict[str, Any]:
    """A line of nvidia-smi's CSV: numbers, None where it has none ([N/A]), and the driver's version as it is."""
    cells = [cell.strip() for cell in text.strip().splitlines()[0].split(",")]
    found: dict[str, Any] = {}
    for name, cell in zip(_QUERY.values(), cells, strict=True):
        try:
            found[name] = cell if name == "driver" else float(cell)
        except ValueError:
            found[name] = None
    return found
