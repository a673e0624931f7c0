"""The model under test: find it, read its facts, and load it ready for measurement.

A model is a built-in name, a local folder or a name on the hub. ``from_pretrained`` loads it with safetensors weights
and its own eager attention, in evaluation mode, without gradients. A checkpoint that lacks weights is refused, because
the library would fill the gap with random numbers and only warn.

    loaded = load_model(config.model)       # LoadedModel(model=..., tokenizer=..., family="causal", ...)
    facts = read_model_facts(config.model)  # ModelFacts(num_layers=12, ...) from config.json alone, or None

>>> resolve_dtype("bfloat16")
torch.bfloat16
>>> resolve_dtype("float23")
Traceback (most recent call last):
experiments.errors.UsageError: model.dtype: got 'float23', allowed float64, float32, bfloat16, float16; did you mean 'float32'?
"""  # noqa: E501 - the last line is what the error prints

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError

from experiments.config.checks import check_choice
from experiments.errors import MissingResourceError, UsageError, nearest
from experiments.inputs.families import FAMILIES
from experiments.inputs.hub import HubUnreachableError, cached_model_folder, first_line, hub_files, pinned_commit
from experiments.inputs.model_facts import ModelFacts, facts_from_config
from fault_injection.numbers.formats import model_dtypes

if TYPE_CHECKING:
    from experiments.config import ModelConfig

logger = logging.getLogger(__name__)

BUILT_IN_MODELS = ("reference", "reference-kv")

_REFERENCE_FOLDER = Path(__file__).resolve().parents[1] / "reference_models"
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


@dataclass(frozen=True)
class _Place:
    """Where a model was found: the argument of ``from_pretrained``, and the names of the files there."""

    source: str
    commit: str | None
    files: frozenset[str]
    local: bool

    def options(self, config: ModelConfig) -> dict[str, Any]:
        if self.local:
            return {"local_files_only": True, "trust_remote_code": config.trust_remote_code}
        return {"revision": self.commit, "trust_remote_code": config.trust_remote_code}


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
    place = _find(config)
    facts = _read_facts(place, config)
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


def read_model_facts(config: ModelConfig) -> ModelFacts | None:
    """Read the facts in ``config.json``, without weights and without the network.

    Returns:
        The facts; None for a name that is not built in, not a local folder, and not in the local hub cache.

    Raises:
        MissingResourceError: A local folder is missing or has no readable ``config.json``.
        UsageError: The configuration has an unknown type.
    """
    folder = _local_folder(config)
    place = _folder_place(folder) if folder is not None else _cached_place(config)
    return None if place is None else _read_facts(place, config)


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


def _find(config: ModelConfig) -> _Place:
    folder = _local_folder(config)
    if folder is not None:
        return _folder_place(folder)
    try:
        files = hub_files(config.path, "model", config.revision)
    except HubUnreachableError as error:
        cached = _cached_place(config)
        if cached is None:
            raise MissingResourceError(
                f"{_not_found(config.path)}, nor in the hub's local cache, and {error}"
            ) from error
        logger.warning("model.path: %s; taking %s from the local cache, commit %s", error, config.path, cached.commit)
        return cached
    except MissingResourceError as error:
        raise MissingResourceError(f"{_not_found(config.path)}, and {error}") from error
    except UsageError as error:
        raise UsageError(f"model.path: {error}{nearest(config.path, BUILT_IN_MODELS)}") from error
    _refuse_without_config(config.path, files)
    return _Place(config.path, pinned_commit(config.path, config.revision), files, local=False)


def _local_folder(config: ModelConfig) -> Path | None:
    """Return the folder that ``config.path`` names, or None if it can only be a name on the hub."""
    if config.path in BUILT_IN_MODELS:
        folder = _REFERENCE_FOLDER / config.path
    else:
        folder = Path(config.path).expanduser()
        if not folder.exists() and not _looks_like_path(config.path):
            return None
    if not folder.exists():
        raise MissingResourceError(f"{_not_found(config.path)} (looked for {folder.absolute()})")
    if not folder.is_dir():
        raise UsageError(f"model.path: got the file {config.path!r}, allowed the folder with its config.json")
    if config.revision is not None:
        raise UsageError(f"model.revision: got {config.revision!r}, but {config.path!r} is a folder, not a hub name")
    return folder.resolve()


def _looks_like_path(path: str) -> bool:
    return path.startswith((".", "/", "~")) or "\\" in path or path.count("/") > 1


def _folder_place(folder: Path, commit: str | None = None) -> _Place:
    return _Place(str(folder), commit, frozenset(entry.name for entry in folder.iterdir()), local=True)


def _cached_place(config: ModelConfig) -> _Place | None:
    folder = cached_model_folder(config.path, config.revision)
    return None if folder is None else _folder_place(folder, commit=folder.name)


def _not_found(path: str) -> str:
    built_in = ", ".join(BUILT_IN_MODELS)
    hint = nearest(path, BUILT_IN_MODELS)
    return f"model.path: got {path!r}, which is no built-in model ({built_in}{hint}) and no folder here"


def _read_facts(place: _Place, config: ModelConfig) -> ModelFacts:
    _refuse_without_config(place.source, place.files)
    try:
        return facts_from_config(transformers.AutoConfig.from_pretrained(place.source, **place.options(config)))
    except (OSError, KeyError) as error:
        raise MissingResourceError(
            f"model.path: cannot read the config.json of {place.source}: {first_line(error)}"
        ) from error
    except ValueError as error:
        hint = "" if config.trust_remote_code else "; model.trust_remote_code allows a model's own code to run"
        raise UsageError(f"model.path: {first_line(error)}{hint}") from error


def _refuse_without_config(path: str, files: frozenset[str]) -> None:
    if "config.json" not in files:
        raise MissingResourceError(f"model.path: {path} has no config.json; it has {_some(files)}")


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
    raise MissingResourceError(f"model.path: {path!r} has no {_WEIGHTS[0]}; it has {_some(files)}")


def _load_weights(place: _Place, config: ModelConfig, family: str, dtype: torch.dtype) -> Any:
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
            f" random: {_some(missing)}"
        )
    return model


def _load_tokenizer(place: _Place, config: ModelConfig) -> Any | None:
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


def _some(names: Iterable[str], limit: int = 5) -> str:
    ordered = sorted(names)
    return (", ".join(ordered[:limit]) + (", ..." if len(ordered) > limit else "")) or "no files"
