"""The command ``python -m bounds.atlas MODEL``: tables, a ranking and a picture of what bit flips do.

    python -m bounds.atlas experiments/reference_models/reference --layer 1 --output atlas/

Prints, for each layer, location and bit field, how many flips there are, which share is proved to be rounding noise
(P4), which share gives NaN or Inf, and how large the rest are. With ``--output`` it writes ``atlas.csv`` (the same by
bit) and ``atlas.png``. Exit status 2 and one line for a request that cannot be meant.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from bounds.atlas.layers import LayerAtlas, layer_atlas
from bounds.atlas.plot import atlas_figure, require_matplotlib
from bounds.atlas.states import ObservedCall, observe
from bounds.atlas.statistics import FlipStatistics
from fault_injection import NoAttentionError, UncoveredArchitectureError, patched
from fault_injection.numbers.bits import bit_field
from fault_injection.numbers.formats import FIELDS

_SAMPLE = (
    "Attention compares every query with every key, turns the scores into weights, and mixes the values by them. "
    "A single flipped bit can vanish in the rounding, move one row a little, or replace it by another token's value. "
)
_COLUMNS = (
    *("layer", "module", "location", "bit", "field", "flips", "noise_level", "nonfinite"),
    *("relative_effect_median", "relative_effect_largest"),
    *("loss_change_median", "loss_change_90", "loss_change_99", "loss_change_largest"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 for a request that cannot be meant."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (ValueError, NoAttentionError, UncoveredArchitectureError) as error:
        print(f"python -m bounds.atlas: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m bounds.atlas", description="Predict every single-bit flip in attention."
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a causal language model")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="FILE", help="UTF-8 text whose first tokens are the input")
    text.add_argument("--tokens", metavar="IDS", help="token ids, separated by blanks or commas")
    parser.add_argument("--layer", type=int, help="number of the attention layer (default: all)")
    parser.add_argument("--seq-len", type=int, default=64, help="number of tokens (default: 64)")
    parser.add_argument("--top", type=int, default=20, help="length of the ranking (default: 20)")
    parser.add_argument("--output", metavar="DIR", help="folder for atlas.csv and atlas.png")
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.seq_len < 2:
        raise ValueError(f"--seq-len: got {options.seq_len}, allowed 2 or more: the loss is that of the next token")
    if options.top < 0:
        raise ValueError(f"--top: got {options.top}, allowed 0 or more")
    if options.output is not None:
        require_matplotlib()
    model = _load(options.model)
    ids, origin = _input_ids(options, model)
    print(f"{options.model}: {len(ids)} tokens, {origin}")
    start = time.perf_counter()
    with patched(model):
        calls = observe(model, {"input_ids": ids[None]}, None if options.layer is None else [options.layer])
    atlases = []
    for call in calls:
        atlases.append(layer_atlas(call, options.top))
        _print_layer(atlases[-1])
    _print_ranking(atlases, options.top)
    print(f"\n{_total(atlases):,} flips predicted in {time.perf_counter() - start:.1f} s, none of them run")
    if options.output is not None:
        _write(Path(options.output), calls, atlases)


def _load(name: str) -> Any:
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"MODEL: got {name!r}, which is no folder here and no name on the hub")
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, attn_implementation="eager", use_safetensors=True
        )
    except (OSError, KeyError) as error:
        raise ValueError(f"MODEL: cannot load {name!r}: {str(error).strip().splitlines()[0]}") from error
    return model.eval()


def _input_ids(options: argparse.Namespace, model: Any) -> tuple[Tensor, str]:
    """Return (seq_len,) token ids and where they come from, in words."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    if options.tokens is not None:
        ids, origin = _parsed(options.tokens), "ids as given"
    else:
        ids, origin = _from_text(options, vocabulary)
    if len(ids) < options.seq_len:
        raise ValueError(f"--seq-len: got {options.seq_len}, but there are only {len(ids)} tokens ({origin})")
    outside = [token for token in ids[: options.seq_len] if not 0 <= token < vocabulary]
    if outside:
        raise ValueError(f"--tokens: got {outside[0]}, allowed 0..{vocabulary - 1}")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and options.seq_len > longest:
        raise ValueError(f"--seq-len: got {options.seq_len}, allowed 2..{longest} for this model")
    return torch.tensor(ids[: options.seq_len], device=model.device), origin


def _parsed(tokens: str) -> list[int]:
    try:
        return [int(token) for token in tokens.replace(",", " ").split()]
    except ValueError as error:
        raise ValueError(f"--tokens: got {tokens!r}, allowed numbers separated by blanks or commas") from error


def _from_text(options: argparse.Namespace, vocabulary: int) -> tuple[list[int], str]:
    text, source = _SAMPLE * (options.seq_len // 20 + 1), "a built-in sample text"
    if options.text is not None:
        try:
            text, source = Path(options.text).read_text(encoding="utf-8"), options.text
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--text: cannot read {options.text!r}: {error}") from error
    if (tokenizer := _tokenizer(options.model)) is not None:
        return list(tokenizer(text, verbose=False)["input_ids"]), f"{source} through {type(tokenizer).__name__}"
    if vocabulary >= 256:
        # 259 and more: the byte models reserve the first three ids.
        first = 3 if vocabulary >= 259 else 0
        return [byte + first for byte in text.encode()], f"the bytes of {source}, plus {first} (there is no tokenizer)"
    if options.text is not None:
        raise ValueError(
            f"--text: this model has no tokenizer and {vocabulary} tokens, too few for bytes; use --tokens"
        )
    drawn = torch.randint(vocabulary, (options.seq_len,), generator=torch.Generator().manual_seed(0))
    return drawn.tolist(), f"drawn evenly from the {vocabulary} tokens (there is no tokenizer)"


def _tokenizer(name: str) -> Any | None:
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("token*")) and not any(folder.glob("vocab*")):
        return None  # without its files transformers returns a tokenizer that knows no words, and says nothing
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"MODEL: cannot load the tokenizer of {name!r}: {str(error).splitlines()[0]}") from error


def _total(atlases: Sequence[LayerAtlas]) -> int:
    return sum(entry.flips for atlas in atlases for entry in atlas.statistics.values())


def _by_field(atlas: LayerAtlas) -> Mapping[tuple[str, str], FlipStatistics]:
    joined: dict[tuple[str, str], FlipStatistics] = {}
    for location, dtype in atlas.elements_dtype.items():
        for field in FIELDS:
            joined[location, field] = FlipStatistics()
        for (place, bit), entry in atlas.statistics.items():
            if place == location:
                joined[location, bit_field(dtype, bit)].join(entry)
    return joined


def _print_layer(atlas: LayerAtlas) -> None:
    print(f"\nlayer {atlas.layer} ({atlas.name})")
    print(
        f"{'location':15s}{'field':10s}{'flips':>10s}{'noise %':>9s}{'nonfin. %':>10s}"
        f"{'effect median':>15s}{'largest':>10s}{'|dloss| 50 %':>14s}{'90 %':>10s}{'99 %':>10s}{'largest':>10s}"
    )
    for (location, field), entry in _by_field(atlas).items():
        shares = [100 * count / max(entry.flips, 1) for count in (entry.noise_level, entry.nonfinite)]
        sizes = [entry.relative_quantile(0.5), entry.largest_relative]
        losses = [*(entry.loss_quantile(share) for share in (0.5, 0.9, 0.99)), entry.largest_loss]
        print(
            f"{location:15s}{field:10s}{entry.flips:10,d}{shares[0]:9.1f}{shares[1]:10.1f}"
            f"{sizes[0]:15.1e}{sizes[1]:10.1e}{losses[0]:14.1e}" + "".join(f"{loss:10.1e}" for loss in losses[1:])
        )
    for location, reason in atlas.reasons.items():
        print(f"{location:15s}not predicted: {reason}")


def _print_ranking(atlases: Sequence[LayerAtlas], top: int) -> None:
    flips = sorted((flip for atlas in atlases for flip in atlas.ranking), key=lambda flip: -abs(flip.loss))[:top]
    print("\nlargest predicted changes of the loss (first order; flips that give NaN or Inf left out)")
    print(
        f"{'layer':>5s} {'location':15s}{'(b, h, row, col)':18s}{'bit':>4s}{'value':>12s}    {'becomes':12s}"
        f"{'|d out|':>10s}{'relative':>10s}{'d loss':>11s}"
    )
    for flip in flips:
        becomes = f"{flip.before:12.4g} -> {flip.after:<12.4g}"
        print(
            f"{flip.layer:5d} {flip.location:15s}{flip.index!s:18s}{flip.bit:4d}{becomes}"
            f"{flip.effect:10.1e}{flip.relative:10.1e}{flip.loss:+11.1e}"
        )


def _write(folder: Path, calls: Sequence[ObservedCall], atlases: Sequence[LayerAtlas]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: cannot make the folder {str(folder)!r}: {error.strerror}") from error
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(row for atlas in atlases for row in _rows(atlas))
    _replace(folder / "atlas.csv", table.getvalue().encode())
    _replace(folder / "atlas.png", atlas_figure(calls, atlases))
    print(f"wrote {folder / 'atlas.csv'} and {folder / 'atlas.png'}")


def _rows(atlas: LayerAtlas) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for (location, bit), entry in atlas.statistics.items():
        counts = entry.flips, entry.noise_level, entry.nonfinite
        sizes = [entry.relative_quantile(0.5), entry.largest_relative]
        sizes += [entry.loss_quantile(share) for share in (0.5, 0.9, 0.99)] + [entry.largest_loss]
        field = bit_field(atlas.elements_dtype[location], bit)
        rows.append((atlas.layer, atlas.name, location, bit, field, *counts, *(f"{size:.4g}" for size in sizes)))
    return rows


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
