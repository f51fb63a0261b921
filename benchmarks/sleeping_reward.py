"""A reward that costs time and nothing else, to be served: what a large model on its own device
looks like from the trainer."""

import time
from collections.abc import Mapping, Sequence

from torch import Tensor


class Sleeping:
    """Mean of the image, after ``seconds_per_image`` for each."""

    def __init__(self, seconds_per_image: float = 0.0, batch_size: int = 64) -> None:
        self.seconds_per_image, self.batch_size = seconds_per_image, batch_size

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        del metadata
        time.sleep(self.seconds_per_image * len(prompts))
        return images_N3HW.mean(dim=(1, 2, 3))
