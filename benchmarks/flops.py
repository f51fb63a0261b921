"""Floating-point operations of one forward of a transformer, from its configuration.

Two operations a multiply-add; projections and attention, not norms and activations. A block of
width d has 12 d^2 weights a token of each stream: 4 of attention, 8 of the feed-forward.
"""

from typing import Any

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "B200": 2250.0, "A100": 312.0, "L40S": 362.0}
"""Dense bfloat16 by the name of the device, from the vendor's data sheets."""


def sd3(config: Any, pixels: int, text_tokens: int) -> float:
    """SD3.5 Medium: blocks of two streams, some with a second attention of the image alone; the
    last one has no output of the text."""
    d, layers = config.num_attention_heads * config.attention_head_dim, config.num_layers
    image = (pixels // (8 * config.patch_size)) ** 2
    both, second = image + text_tokens, len(config.dual_attention_layers)
    linear = 2 * image * (12 * layers + 4 * second) * d**2
    linear += 2 * text_tokens * (12 * (layers - 1) + 3) * d**2
    return float(linear + 4 * both**2 * d * layers + 4 * image**2 * d * second)


def flux(config: Any, pixels: int, text_tokens: int) -> float:
    """FLUX.1: every token passes every block, whether it has one stream or two."""
    d = config.num_attention_heads * config.attention_head_dim
    layers = config.num_layers + config.num_single_layers
    tokens = (pixels // 16) ** 2 + text_tokens
    return float(2 * tokens * layers * 12 * d**2 + 4 * tokens**2 * d * layers)


def peak_of(device_name: str) -> float | None:
    """Operations a second that the device can do, in units of 1e12; None for one not listed."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)
