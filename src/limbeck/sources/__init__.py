"""Sources: endless, resumable streams of samples."""

from limbeck.sources.dataset import Dataset, DatasetStream
from limbeck.sources.generated import Generated
from limbeck.sources.rollouts import Rollouts

__all__ = ["Dataset", "DatasetStream", "Generated", "Rollouts"]
