"""What the tests of merging share: recipes, and the tensors of what comes out."""

import json

import yaml
from safetensors.torch import load_file, save_file

from dlf_ray.training.merge import merge
from dlf_ray.training.recipe import Recipe


def source(model, **parameters):
    return {"model": str(model), **({"parameters": parameters} if parameters else {})}


def recipe_file(path, method, models, **keys):
    keys = {key: str(value) if key == "base_model" else value for key, value in keys.items()}
    path.write_text(yaml.safe_dump({"merge_method": method, "models": models, **keys}))
    return path


def merged(output, method, models, **keys):
    """The folder that a recipe of these keys makes."""
    recipe = recipe_file(output.with_suffix(".yaml"), method, models, **keys)
    return merge(Recipe.from_yaml(recipe), output).folder


def tensors(folder):
    """All tensors of a model, or of an adapter, on disk."""
    return {
        name: value
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def rewrite(folder, change):
    """Changes the tensors of a model that has one file."""
    weights = tensors(folder)
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit(path, **values):
    """Changes a file of JSON; None takes a key out."""
    found = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
