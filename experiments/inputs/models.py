"""The model under test: find it, read its facts, and load it ready for measurement.

A model is a built-in name, a local folder or a name on the hub. ``from_pretrained`` loads it with safetensors weights
and its own eager attention, in evaluation mode, without gradients. A checkpoint that lacks weights is refused, because
the library would fill the gap with random numbers and only warn.

    loaded = load_model(config.model)       # LoadedModel(model=..., tokenizer=..., family="causal", ...)

>>> resolve_dtype("bfloat16")
torch.bfloat16
>>> resolve_dtype("float23")
Traceback (most recent call last):
experiments.errors.UsageError: model.dtype: got 'float23', allowed float64, float32, bfloat16, float16; did you mean 'float32'?
"""  # noqa: E501 - the last line is what the error prints

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError

from experiments.config.checks import check_choice
from experiments.errors import MissingResourceError, UsageError, nearest
from experiments.inputs.families import FAMILIES
from experiments.inputs.hub import first_line
from experiments.inputs.model_facts import ModelFacts
from experiments.inputs.model_places import BUILT_IN_MODELS, Place, find_place, read_facts, some_of
from fault_injection.numbers.formats import model_dtypes

if TYPE_CHECKING:
    from experiments.config import ModelConfig

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = re.compile(r"(pytorch_model|model).*\.(bin|pt|pth|ckpt|pkl)")
_TOKENIZER = re.compile(r"tokenizer(_config)?\.json|(.*\.)?vocab\.(txt|json)|merges\.txt|.*\.model|.*\.tiktoken")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be measured: evaluation mode, no gradients, eager attention, on its device.

    Attributes:
        model: The ``PreTrainedModel``.
        tokenizer: Its tokenizer, or None if it has none (then only ``synthetic`` data can be used).
        family: A key of ``FAMILIES``.
        device: Where the parameters are.
        dtype: The requested dtype; a few architectures keep some parameters in float32.
        path: The name as the user gave it.
        resolved: The folder or hub name that was loaded.
        revision: Commit on the hub; None for a local folder.
        facts: The facts in its configuration.
    """

    model: Any
    tokenizer: Any | None
    family: str
    device: torch.device
    dtype: torch.dtype
    path: str
    resolved: str
    revision: str | None
    facts: ModelFacts

    @property
    def vocabulary(self) -> int:
        """The number of token ids; raises ``UsageError`` for a model that reads none."""
        if self.facts.vocab_size is None:
            raise UsageError(f"model.path: {self.path} reads no token ids; campaigns need a text model")
        return self.facts.vocab_size


def load_model(config: ModelConfig) -> LoadedModel:
    """Load the model and its tokenizer.

    ``config.force_kv_equal`` is not applied here: it is a property of the patched model.

    Raises:
        UsageError: The dtype or device is unknown, the weights are pickle, or the model is an encoder-decoder or takes
            no token ids.
        MissingResourceError: The model, its weights, the hub or the GPU is missing.
    """
    dtype = resolve_dtype(config.dtype)
    device = resolve_device(config.device)
    place = find_place(config)
    facts = read_facts(place, config)
    _refuse_family(config.path, facts)
    _refuse_weights(config.path, place.files)
    model = _load_weights(place, config, facts.family, dtype)
    return LoadedModel(
        model=model.requires_grad_(False).eval().to(device),
        tokenizer=_load_tokenizer(place, config),
        family=facts.family,
        device=device,
        dtype=dtype,
        path=config.path,
        resolved=place.source,
        revision=place.commit,
        facts=facts,
    )


def resolve_dtype(name: str) -> torch.dtype:
    """Return the dtype of this name, one of ``model_dtypes()``."""
    check_choice("model.dtype", name, model_dtypes())
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def resolve_device(name: str) -> torch.device:
    """Return the device of this name: ``auto`` (the GPU if there is one), ``cpu``, ``cuda`` or ``cuda:<i>``.

    Raises:
        UsageError: The name is none of these.
        MissingResourceError: The GPU does not exist.
    """
    allowed = ("auto", "cpu", "cuda", "cuda:0")
    if name in ("auto", "cpu"):
        return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise UsageError(f"model.device: got {name!r}, allowed auto, cpu, cuda, cuda:<number>{nearest(name, allowed)}")
    if not torch.cuda.is_available():
        raise MissingResourceError(
            f"model.device: got {name!r}, but torch {torch.__version__} sees no CUDA GPU here; allowed auto, cpu"
        )
    count = torch.cuda.device_count()
    if match[1] is not None and int(match[1]) >= count:
        raise MissingResourceError(f"model.device: got {name!r}, but the GPUs here are cuda:0 .. cuda:{count - 1}")
    return torch.device(name)


def _refuse_family(path: str, facts: ModelFacts) -> None:
    if FAMILIES[facts.family].two_stacks:
        *most, last = (name for name, family in FAMILIES.items() if not family.two_stacks)
        raise UsageError(
            f"model.path: {path!r} is the {facts.family} {facts.architecture}; the command runs {', '.join(most)}"
            f" and {last} models; an {facts.family} runs through CompleteExperimentRunner.run_all(model, dataloader)"
        )
    if facts.vocab_size is None:
        raise UsageError(
            f"model.path: {path!r} is {facts.architecture}, which takes no token ids; the command runs models of text"
        )


def _refuse_weights(path: str, files: frozenset[str]) -> None:
    if not files.isdisjoint(_WEIGHTS):
        return
    pickles = [name for name in sorted(files) if _PICKLES.fullmatch(name)]
    if pickles:
        raise UsageError(
            f"model.path: {path!r} has only pickle weights ({', '.join(pickles)}), refused because reading a pickle"
            " can run code; if you trust it, convert it once: AutoModel(ForCausalLM|ForMaskedLM).from_pretrained(OLD)"
            ".save_pretrained(NEW) writes model.safetensors"
        )
    raise MissingResourceError(f"model.path: {path!r} has no {_WEIGHTS[0]}; it has {some_of(files)}")


def _load_weights(place: Place, config: ModelConfig, family: str, dtype: torch.dtype) -> Any:
    try:
        model, report = getattr(transformers, FAMILIES[family].auto_class).from_pretrained(
            place.source,
            use_safetensors=True,
            attn_implementation="eager",
            dtype=dtype,
            output_loading_info=True,
            **place.options(config),
        )
    except (OSError, ImportError, SafetensorError) as error:
        raise MissingResourceError(
            f"model.path: cannot read the weights of {place.source}: {first_line(error)}"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"model.path: cannot load {config.path!r} as {family}: {first_line(error)}") from error
    if model.main_input_name != "input_ids":
        raise UsageError(
            f"model.path: {config.path!r} is a {type(model).__name__}, which reads {model.main_input_name}; the command"
            " runs models of text"
        )
    spare = FAMILIES[family].spare_weights
    missing = [key for key in report["missing_keys"] if not any(part in key for part in spare)]
    if missing:
        raise MissingResourceError(
            f"model.path: {config.path!r} lacks {len(missing)} weights of a {type(model).__name__}, which would be"
            f" random: {some_of(missing)}"
        )
    return model


def _load_tokenizer(place: Place, config: ModelConfig) -> Any | None:
    # without its files AutoTokenizer silently returns a tokenizer that knows no words
    if not any(_TOKENIZER.fullmatch(name) for name in place.files):
        return transformers.ByT5Tokenizer() if config.path in BUILT_IN_MODELS else None
    try:
        return transformers.AutoTokenizer.from_pretrained(place.source, **place.options(config))
    except (OSError, ImportError) as error:
        raise MissingResourceError(
            f"model.path: cannot load the tokenizer of {place.source}: {first_line(error)}"
        ) from error
    except (ValueError, KeyError) as error:
        raise UsageError(f"model.path: cannot load the tokenizer of {place.source}: {first_line(error)}") from error
