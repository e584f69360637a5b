"""Kernels compile for GPUs that this machine need not have, and fit their memory: the interpreter sees neither types nor sizes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton, which is there on Linux: pip install -e .[dev]")

# what a block may have on cards of compute capability 8.6 and 8.9, which have least
SHARED_MEMORY = 101_376

SCRIPT = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from reattend.interventions.edits.weights import TINY
from reattend.interventions.engine.triton import correction, statistics

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8", torch.uint8: "u8", torch.int64: "i64"}

class Compiled:
    '''Stands where a kernel stands: compiles it for what it is launched with.'''
    def __init__(self, kernel, changing):
        self.kernel, self.changing = kernel, changing

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *values, num_warps, num_stages, **constants):
        names, signature, fixed, facts = self.kernel.arg_names, {}, dict(constants), {}
        for place, (name, value) in enumerate(zip(names, values)):
            if isinstance(value, torch.Tensor):
                signature[name], facts[(place,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
            elif value is None or (value == 1 and name not in self.changing):
                signature[name], fixed[name] = "constexpr", value
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
                if signature[name] == "i32" and value % 16 == 0 and name not in self.changing:
                    facts[(place,)] = [["tt.divisibility", 16]]
        signature.update({name: "constexpr" for name in constants})
        places = {(names.index(name),): value for name, value in fixed.items()}
        for capability in (80, 90):
            source = ASTSource(self.kernel, signature, places, facts)
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps, "num_stages": num_stages})
            print(capability, constants.get("KIND", "sums"), "shared", made.metadata.shared, flush=True)

correction._correct = Compiled(correction._correct, correction.CHANGING)
statistics._sum_columns = Compiled(statistics._sum_columns, statistics.CHANGING)

def correct(kind, dtype, dim, queries, mask=None, rest=0, amounts=False, rows=False, sinks=False, added=False, softcap=None):
    heads, shared, keys = 8, 2, 64
    query, key, value = (torch.zeros(2, h, n, dim, dtype=dtype) for h, n in ((heads, queries), (shared, keys), (shared, keys)))
    mask = {"bool": torch.ones(2, 1, queries, keys).bool(), "additive": torch.zeros(2, 1, queries, keys, dtype=dtype)}.get(mask)
    marks = torch.zeros(1, 1, keys, dtype=torch.float32 if kind in correction.BIASES else torch.int8)
    correction.correct(
        torch.zeros_like(query), query, key, value, query, torch.zeros(2, heads, queries), mask, mask is None and queries > 1, 0.1, softcap,
        torch.zeros(heads) if sinks else None, torch.zeros(2, 1, keys) if added else None, marks, torch.zeros(1, 1, keys).long(),
        torch.zeros(1, 1).long(), torch.zeros(2, heads, queries) if amounts else None, torch.ones(2, queries).bool() if rows else None, kind,
        rest, 0.5, 0.5, 0.5, keys - queries,
    )

def sums(dtype, dim, queries, mask=None):
    query, key = torch.zeros(2, 8, queries, dim, dtype=dtype), torch.zeros(2, 2, 64, dim, dtype=dtype)
    mask = torch.ones(2, 1, queries, 64).bool() if mask else None
    statistics.sum_columns(query, key, torch.zeros(2, 8, queries), mask, mask is None, 0.1, None, torch.ones(2, queries).bool(),
                           torch.zeros(2, 8, 64), torch.zeros(2, 1, 64))

exec(sys.argv[1])
"""

CASES = {
    "one set": 'correct("transfer", torch.bfloat16, 128, 64, rest=2, amounts=True)',
    "one set at decode": 'correct("lift", torch.bfloat16, 128, 1, mask="bool", sinks=True, rows=True)',
    "sets": 'correct("gain over a set", torch.float16, 80, 64, mask="additive", amounts=True, added=True)',
    "image": 'correct("give back", torch.bfloat16, 64, 1, mask="bool", amounts=True)',
    "bias": 'correct("bias", torch.bfloat16, 128, 64, sinks=True, softcap=30.0)',
    "score gain": 'correct("score gain", torch.bfloat16, 64, 1, rows=True)',
    "identity": 'correct("identity", torch.bfloat16, 64, 64, mask="bool", amounts=True)',
    "float32": 'correct("gain", torch.float32, 128, 64)',
    "wide heads": 'correct("exact lift", torch.bfloat16, 256, 64)',
    "wide heads in float32": 'correct("gain alone", torch.float32, 256, 64)',
    "statistics": "sums(torch.bfloat16, 128, 64)",
    "statistics of wide heads in float32": "sums(torch.float32, 256, 64, mask=True)",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_kernels_compile(name):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, CASES[name]], capture_output=True, text=True, env=environment, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    sizes = [int(line.rsplit(maxsplit=1)[1]) for line in run.stdout.splitlines() if "shared" in line]
    assert len(sizes) == 2 and max(sizes) <= SHARED_MEMORY
