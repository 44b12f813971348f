"""Without these, a GPU could send other bytes than a CPU, or not compile at all, and nobody without a GPU would know."""

import json
import os
import subprocess
import sys

import pytest
import torch
from exchanges import GOLDEN, assert_same, exchange, golden

pytest.importorskip(
    "triton",
    reason="triton is not installed: it comes with torch for CUDA, or with the extra 'test' on Linux x86-64",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU in Triton's interpreter: see conftest.py


@pytest.mark.parametrize("bits", [*range(1, 9), 16, 32])
@pytest.mark.parametrize("name", ["hadamard", "absmax", "minmax"])
def test_triton_computes_what_torch_does_to_the_last_bit(bits, name):
    settings = {"name": name, "bits": bits, "size": 256, "full": 6}
    for unbiased in (True, False) if name == "hadamard" and bits <= 5 else (True,):
        reference = exchange("torch", unbiased=unbiased, **settings)
        assert_same(exchange("triton", unbiased=unbiased, device=DEVICE, **settings), reference)


@pytest.mark.parametrize("size", [16, 32, 128, 1024])
def test_triton_takes_blocks_of_any_size(size):
    settings = {"name": "hadamard", "unbiased": True, "bits": 3, "size": size, "full": 6}
    assert_same(exchange("triton", device=DEVICE, **settings), exchange("torch", **settings))


def test_triton_writes_the_golden_bytes():
    assert golden("triton", DEVICE) == json.loads(GOLDEN.read_text())


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cyclebnn_dist.comm import triton_kernels as kernels

TYPES = {"flat": "*fp32", "rows": "*fp32", "grid": "*fp32", "message": "*u8", "out": "*u8"}
TYPES |= {"low": "i32", "high": "i32", "phase": "i32"}


def check(kernel, **constants):
    constants |= {"SIZE": 256, "LOG_SIZE": 8}
    signature = {n: "constexpr" if n in constants else TYPES.get(n, "*i64") for n in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=places)
    options = {"num_warps": 1, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    inexact = re.findall(r"fma[.]\\S*f32|\\S*[.]approx\\S*|\\S*[.]ftz\\S*|div[.]full\\S*", compiled.asm["ptx"])
    assert not inexact, (kernel.__name__, constants, inexact)


for kind, bits, rotates in ((0, 5, True), (1, 7, True), (2, 3, False)):
    for rounding in (0, 1) if kind == 0 else (1,):
        check(kernels._encode, BITS=bits, KIND=kind, ROUNDING=rounding, ROTATES=rotates)
    check(kernels._decode, BITS=bits, KIND=kind, ROTATES=rotates)
    check(kernels._add, BITS=bits, KIND=kind)
check(kernels._rotate_rows, INVERSE=False)
check(kernels._rotate_rows, INVERSE=True)
"""


def test_the_kernels_compile_for_a_gpu_without_fused_or_approximate_operations(tmp_path):
    """The interpreter rounds every operation by itself; this is what shows that a GPU does as well."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
