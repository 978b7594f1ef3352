"""Merging in weight space: a recipe in, a folder with a new model out, tensor by tensor.

Everything that can be wrong is found before anything is written. Then each tensor is computed when
its turn to be written has come, so that memory holds it once for each model and never a whole one.
The folder appears only when it is complete.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from dlf_ray.models.files import INDEX
from dlf_ray.training.checkpoints import (
    CONFIG,
    FLOATS,
    SIZES,
    Adapter,
    Model,
    Stored,
    check_tokenizers,
    copied,
    digest,
    open_model,
)
from dlf_ray.training.merging import LINES, chance, depth_scale
from dlf_ray.training.recipe import Recipe

SHARD = 5 * 10**9
"""Bytes of a file at most, as the Hugging Face hub advises."""
RECIPE, CARD = "mergekit_config.yml", "README.md"
DTYPES = {str(dtype).removeprefix("torch."): name for name, dtype in FLOATS.items()}

OnBytes = Callable[[str, int, int], None]
"""Told what is being done, how many bytes of it are done, and of how many."""


class Merged(NamedTuple):
    """What came out."""

    folder: Path
    tensors: int
    bytes: int


def merge(
    recipe: Recipe, output: Path, on_bytes: OnBytes = lambda what, done, total: None
) -> Merged:
    """Writes the merged model into the new folder `output`.

    Beside weights in safetensors it holds the base's settings and tokenizer, the recipe in full
    with the hashes of what was merged, and a model card. The same recipe gives the same bytes.
    Raises `ValueError`, saying what to do, where that cannot be; then nothing is left behind.
    """
    if output.exists():
        raise ValueError(f"{output} exists already: name a new folder")
    merger = Merger(recipe)
    merger.check()
    _check_space(output, merger.bytes)
    hashes = merger.hashes(on_bytes)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".merge-", dir=output.parent) as unfinished:
            folder = Path(unfinished, "model")
            folder.mkdir()
            merger.write(folder, on_bytes)
            _write_about(folder, output.name, recipe, hashes)
            folder.rename(output)
    except OSError as error:
        raise ValueError(
            f"{output} could not be written, and nothing of it was kept: {error.strerror or error}"
        ) from error
    return Merged(output, len(merger.stored), merger.bytes)


class Merger:
    """The models of a recipe, opened, and their merged tensors."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.experts = [open_model(expert.model) for expert in recipe.experts]
        base = open_model(recipe.base_model) if recipe.base_model else self.experts[0]
        if isinstance(base, Adapter):
            raise ValueError(
                f"{base.source} is an adapter: set `base_model` to the model it was trained over"
            )
        self.base = base
        asked = DTYPES[recipe.dtype] if recipe.dtype else None
        self.stored = {name: _as(base.tensors[name], asked) for name in base.names}
        self._digests: dict[str, str] = {}

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.stored.values())

    def check(self) -> None:
        """Raises `ValueError` unless all are of one kind and shape, and share a tokenizer."""
        for expert in self.experts:
            expert.check(self.base)
            check_tokenizers(self.base, expert)

    def hashes(self, on_bytes: OnBytes) -> Mapping[str, str]:
        """SHA-256 of each model's files. Raises `ValueError` if the recipe knows them otherwise."""
        opened = {each.source: each for each in [self.base, *self.experts]}
        total = sum(path.stat().st_size for each in opened.values() for path in each.files)
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            on_bytes("hashing", done, total)

        for source, each in opened.items():
            self._digests[source] = digest(each.files, count)
            if self.recipe.sha256.get(source, self._digests[source]) != self._digests[source]:
                raise ValueError(
                    f"the files of {source} are not those that `sha256` in the recipe tells of: "
                    "get these, or take its line out"
                )
        return self._digests

    def write(self, folder: Path, on_bytes: OnBytes) -> None:
        """The weights, in one file or in several with an index, and what the base has beside."""
        for path in copied(self.base):
            (folder / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.base.folder / path, folder / path)
        if self.recipe.dtype:
            _set_dtype(folder / CONFIG, self.recipe.dtype)
        split = split_state_dict_into_shards_factory(
            {name: each.bytes for name, each in self.stored.items()},
            get_storage_size=lambda size: size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=SHARD,
        )
        done = 0
        for file, names in split.filename_to_tensors.items():
            # As safetensors' own writer does: every number lies at a multiple of its size.
            names = sorted(names, key=lambda name: -SIZES[self.stored[name].dtype])
            layout = {name: self.stored[name] for name in names}
            with (folder / file).open("wb") as out:
                out.write(_header(layout))
                for name, each in layout.items():
                    out.write(self.tensor(name).reshape(-1).view(torch.uint8).numpy().data)
                    done += each.bytes
                    on_bytes("merging", done, self.bytes)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def tensor(self, name: str) -> Tensor:
        """One tensor of the new model, in the type that it is saved in.

        Numbers that are no weights (positions, masks) are the base's. Raises `ValueError` for
        weights that the type cannot hold.
        """
        saved = self.base.read(name)
        if self.base.tensors[name].dtype not in FLOATS:
            return saved.contiguous()
        merged = self._merged(name, saved.float()).to(FLOATS[self.stored[name].dtype])
        if not merged.isfinite().all():
            raise ValueError(
                f"{name} would hold numbers that are infinite or none: look for such weights in "
                "the models, lower the weights in the recipe, or set `dtype: float32`"
            )
        return merged.contiguous()

    def _merged(self, name: str, base: Tensor) -> Tensor:
        recipe, method = self.recipe, self.recipe.method
        weights = [each.weight for each in recipe.experts]
        if not method.over_base:
            values = [model.value(name, base) for model in self.experts]
            return method.combine(values, weights, recipe.normalize)
        shifts = [
            self._shift(name, base, model, each.density)
            for model, each in zip(self.experts, recipe.experts, strict=True)
        ]
        scale, lines = recipe.parameters.lambda_, recipe.parameters.lines
        if lines:
            scale *= depth_scale(name, self.base.layers, lines.alpha, lines.beta)
        return base + method.combine(shifts, weights, recipe.normalize) * scale

    def _shift(self, name: str, base: Tensor, model: Model | Adapter, density: float) -> Tensor:
        """What one model adds to the base, thinned out as the recipe says."""
        shift, thin = model.shift(name, base), self.recipe.method.thin
        if not thin or density == 1:
            return shift
        return thin(
            shift, density, chance(self.recipe.seed or 0, self._digests[model.source], name)
        )


def _as(stored: Stored, asked: str | None) -> Stored:
    """In the type that is asked for, if it is a weight."""
    return stored._replace(dtype=asked) if asked and stored.dtype in FLOATS else stored


def _header(layout: Mapping[str, Stored]) -> bytes:
    """What a safetensors file begins with: its length in 8 bytes, and where each tensor lies.

    The library writes a file only from all of its tensors at once.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, each in layout.items():
        end = start + each.bytes
        header[name] = {"dtype": each.dtype, "shape": each.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _check_space(output: Path, wanted: int) -> None:
    there = next(parent for parent in output.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < wanted:
        raise ValueError(
            f"the merged model takes {wanted / 1e9:.2f} GB, and {there} has {free / 1e9:.2f} GB "
            "free: make room, or name an `--output` elsewhere"
        )


def _set_dtype(path: Path, dtype: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # what it was called before
    path.write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n", encoding="utf-8")


def _write_about(folder: Path, name: str, recipe: Recipe, hashes: Mapping[str, str]) -> None:
    """The recipe in full, and a model card that shows it."""
    text = yaml.safe_dump(recipe.written(hashes), sort_keys=False, allow_unicode=True)
    (folder / RECIPE).write_text(text, encoding="utf-8")
    (folder / CARD).write_text(_card(name, recipe, text), encoding="utf-8")


def _card(name: str, recipe: Recipe, text: str) -> str:
    method = recipe.method
    over = f", over the base {recipe.base_model}" if method.over_base else ""
    if recipe.parameters.lines:
        over += f"; scaled with depth (LiNeS: {LINES})"
    rows = [
        f"| {each.model} | {_plain(each.weight)} | {_plain(each.density)} |"
        for each in recipe.experts
    ]
    return "\n".join(
        (
            *("---", "library_name: transformers", "tags: [merge]", "---"),
            *(f"# {name}", ""),
            f"Merged by `{recipe.merge_method}`: {method.about} ({method.paper}){over}.",
            *("", "| model | weight | density |", "|---|---|---|", *rows, ""),
            f"The recipe in full, which `dlf merge {RECIPE}` repeats:",
            *("", "```yaml", text.rstrip(), "```", ""),
        )
    )


def _plain(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:g}"
