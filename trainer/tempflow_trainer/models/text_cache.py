"""Encoded prompts, kept in host memory: a prompt of many epochs is encoded once.

Text encoders are as large as the network that is trained, and work for a moment an epoch: with the
cache they live in host memory, and visit the device for prompts that are new.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tempflow_trainer.models.base import Conditioning, FlowModel


class TextCache:
    """The encoded prompts of one model with one length, least recently used first.

    A prompt is encoded alone, so that its tensors do not depend on which prompts were new with it:
    a run that continues computes what the whole one did.
    """

    def __init__(self, model: FlowModel, *, device: torch.device, most_bytes: int) -> None:
        """``most_bytes`` bounds what is kept from one call to the next."""
        self._model, self._device, self._most = model, device, most_bytes
        self._rows: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._bytes = 0
        self._leave()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """One row a prompt, on the device."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        if new:
            with self._encoders_on_device():
                for prompt in new:
                    self._keep(prompt, self._model.encode([prompt]).tensors)
        rows = [self._rows[prompt] for prompt in prompts]
        for prompt in dict.fromkeys(prompts):
            self._rows.move_to_end(prompt)
        self._forget()
        return Conditioning(
            {name: torch.cat([row[name] for row in rows]).to(self._device) for name in rows[0]}
        )

    def _keep(self, prompt: str, tensors: dict[str, Tensor]) -> None:
        self._rows[prompt] = {name: tensor.cpu() for name, tensor in tensors.items()}
        self._bytes += _size(self._rows[prompt])

    def _forget(self) -> None:
        while self._bytes > self._most and self._rows:
            _, oldest = self._rows.popitem(last=False)
            self._bytes -= _size(oldest)

    @contextmanager
    def _encoders_on_device(self) -> Iterator[None]:
        for encoder in self._model.text_encoders():
            encoder.to(self._device)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        for encoder in self._model.text_encoders():
            encoder.to("cpu")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # else the allocator keeps the room for itself


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
