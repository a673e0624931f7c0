"""The zoo: tiny Hugging Face models with seeded random weights, one or more of every attention architecture.

Nothing is downloaded; the whole zoo builds and runs in a few seconds on one core.

>>> entry = ZOO["gpt2"]
>>> model = entry.build()
>>> tuple(logits_of(model(**entry.inputs(model))).shape)
(2, 12, 96)
>>> entry.path, entry.cores, entry.kind
('A', 2, 'decoder')
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, cast

import pytest
import torch
import transformers
from torch import nn
from zoo_configs import IMAGE_TOKEN, LENGTH, MEL_BINS, SPECIES, VISION_START_TOKEN, VOCABULARY, Species

BATCH = 2
PADDING = 4
FIRST_TOKEN = 3
# Height and width, in patches, of the two images of a vision-language model; a token merges MERGED_PATCHES.
IMAGE_GRIDS = ((4, 4), (4, 6))
MERGED_PATCHES = 4

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ZooEntry:
    """One model of the zoo.

    ``path`` is "A" when the eager attention dispatches through transformers' ``AttentionInterface``, "R" when
    it does not. ``build`` returns a fresh model in eval mode, float32, ``attn_implementation="eager"``;
    ``inputs`` the keyword arguments of a forward, on the model's device, float inputs in its dtype. ``cores``
    counts the modules that evaluate attention in one forward, ``calls`` the evaluations: more than cores
    where a vision module evaluates once an image or window.
    """

    name: str
    path: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], Inputs]
    cores: int
    kind: str
    calls: int


def logits_of(output: Any) -> torch.Tensor:
    """Return the main tensor of a zoo model's output: its logits, or else its last hidden state."""
    logits: torch.Tensor | None = getattr(output, "logits", None)
    return cast(torch.Tensor, output.last_hidden_state) if logits is None else logits


def zoo_parameters(path: str | None = None, kind: str | None = None) -> list[Any]:
    """Return a ``pytest.param`` with its name as id for every entry, or for those of one path or kind.

    >>> [parameter.id for parameter in zoo_parameters(kind="vision")]
    ['vit']
    """
    return [
        pytest.param(entry, id=entry.name)
        for entry in ZOO.values()
        if path in (None, entry.path) and kind in (None, entry.kind)
    ]


def _generator(name: str) -> torch.Generator:
    seed = int.from_bytes(blake2b(name.encode(), digest_size=7).digest(), "big")
    return torch.Generator().manual_seed(seed)


def _build(species: Species) -> nn.Module:
    config_class = getattr(transformers, species.config)
    sub_configs = {name: config_class.sub_configs[name](**options) for name, options in species.sub_configs.items()}
    config = config_class(**species.options, **sub_configs)
    model_class = getattr(transformers, species.model)
    arguments = {"add_pooling_layer": False} if species.model == "ViTModel" else {}
    with torch.random.fork_rng():
        model = model_class._from_config(config, attn_implementation="eager", **arguments)
    _reinitialise(model, species.gain)
    return cast(nn.Module, model.eval())


@torch.no_grad()
def _reinitialise(model: nn.Module, gain: float) -> None:
    """Draw every parameter anew, each from a generator seeded by its own name.

    Matrices get a Glorot deviation times ``gain``, large enough that the attention weights are far from
    uniform (Glorot's is the same for a matrix and its transpose, and some of these models store transposes).
    Vectors are moved a little away from the value of their kind: 1 for the weights of most norms, 0 for
    biases and for norms that add 1 themselves.
    """
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=_generator(name))
        if parameter.dim() >= 2:
            rows, columns = (parameter.flatten(1) if parameter.dim() > 3 else parameter).shape[-2:]
            parameter.copy_(noise * gain * math.sqrt(2 / (rows + columns)))
        else:
            centre = 1.0 if bool((parameter == 1).all()) else 0.0
            parameter.copy_(centre + 0.1 * noise)


def _tokens(model: nn.Module, padding: str | None = None) -> Inputs:
    ids = torch.randint(FIRST_TOKEN, VOCABULARY - 4, (BATCH, LENGTH), generator=_generator("tokens"))
    if padding is None:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1, slice(PADDING) if padding == "left" else slice(-PADDING, None)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def _tokens_pair(model: nn.Module, padding: str | None = None) -> Inputs:
    target = torch.randint(FIRST_TOKEN, VOCABULARY, (BATCH, LENGTH - 5), generator=_generator("target"))
    return {**_tokens(model, padding), "decoder_input_ids": target}


def _floats(model: nn.Module, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=_generator("floats")).to(next(model.parameters()).dtype)


def _audio(model: nn.Module) -> Inputs:
    target = _tokens_pair(model)["decoder_input_ids"]
    return {"input_features": _floats(model, BATCH, MEL_BINS, 2 * LENGTH), "decoder_input_ids": target}


def _image(model: nn.Module) -> Inputs:
    return {"pixel_values": _floats(model, BATCH, 3, 12, 12)}


def _image_and_tokens(model: nn.Module) -> Inputs:
    """One image in each row of tokens; the images differ in size, so the vision tower takes them apart."""
    ids = _tokens(model)["input_ids"]
    for row, (height, width) in zip(ids, IMAGE_GRIDS, strict=True):
        row[0] = VISION_START_TOKEN
        row[1 : 1 + height * width // MERGED_PATCHES] = IMAGE_TOKEN
    patches = sum(height * width for height, width in IMAGE_GRIDS)
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
        "pixel_values": _floats(model, patches, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([(1, height, width) for height, width in IMAGE_GRIDS]),
    }


_INPUTS: dict[str, Callable[[nn.Module], Inputs]] = {
    "tokens": _tokens,
    "tokens_left_padded": partial(_tokens, padding="left"),
    "tokens_right_padded": partial(_tokens, padding="right"),
    "tokens_pair": _tokens_pair,
    "tokens_pair_padded": partial(_tokens_pair, padding="right"),
    "audio": _audio,
    "image": _image,
    "image_and_tokens": _image_and_tokens,
}


def _inputs(name: str, model: nn.Module) -> Inputs:
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in _INPUTS[name](model).items()}


ZOO: dict[str, ZooEntry] = {
    name: ZooEntry(
        name=name,
        path=species.path,
        build=partial(_build, species),
        inputs=partial(_inputs, species.inputs),
        cores=species.cores,
        kind=species.kind,
        calls=species.calls or species.cores,
    )
    for name, species in SPECIES.items()
}
