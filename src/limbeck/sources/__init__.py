"""Sources: endless, resumable streams of samples."""

from limbeck.sources.dataset import Dataset, DatasetStream
from limbeck.sources.generated import Generated

__all__ = ["Dataset", "DatasetStream", "Generated"]
