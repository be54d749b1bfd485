"""Sources: endless, resumable streams of samples."""

from limbeck.sources.critic import Critic
from limbeck.sources.dataset import Dataset, DatasetStream
from limbeck.sources.generated import Generated
from limbeck.sources.mixture import Mixture
from limbeck.sources.rollouts import Rollouts
from limbeck.sources.stages import Stages
from limbeck.sources.vllm import VLLMSpeaker

__all__ = [
    "Critic",
    "Dataset",
    "DatasetStream",
    "Generated",
    "Mixture",
    "Rollouts",
    "Stages",
    "VLLMSpeaker",
]
