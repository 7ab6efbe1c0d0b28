"""The same program on other processors: instructions that are missing cost speed and nothing else."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from opd.language.engines.cpu import prepacked
from tests.conftest import save_tiny

OLDER = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
"""Holds torch and its matrix libraries to what most laptops have; without effect on other architectures."""

TRAIN = """
import sys

import opd.language.engines.cpu.prepacked
from opd.hardware import fast_in_bf16
from tests.tiny import short_run

opd.language.engines.cpu.prepacked.SMALLEST = 1  # a tiny model's matrices count as large
model = {"model": sys.argv[1], "template": "plain", "dtype": "bfloat16"}
result = short_run(
    sys.argv[2], model, model, ["12+7=", "abc", "9", "what is 3?", "no", "q?"], rollout={"max_new_tokens": 40}
)
assert next(result.student.parameters()).dtype.itemsize == 2
assert all("loss" not in row or row["loss"] == row["loss"] for row in result.history)
print("trained", result.summary["steps"], fast_in_bf16("cpu"))
"""


def test_bfloat16_weights_train_on_a_processor_without_avx512(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, save_tiny(tmp_path / "m"), str(tmp_path / "run")],
        env={**os.environ, **OLDER},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "trained 2 False"


def test_a_torch_without_the_private_operators_multiplies_as_usual(monkeypatch):
    """Another version may lack them, or take other arguments."""
    weight = torch.randn(1024, 256, generator=torch.Generator().manual_seed(0))

    def refuse(*arguments):
        raise TypeError("takes other arguments")

    for operators in (object(), type("Operators", (), {"_reorder_linear_weight": staticmethod(refuse)})):
        prepacked.can_prepack.cache_clear()
        monkeypatch.setattr("opd.language.engines.cpu.prepacked.torch.ops.mkldnn", operators)
        assert not prepacked.worth_packing(weight)
        layers = torch.nn.Sequential(torch.nn.Linear(256, 1024))
        with torch.no_grad(), prepacked.prepacked(layers):
            assert layers(weight[:, :256]).shape == (1024, 1024)
    monkeypatch.undo()
    prepacked.can_prepack.cache_clear()


SHAPES = """
import ctypes

import opd
import torch

memory = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(f"f{i}", ctypes.c_size_t) for i in range(10)]})
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = memory
layer = torch.nn.Linear(576, 1536, bias=False).bfloat16().requires_grad_(False)
in_use = []
for rows in range(100, 500):
    layer(torch.zeros(rows, 576, dtype=torch.bfloat16))
    in_use.append(libc.mallinfo2().f7)
print(in_use[-1] - in_use[60])
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="counts the C library's allocations")
def test_products_of_ever_new_shapes_do_not_pile_up():
    """A step of texts has a number of rows that no step before had; what is kept for each must be bounded."""
    own = {key: value for key, value in os.environ.items() if not key.endswith("CACHE_CAPACITY")}
    done = subprocess.run([sys.executable, "-c", SHAPES], env=own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 4 * 2**20
