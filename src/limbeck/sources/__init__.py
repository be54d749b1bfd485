"""Sources: endless, resumable streams of samples."""

from limbeck.sources.dataset import Dataset, DatasetStream

__all__ = ["Dataset", "DatasetStream"]
