"""Samples (images, a question, answers) from any source, and their way into a model."""

from dyvte.data.sources import Sample, encode, load_samples

__all__ = ["Sample", "encode", "load_samples"]
