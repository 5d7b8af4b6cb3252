"""Fleetmind: the GPUs and CPUs you own, as one self-running AI service."""

__version__ = "0.1.0"

__all__ = ["__version__"]
