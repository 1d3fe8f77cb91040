"""Datasets to samples, and the offline demo's own corpus and models."""
