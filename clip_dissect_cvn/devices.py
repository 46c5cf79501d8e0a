"""Which device to compute on."""

from __future__ import annotations

import torch

from .errors import ArgumentError, DeviceError


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`: ``cpu``, ``cuda[:N]``, ``mps``, or ``auto``: CUDA if there is any.

    Raises DeviceError when this machine has no such device, ArgumentError when `name` is not a device.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArgumentError(f"device is {name!r}, which is none of auto, cpu, cuda, cuda:N, mps.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here. "
            "Use device 'cpu', or install a torch build with CUDA support and check the driver."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device is 'mps', but torch finds no Apple GPU here. Use device 'cpu'.")
    return device
