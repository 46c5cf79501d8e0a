"""The activations that are known, by the names of their classes and functions."""

from __future__ import annotations

from torch import nn

HIDDEN = {
    *("ReLU", "ReLU6", "LeakyReLU", "RReLU", "ELU", "CELU", "SELU", "Softplus", "GELU", "GELUTanh"),
    *("QuickGELU", "SiLU", "Swish", "SwishMe", "Hardswish", "HardSwish", "HardSwishMe", "Mish", "MishMe"),
    *("HardMish", "HardMishMe", "LWTA"),
}
"""Classes that a hidden layer ends in: torch's, timm's, and others' of these names."""

GATES = {"Sigmoid", "Hardsigmoid", "HardSigmoid", "HardSigmoidMe", "Tanh", "Hardtanh", "Softmax", "Softmax2d"}
"""Classes whose result is a share, a weight or a bounded output."""

PARAMETRIC = {"PReLU", "StarReLU", "TLU"}
"""Classes with parameters of their own."""

FUNCTIONS = {
    **{name: name for name in ("relu", "relu6", "leaky_relu", "rrelu", "elu", "celu", "selu", "softplus")},
    **{name: name for name in ("gelu", "silu", "hardswish", "mish")},
    **{name: name[:-1] for name in ("relu_", "leaky_relu_", "rrelu_", "elu_", "celu_", "selu_")},
}
"""Torch functions that hidden layers end in, and the name each goes by."""


def kind_of(module: nn.Module) -> str:
    """Name the activation that a module is, if it is one.

    >>> kind_of(nn.ReLU6()), kind_of(nn.Linear(1, 1))
    ('ReLU6', '')
    """
    names = (kind.__name__ for kind in type(module).__mro__)
    return next((name for name in names if name in HIDDEN | GATES | PARAMETRIC), "")
