"""Targets + base → one model: tensors streamed through a method, never whole models in memory."""
