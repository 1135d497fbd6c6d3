"""NVML: the energy counter, or else the power, of an NVIDIA card."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

from hesper.meters.meter import Availability, MeterLost, Quantity, Reading, Scope

__all__ = ["Nvml"]


class Nvml:
    """One card, through the package ``nvidia-ml-py``; ``library`` stands in for its module ``pynvml``.

    ``card`` is its UUID (``GPU-...``) or NVML's number, which counts by PCI bus and need not be CUDA's.

    On Jetson boards NVML starts and finds a device, but every query is refused; so only a reading proves that it works.
    """

    name = "nvml"
    scope: Scope = "gpu"
    period = 0.05  # the counter moves every 20 to 100 ms

    def __init__(self, card: str | int = 0, library: Any = None) -> None:
        self._card, self._library = card, library
        self._handle: Any = None
        self._started = 0
        self.quantity: Quantity = "joules"

    def probe(self) -> Availability:
        """Open the card and read it once."""
        try:
            self.read()
        except MeterLost as error:
            return Availability(self.name, False, str(error).rstrip("."), self.scope)
        read = "energy counter" if self.quantity == "joules" else "power"
        return Availability(self.name, True, f"{read} of {self._named()}", self.scope)

    def read(self) -> Reading:
        """Joules since it was opened, or watts for cards without a counter."""
        if self._handle is None:
            self._open()
        try:
            if self.quantity == "joules":
                return Reading((self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle) - self._started) / 1000)
            return Reading(self._library.nvmlDeviceGetPowerUsage(self._handle) / 1000)
        except self._library.NVMLError as error:
            raise MeterLost(f"NVML no longer reads card {self._card}: {error}.") from error

    def close(self) -> None:
        """Let go of NVML."""
        if self._handle is not None:
            self._handle = None
            with contextlib.suppress(self._library.NVMLError):
                self._library.nvmlShutdown()

    def _open(self) -> None:
        if self._library is None:
            try:
                self._library = importlib.import_module("pynvml")
            except ImportError:
                raise MeterLost("the package nvidia-ml-py is not installed; 'pip install nvidia-ml-py' adds it.") from None
        library = self._library
        try:
            library.nvmlInit()
        except library.NVMLError as error:
            raise MeterLost(f"NVML cannot be started: {error}.") from error
        try:
            by_name = isinstance(self._card, str)
            handle = (library.nvmlDeviceGetHandleByUUID if by_name else library.nvmlDeviceGetHandleByIndex)(self._card)
        except library.NVMLError as error:
            library.nvmlShutdown()
            raise MeterLost(f"NVML finds no card {self._card}: {error}.") from error
        try:
            self._started, self.quantity = library.nvmlDeviceGetTotalEnergyConsumption(handle), "joules"
        except library.NVMLError:
            try:
                library.nvmlDeviceGetPowerUsage(handle)
            except library.NVMLError as error:
                library.nvmlShutdown()
                raise MeterLost(f"NVML finds card {self._card}, but reads neither its energy nor its power: {error}.") from error
            self.quantity = "watts"
        self._handle = handle

    def _named(self) -> str:
        name = self._library.nvmlDeviceGetName(self._handle)
        return name.decode() if isinstance(name, bytes) else str(name)
