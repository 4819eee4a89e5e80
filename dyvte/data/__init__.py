"""Samples (images, a question, answers) from any source, and their way into a model."""

from dyvte.data.config import read_config
from dyvte.data.encode import GREEDY, encode
from dyvte.data.errors import SampleError, TooManyErrors
from dyvte.data.fingerprints import DatasetDigest, dataset_digest, fingerprint, first_bits, image_digest, sample_digest
from dyvte.data.reading import Readable
from dyvte.data.samples import Sample, batches
from dyvte.data.sources import load_samples

__all__ = [
    "DatasetDigest",
    "GREEDY",
    "Readable",
    "Sample",
    "SampleError",
    "TooManyErrors",
    "batches",
    "dataset_digest",
    "encode",
    "fingerprint",
    "first_bits",
    "image_digest",
    "load_samples",
    "read_config",
    "sample_digest",
]
