"""`opd merge`: the weighted average of experts, as a checkpoint or as an adapter."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NoReturn

import torch
from safetensors import SafetensorError

from opd.errors import OVERWRITE, ModelError, RunError
from opd.files.ours import refuse_taken
from opd.files.whole import whole_folder
from opd.language.source import resolve
from opd.merging import weights as files
from opd.merging.adapters import Adapter, Factors, check_alike, find, of_factors, of_products, save
from opd.merging.weights import Weights, components
from opd.privacy import promises
from opd.provenance import ORIGIN, read_origin, write_origin

COPIED = (".json", ".txt", ".jinja", ".model")
"""Endings of what a result takes from the first expert besides weights: configurations and tokenizers, no code."""

VOLATILE = ("_name_or_path", "transformers_version", "_diffusers_version", "torch_dtype", "dtype")
"""Keys of a configuration that do not make another architecture."""

TOKENIZERS = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")
SCHEDULER = "scheduler_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def merge(
    experts: Sequence[str | Path],
    into: str | Path,
    *,
    weights: Sequence[float] | None = None,
    average: Literal["weights", "factors"] = "weights",
    form: Literal["dense", "adapter"] | None = None,
    base: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the weighted average of several experts of one architecture.

    With `average="weights"` the result is `W_0 + sum_i w_i (W_i - W_0)`, which is the average of the weights, and for
    LoRA that of the products `B_i A_i`. With `"factors"` LoRA's A and B are averaged apart, as Flow-OPD's release does;
    that is another model. Weights are divided by their sum. Sums are made in float32 and stored in the first expert's
    dtype; what is the same in all experts stays bit for bit.

    Memory: four times the largest tensor in float32 and one file of at most 1 GiB (or the largest tensor); for adapters
    the adapters.

    Args:
        experts: run folders, student or model folders (of transformers or diffusers), or adapter folders (of peft, or
            with diffusers' `pytorch_lora_weights.safetensors`).
        into: the folder to write.
        weights: of the experts; default equal.
        average: of what.
        form: `dense` writes a model that loads by itself, `adapter` one of rank `sum_i r_i` whose product is exact (of
            the common rank with `factors`). Default what the experts are.
        base: folder of the model that adapters belong to; default what they say, which must be one.
        overwrite: replace the model that `opd` wrote into `into`.

    Raises:
        ModelError: experts that are not of one architecture, tokenizer or shape, that hold no safetensors, or adapters
            that are not plain LoRA; the message names the first difference.
        RunError: `into` cannot be written.
    """
    for name, value, accepted in (
        ("average", average, ("weights", "factors")),
        ("form", form, (None, "dense", "adapter")),
    ):
        if value not in accepted:
            raise ModelError(f"merge: {name} is {value!r}; accepted: {', '.join(str(a) for a in accepted if a)}")
    folders = [_folder(expert) for expert in experts]
    if len(folders) < 2:
        raise ModelError("merge needs two experts or more; name their folders")
    shares = _shares(weights, len(folders))
    target = Path(into).expanduser()
    _check_free(target, folders, overwrite)

    dense = [components(f) for f in folders]
    form = form or ("dense" if all(dense) else "adapter")
    through_adapters = form == "adapter" or average == "factors" or not all(dense)
    used = [find(f) or _lacking(f, form, average) for f in folders] if through_adapters else []
    if through_adapters:
        check_alike(used, equal_factors=average == "factors")
        if base is None:
            _changed_model(used)
    else:
        _check_files(folders)
        _check_shapes(folders, dense)
    root = _base(base, used) if through_adapters and form == "dense" else None
    if root is not None and target.resolve() == root.resolve():
        raise RunError(f"{target} is the model that the adapters change; choose another folder")
    refuse_taken(target, overwrite)
    rule = of_factors if average == "factors" else of_products
    factors = partial(rule, used, shares)

    try:
        with whole_folder(target) as folder:
            if form == "adapter":
                save(folder, used[0], ((module, factors(module)) for module in used[0].modules))
            elif root is not None:
                _write_on_base(folder, root, used[0], factors)
            else:
                _write_average(folder, folders, dense, shares)
            if form == "dense":
                _copy_rest(root or folders[0], folder)
            _write_origin(folder, experts, folders, shares, average, form, used, root)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {target} ({error}); free some space or choose another folder") from None
    return target


def _folder(expert: str | Path) -> Path:
    """Where an expert's weights lie: `student` of a run, or the folder itself."""
    path = Path(expert).expanduser()
    path = path / "student" if (path / "student").is_dir() else path
    if not path.is_dir():
        raise ModelError(f"no folder {str(expert)!r}; give that of a run, of a model or of an adapter")
    if not components(path) and find(path) is None:
        pickled = sorted(p.name for p in path.rglob("*") if p.suffix in PICKLES)
        holds = f"only {pickled[0]}, which opd does not open" if pickled else "no weights"
        raise ModelError(f"{path} holds {holds}; save the model as safetensors")
    return path


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    given = [1.0] * count if weights is None else [float(w) for w in weights]
    if len(given) != count:
        raise ModelError(f"merge has {count} experts and {len(given)} weights; give one for each")
    if not all(math.isfinite(w) and w >= 0 for w in given) or sum(given) <= 0:
        raise ModelError(f"the weights of a merge are {given}; give numbers from 0, not all 0")
    return [w / sum(given) for w in given]


def _check_free(target: Path, folders: Sequence[Path], overwrite: bool) -> None:
    place = target.resolve()
    if any(place in (f.resolve(), *f.resolve().parents) for f in folders):
        raise RunError(f"{target} holds an expert of this merge; choose another folder")
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"{target} is not empty; choose another folder, or pass {OVERWRITE}")


def _lacking(folder: Path, form: str, average: str) -> NoReturn:
    wanted = f"average {average!r}" if average == "factors" else f"form {form!r}"
    raise ModelError(
        f"{folder} has no adapter ({' or '.join(files.ADAPTER_FILES)}), and {wanted} needs one of every expert here; "
        "give folders with weights for form 'dense' and average 'weights'"
    )


def _changed_model(adapters: Sequence[Adapter]) -> str:
    """The one model that the adapters say they change, a folder by its whole path; empty where none says it."""
    names = [str(a.config.get("base_model_name_or_path") or "") for a in adapters]
    said = {str(Path(name).resolve()) if name and Path(name).is_dir() else name for name in names}
    if len(said) > 1:
        named = ", ".join(name or "(not said)" for name in sorted(said))
        raise ModelError(
            f"the adapters belong to different models: {named}; merge those of one; if they are, name it: --base FOLDER"
        )
    return said.pop()


def _base(base: str | None, adapters: Sequence[Adapter]) -> Path:
    """The folder of the model that all adapters change."""
    if base is None:
        base = _changed_model(adapters)
        if not base:
            raise ModelError(f"{adapters[0].file} does not say which model it changes; name its folder: --base FOLDER")
    path = Path(resolve(base)) if not Path(base).is_dir() else Path(base)
    if not path.is_dir() or not components(path):
        raise ModelError(f"{base!r} is no folder with safetensors on this machine; name one: --base FOLDER")
    return path


def _check_files(folders: Sequence[Path]) -> None:
    """Configurations, schedulers and tokenizers must be the first expert's."""
    first = folders[0]
    for name in ("config.json", "model_index.json", SCHEDULER, *TOKENIZERS):
        for place in sorted({p for f in folders for p in _places(f, name)}):
            for other in folders[1:]:
                difference = _difference(first / place, other / place)
                if difference:
                    kind = "tokenizer" if name in TOKENIZERS else "scheduler" if name == SCHEDULER else "architecture"
                    raise ModelError(
                        f"{other / place} differs from {first / place} ({difference}); merge experts of one {kind}"
                    )


def _places(folder: Path, name: str) -> Iterator[Path]:
    """Of the files of a name within an expert, those of its adapter left out."""
    found = (path.relative_to(folder) for path in folder.rglob(name))
    return (place for place in found if "adapter" not in place.parts)


def _difference(a: Path, b: Path) -> str:
    """What differs between two files, in a few words; empty when nothing that counts does."""
    if not (a.is_file() and b.is_file()):
        return f"missing in {(a if not a.is_file() else b).parent}"
    if a.suffix != ".json":
        return "" if a.read_bytes() == b.read_bytes() else "other content"
    try:
        left, right = (json.loads(path.read_text(encoding="utf-8")) for path in (a, b))
    except ValueError:
        return "not JSON"
    ignored = ("truncation", "padding") if a.name == "tokenizer.json" else VOLATILE
    for key in dict.fromkeys([*left, *right]):
        here, there = left.get(key), right.get(key)
        if key not in ignored and here != there:
            short = len(str(here)) + len(str(there)) < 80
            return f"{key} is {there!r}, and {here!r} in the first expert" if short else key
    return ""


def _check_shapes(folders: Sequence[Path], dense: Sequence[Mapping[str, Weights]]) -> None:
    def described(parts: Mapping[str, Weights]) -> dict[str, tuple[int, ...]]:
        return {f"{c}: {n}": shape for c, one in parts.items() for n, (_, shape) in one.shapes.items()}

    first = described(dense[0])
    for folder, parts in zip(folders[1:], dense[1:], strict=True):
        mine = described(parts)
        for name in dict.fromkeys([*first, *mine]):
            if mine.get(name) != first.get(name):
                raise ModelError(
                    f"{folder}: {name} is {_shape(mine.get(name))}, and {_shape(first.get(name))} in {folders[0]}; "
                    "merge experts of one architecture"
                )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _write_average(
    folder: Path, folders: Sequence[Path], dense: Sequence[Mapping[str, Weights]], shares: Sequence[float]
) -> None:
    for component, like in dense[0].items():

        def make(name: str, component: str = component) -> torch.Tensor:
            named = {str(f): partial(parts[component], name) for f, parts in zip(folders, dense, strict=True)}
            return files.average(named, shares, name)

        files.write(folder, component, like, make)


def _write_on_base(folder: Path, base: Path, first: Adapter, factors: Callable[[str], Factors]) -> None:
    """The base with each module's merged product added."""
    parts = components(base)
    changed: dict[tuple[str, str], str] = {}
    for module in first.modules:
        place, name = first.target(module)
        found = [
            c
            for c, w in parts.items()
            if name in w.shapes and (not place or PurePosixPath(c).parent.as_posix() == place)
        ]
        shape = (
            first.weights.shapes[f"{module}.lora_B.weight"][1][0],
            first.weights.shapes[f"{module}.lora_A.weight"][1][1],
        )
        wanted = shape[::-1] if first.config.get("fan_in_fan_out") else shape
        if len(found) != 1 or parts[found[0]].shapes[name][1] != wanted:
            raise ModelError(f"{base} has no weight {name!r} of shape {list(wanted)}, which {first.file} changes")
        changed[found[0], name] = module
    for component, like in parts.items():

        def make(name: str, component: str = component, like: Weights = like) -> torch.Tensor:
            weight = like(name)
            if (component, name) not in changed:
                return weight
            a, b, scale = factors(changed[component, name])
            delta = (b @ a).mul_(scale)
            delta = delta.T if first.config.get("fan_in_fan_out") else delta
            return (weight.to(torch.promote_types(weight.dtype, torch.float32)) + delta).to(weight.dtype)

        files.write(folder, component, like, make)


def _copy_rest(source: Path, folder: Path) -> None:
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        ours = path.name == ORIGIN or path.name.endswith(".index.json") or "adapter" in place.parts
        if path.is_file() and path.suffix in COPIED and not ours:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / place)


def _write_origin(
    folder: Path,
    experts: Sequence[str | Path],
    folders: Sequence[Path],
    shares: Sequence[float],
    average: str,
    form: str,
    used: Sequence[Adapter],
    base: Path | None,
) -> None:
    """opd.json and README.md: which experts, by their files' hashes, and how."""
    told: list[dict[str, Any]] = []
    teachers: set[str] = set()
    for i, (expert, path, share) in enumerate(zip(experts, folders, shares, strict=True)):
        paths = [used[i].file] if used else [f for weights in components(path).values() for f in weights.files]
        hashes = {f.relative_to(path).as_posix(): _sha256(f) for f in paths}
        told.append({"expert": str(expert), "weight": share, "sha256": hashes})
        teachers |= set(read_origin(path).get("teachers", []))
    merged = {"average": average, "form": form, "base": None if base is None else str(base), "experts": told}
    library = "peft" if form == "adapter" else "transformers"
    if any(folder.rglob("diffusion_pytorch_model*")) or (used and form == "adapter" and not used[0].of_peft):
        library = "diffusers"
    of = "LoRA factors A and B, each apart" if average == "factors" else "weights"
    title = folder.name.removeprefix(".").removesuffix(".partial")
    rows = "\n".join(f"| `{entry['expert']}` | {entry['weight']:.4g} |" for entry in told)
    (folder / "README.md").write_text(
        f"---\nlibrary_name: {library}\ntags: [opd, merge]\n---\n\n# {title}\n\n"
        f"The weighted average of {len(told)} experts ({of}), written by `opd merge`"
        f"{'' if form == 'dense' else ' as an adapter'}.\n\n| expert | weight |\n|---|---|\n{rows}\n",
        encoding="utf-8",
    )
    promised = promises.written(promise for path in folders for promise in promises.read(path))
    write_origin(folder, teachers=sorted(teachers), merged=merged, **promised)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
