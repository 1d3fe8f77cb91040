"""Fuses several language models into one."""

__version__ = "0.1.0"
