"""Competitive Vision Networks for CLIP-Dissect."""

from ._version import __version__ as __version__
