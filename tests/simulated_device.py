"""An accelerator that does not exist: whole models run on it, with right values, and say what they would ask of a real one.

Its tensors report device "privateuseone:0" and hold their values on the CPU. As on CUDA, an operation that meets a CPU tensor of more than
no dimensions raises. Inside `SimulatedDevice()` everything that its tensors go through is noted:

launches: {operation: how often}; views cost nothing, and attention is one launch whatever the kernel, as is each custom op.
questions: where the host would wait for a value (`item`, `bool`, `nonzero`, boolean indexing, `unique`, `equal`).
copies: values that go between it and the CPU, either way.

Questions and copies are told by who asks: (what, file and line) of the innermost frame of reattend, or of transformers or a test where that
is farther in. With `forbidden` on, those of reattend raise `Asked`.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reattend import interventions
from reattend.interventions.engine import kernels
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

PACKAGE = str(Path(interventions.__file__).resolve().parents[1])
TESTS = str(Path(__file__).resolve().parent)
DEVICE = torch.device("privateuseone:0")
aten = torch.ops.aten

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch knows no devices that are written in Python", allow_module_level=True)
if not hasattr(torch, "privateuseone"):
    backend_registration._setup_privateuseone_for_python_backend()

ASKS = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.nonzero_numpy.default: "nonzero",
    aten.argwhere.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.equal.default: "equal",
    aten._unique2.default: "unique",
    aten._unique.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten.bincount.default: "bincount",
}
# what a launch needs none of: they make or rename memory
FREE = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten._reshape_alias.default,
    aten._unsafe_view.default,
    aten.is_same_size.default,
    aten.unbind.int,
    aten._fused_sdp_choice.default,
}
# the device that is entered: torch.tensor goes past the mode
ENTERED: list[SimulatedDevice] = []
INDEXED = {aten.index.Tensor: 1, aten._unsafe_index.Tensor: 1, aten.index_put.default: 1, aten.index_put_.default: 1}


class Asked(AssertionError):
    """A question or a copy where there may be none."""


def with_kernels_of_cuda(monkeypatch: Any) -> None:
    """Attention with its log-sum-exp is what torch's kernels for CUDA give, on this device too."""
    name = "CUDA's own choice"
    table = [
        replace(row, fits=lambda x: x.query.device == DEVICE and kernels._gives_lse(x)) if row.name == name else row
        for row in kernels.STATISTICS
    ]
    assert [row.name for row in table].count(name) == 1
    monkeypatch.setattr(kernels, "STATISTICS", table)


class OnDevice(Tensor):
    """A tensor of the device that does not exist: `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(ENTERED[-1] if ENTERED else None, func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r})"

    # torch's own refuse tensor subclasses
    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a device tensor to numpy: use .cpu() first")

    def __deepcopy__(self, memo: Any) -> Any:
        memo[id(self)] = copied = OnDevice(self.held.detach().clone())
        return copied


class SimulatedDevice(TorchDispatchMode):
    """While it is entered the device exists. See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.forbidden = False
        self.clear()

    def clear(self) -> None:
        self.launches: Counter[str] = Counter()
        self.questions: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> SimulatedDevice:
        ENTERED.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        ENTERED.remove(self)
        super().__exit__(*error)

    @property
    def total(self) -> int:
        return sum(self.launches.values())

    def ours(self, told: str) -> Counter[tuple[str, str]]:
        """Questions or copies (told: "questions", "copies") that reattend asked for."""
        return Counter({key: count for key, count in getattr(self, told).items() if not key[1].startswith("(")})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(self, func, args, kwargs or {})

    def note(self, told: str, what: str) -> None:
        where = asker()
        getattr(self, told)[what, where] += 1
        if self.forbidden and not where.startswith("("):
            raise Asked(f"{what} at {where}")


def asker() -> str:
    """ "file:line function" of reattend, in brackets where the innermost is another one's."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__:
            home = str(Path(file).resolve()) if file.startswith("/") else file
            # an environment may lie in the package's own folder
            inside = home.startswith(PACKAGE) and "site-packages" not in home[len(PACKAGE) :]
            if inside and not home.startswith(TESTS):
                return f"{home[len(PACKAGE) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
            if "/transformers/" in home or "/diffusers/" in home or home.startswith(TESTS):
                return f"({home.rsplit('/', 1)[1]}:{frame.f_lineno} {frame.f_code.co_name})"
        frame = frame.f_back
    return "(elsewhere)"


def wrapped(value: Any) -> Any:
    return OnDevice(value) if isinstance(value, Tensor) and not isinstance(value, OnDevice) else value


def held(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == DEVICE.type else value


def run(mode: SimulatedDevice | None, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, spec = tree_flatten((args, kwargs))
    mine = [x for x in flat if isinstance(x, OnDevice)]
    device = kwargs.get("device")
    wanted = None if device is None else torch.device(device).type
    if not mine and wanted != DEVICE.type:
        return func(*args, **kwargs)
    if func is aten._to_copy.default or func is aten.copy_.default:
        return transfer(mode, func, args, kwargs, wanted)
    if func is aten._fused_sdp_choice.default:
        # as torch on cards that are not Hopper's: flash attention (1), with a mask the memory-efficient kernel (2)
        return 1 if len(args) < 4 or args[3] is None else 2
    foreign = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, OnDevice) and x.dim()]
    if foreign and mine and func not in INDEXED or foreign and func in INDEXED and not isinstance(args[0], OnDevice):
        raise RuntimeError(f"{func}: expected all tensors on {DEVICE}, but found one of shape {tuple(foreign[0].shape)} on cpu")
    if mode is not None:
        count(mode, func, args, flat)
    inner_args, inner_kwargs = tree_unflatten([held(x) for x in flat], spec)
    kernel = SDPA.get(func)
    out = func(*inner_args, **inner_kwargs) if kernel is None else kernel(*inner_args, **inner_kwargs)
    if func is aten._local_scalar_dense.default or isinstance(out, (bool, int, float)):
        return out
    if func._schema.name.endswith("_") and isinstance(args[0], OnDevice):
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    return tree_map(wrapped, out)


def count(mode: SimulatedDevice, func: Any, args: Any, flat: list[Any]) -> None:
    if func in ASKS:
        mode.note("questions", ASKS[func])
    elif func in INDEXED:
        indices = [x for x in args[1] if isinstance(x, Tensor)]
        filled = func in (aten.index_put.default, aten.index_put_.default) and args[2].numel() == 1 and len(indices) == 1
        if not filled and any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            mode.note("questions", "boolean index")
        for x in indices:
            if not isinstance(x, OnDevice):
                mode.note("copies", "index from the CPU")
    if not (func.is_view or func in FREE):
        mode.launches[f"{func.namespace}.{func._opname}".removeprefix("aten.")] += 1


def transfer(mode: SimulatedDevice | None, func: Any, args: Any, kwargs: dict[str, Any], wanted: str | None) -> Any:
    """`to` and `copy_`, on the device and between it and the CPU."""
    if func is aten.copy_.default:
        into, source = args[:2]
        crosses = isinstance(into, OnDevice) != isinstance(source, OnDevice)
    else:
        into, source = None, args[0]
        crosses = wanted is not None and (wanted == DEVICE.type) != isinstance(source, OnDevice)
    if mode is not None:
        if crosses:
            mode.note("copies", "to the CPU" if isinstance(source, OnDevice) else "from the CPU")
        else:
            mode.launches[func._opname] += 1
    if into is not None:
        held(into).copy_(held(source))
        return into
    inner = {key: value for key, value in kwargs.items() if key != "device"}
    out = func(held(source), **inner)
    return out if wanted not in (None, DEVICE.type) else OnDevice(out)


def _flash(query: Tensor, key: Tensor, value: Tensor, bias: Any, is_causal: bool, scale: Any) -> tuple[Tensor, Tensor]:
    if bias is not None:
        bias = bias.to(query.dtype).expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale)


def flash(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    output, lse = _flash(query, key, value, None, is_causal, scale)
    none = torch.empty(0, dtype=torch.long)
    return output, lse, none, none, query.shape[2], key.shape[2], none, none, none


def efficient(query, key, value, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    output, lse = _flash(query, key, value, bias, is_causal, scale)
    none = torch.empty(0, dtype=torch.long)
    return output, torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=float("inf")), none, none


def cudnn(query, key, value, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    output, lse = _flash(query, key, value, bias, is_causal, scale)
    none = torch.empty(0, dtype=torch.long)
    return output, lse[..., None], none, none, query.shape[2], key.shape[2], none, none, none


SDPA = {
    aten._scaled_dot_product_flash_attention.default: flash,
    aten._scaled_dot_product_efficient_attention.default: efficient,
    aten._scaled_dot_product_cudnn_attention.default: cudnn,
}


def _empty(size, *, dtype=None, **_):
    return OnDevice(torch.empty(size, dtype=dtype))


def _empty_strided(size, stride, *, dtype=None, **_):
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, into, non_blocking=False):
    return transfer(ENTERED[-1] if ENTERED else None, aten.copy_.default, (into, source), {}, None)


def _sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if ENTERED:
        ENTERED[-1].launches["scaled_dot_product_attention"] += 1
    tensors = (query, key, value, attn_mask)
    if any(x is not None and not isinstance(x, OnDevice) for x in tensors):
        raise RuntimeError(f"attention: expected all tensors on {DEVICE}, but found one on cpu")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise NotImplementedError("this device computes attention without gradients")
    q, k, v, mask = map(held, tensors)
    with torch.no_grad():
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return OnDevice(out)


# attention is one launch, and not what torch makes of it where it knows no kernel;
# torch.tensor makes and fills its memory where no mode sees it
MEMORY = torch.library.Library("aten", "IMPL")
MEMORY.impl("empty.memory_format", _empty, "PrivateUse1")
MEMORY.impl("empty_strided", _empty_strided, "PrivateUse1")
MEMORY.impl("_copy_from", _copy_from, "PrivateUse1")
MEMORY.impl("scaled_dot_product_attention", _sdpa, "PrivateUse1")
MEMORY.impl("scaled_dot_product_attention", _sdpa, "AutogradPrivateUse1")
