"""A minimal input for one dry run of a model, made from its configuration.

>>> import transformers
>>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=32)
>>> example_inputs(transformers.GPT2LMHeadModel(config))            # of a vision model: pixel_values; a batch of one
{'input_ids': tensor([[1, 2, 3, 4, 5, 6, 7]])}
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 7
"""Length of the dry run's text, chosen so that query, key and channel counts are not equal by chance."""


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return keyword arguments for one forward pass of ``model``.

    Text, encoder-decoder, vision and audio models are recognised by ``main_input_name`` and the configuration.

    Raises:
        ValueError: the kind of input is unknown; then pass ``example_inputs=`` to the patching call.
    """
    main = getattr(model, "main_input_name", "input_ids")
    config = getattr(model, "config", None)
    maker = _MAKERS.get(main)
    if config is None or maker is None:
        raise ValueError(
            f"{type(model).__name__}: cannot make an input of kind {main!r} for the dry run "
            f"(known: {', '.join(sorted(_MAKERS))}); pass example_inputs={{...}} with the arguments of one forward"
        )
    reference = next(model.parameters())
    inputs: dict[str, Tensor] = maker(config, reference)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _tokens(config, reference)
    return inputs


def _tokens(config: Any, reference: Tensor) -> Tensor:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None) or 16
    tokens = torch.arange(TOKENS, device=reference.device) % max(1, vocabulary - 1) + min(1, vocabulary - 1)
    return tokens.unsqueeze(0)


def _text(config: Any, reference: Tensor) -> dict[str, Tensor]:
    return {"input_ids": _tokens(config, reference)}


def _pixels(config: Any, reference: Tensor) -> dict[str, Tensor]:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (1, getattr(config, "num_channels", 3), height, width)
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.rand(shape, generator=generator).to(reference)}


def _mel_features(config: Any, reference: Tensor) -> dict[str, Tensor]:
    frames = 2 * config.max_source_positions
    generator = torch.Generator().manual_seed(0)
    features = torch.rand((1, config.num_mel_bins, frames), generator=generator)
    return {"input_features": features.to(reference)}


_MAKERS: dict[str, Callable[[Any, Tensor], dict[str, Tensor]]] = {
    "input_ids": _text,
    "pixel_values": _pixels,
    "input_features": _mel_features,
}
