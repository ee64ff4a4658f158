"""The kernels are compiled for cards that are not here: what needs a Hopper card must not be needed."""

import subprocess
import sys

import pytest

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024}  # of a block, on an A100, an A6000 and an L40
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from t2v import attention, kernels, recompute

NUMBERS = {"eps": "fp32", "scale": "fp32", "threshold": "i64", "seed": "*i64"} | dict.fromkeys(
    ("P", "C", "M", "W", "S", "F", "L", "HEADS", "rows", "chunks", "per_shift"), "i32"
)
FP32 = {"sums", "affine", "stats", "out", "k", "dkv"}
CASES = [
    (kernels.norm_apply, {"SILU": False, "DROP": False, "seed": None, **recompute.NORM}),
    (kernels.norm_apply, {"SILU": True, "DROP": True, **recompute.NORM_WIDE}),
    (kernels.norm_backward_sums, {"SILU": True, "DROP": True, **recompute.NORM_BACKWARD_SUMS}),
    (kernels.norm_backward_apply, {"SILU": True, "DROP": True, "CARRIED": True, **recompute.NORM_BACKWARD}),
    (kernels.layer_norm_backward, {"CARRIED": True, **recompute._whole_rows(1280)}),
    (kernels.geglu_backward, dict(recompute.GEGLU_BACKWARD)),
    (attention.temporal_attention_backward, {"A": recompute.QUERIES, "FP": 64, "D": 64}),
    (attention.short_attention_backward, {"A": recompute.QUERIES, "LP": 128, "D": 64, "num_warps": 8}),
]
for function, constants in CASES:
    options = {"num_warps": constants.pop("num_warps", 4)}
    names = function.arg_names
    types = {name: NUMBERS.get(name, "*fp32" if name in FP32 else "*bf16") for name in names}
    signature = types | dict.fromkeys(constants, "constexpr")
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=values)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    print(function.__name__, compiled.metadata.shared)
"""


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_compile_and_fit(capability):
    pytest.importorskip("triton")
    environment = {"PATH": "", "TRITON_INTERPRET": "0"}  # in a process of its own: here they may be interpreted
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shared = dict(line.split() for line in done.stdout.splitlines())
    assert len(shared) == 7
    assert all(int(size) <= SHARED_BYTES[capability] for size in shared.values()), shared
