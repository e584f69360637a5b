"""diffusers' other backends: calls of `dispatch_attention_fn` that go to flash, sage, xformers or a hub kernel, and never reach torch's SDPA.

`dispatch_attention_fn` is plain Python that model files import by name: no mode of torch's sees it, and it could be exchanged only for the
whole process. But each call looks its backend up by the name that its processor gives (`processor._attention_backend`). So while the
forward of a marked module runs, and only then, its processor names an entry of ours in diffusers' registry, one for each of the user's
backends; it hands the call, with the arguments and after the checks that this backend has there, to whoever has marked the module in this
thread, and to the user's backend where nobody has. Between passes nothing of ours stands on a processor: copies, files, and switches of the
user's are what they are without a session. The entries leave the registry with the last session.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...interventions import Call, ReattendError, Site
from ..sites.backends import DISPATCHER, NATIVE, backend_of, is_split

PREFIX = "reattend_"
ATTRIBUTE = "_attention_backend"
MISSING = object()
# (name, device, dtype, head size) -> how to get a log-sum-exp [B, H, T] out of a backend; None where there is none to be had
_orders: dict[tuple, Callable[[Callable, dict[str, Any]], tuple[Tensor, Tensor]] | None] = {}

# what of a call its Call holds, or what says nothing about its numbers
READ = {
    "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "deterministic", "_parallel_config"
}  # fmt: skip
# see(backend, arguments) -> output [B, T, H, D]: what is done with a call of a marked module
See = Callable[["Backend", dict[str, Any]], Tensor]


class Loan:
    """A processor that names an entry of ours. own: what it named before; count: the running forwards that want it so."""

    def __init__(self, carrier: Any, entry: Any) -> None:
        self.carrier, self.entry, self.count = carrier, entry, 0
        self.own = vars(carrier).get(ATTRIBUTE, MISSING)

    def stands(self) -> bool:
        return vars(self.carrier).get(ATTRIBUTE) is self.entry

    def give_back(self) -> None:
        """The processor names what it did before, unless the user has named another backend in the meantime."""
        if self.stands():
            if self.own is MISSING:
                delattr(self.carrier, ATTRIBUTE)
            else:
                setattr(self.carrier, ATTRIBUTE, self.own)
        if _loans.get(id(self.carrier)) is self:
            del _loans[id(self.carrier)]


_lock = threading.RLock()
_loans: dict[int, Loan] = {}
_entries: dict[str, Any] = {}
_local = threading.local()


def lend(carrier: Any, see: See) -> Loan | None:
    """While this thread runs a module's forward, `see` gets its calls; None where they come to torch's SDPA anyway.

    Raises ReattendError under context parallelism, where no process sees whole attention.
    """
    if is_split(carrier):
        raise ReattendError(
            f"{type(carrier).__name__}: context parallelism was switched on inside a session; each process has only a share of the tokens "
            f"or heads: end the session, or run without enable_parallelism()"
        )
    if not hasattr(carrier, ATTRIBUTE) or DISPATCHER not in sys.modules:
        return None
    name = backend_of(carrier)
    if name in NATIVE or name not in _registry()._backends:
        return None
    with _lock:
        loan = _loans.get(id(carrier))
        if loan is None or not loan.stands():
            loan = _loans[id(carrier)] = Loan(carrier, _entry(name))
        loan.count += 1
        setattr(carrier, ATTRIBUTE, loan.entry)
    _seeing().append(see)
    return loan


def give_back(loan: Loan) -> None:
    """The forward is over."""
    _seeing().pop()
    with _lock:
        loan.count -= 1
        if loan.count <= 0:
            loan.give_back()


def take_back(carrier: Any) -> None:
    """After the last session of a processor's module: an interrupt may have left its loan in a thread that is gone."""
    with _lock:
        loan = _loans.get(id(carrier))
        if loan is not None:
            loan.give_back()


def close() -> None:
    """Takes our entries out of diffusers' registry; after the last session, safe to call twice."""
    with _lock:
        while _entries:
            name, entry = _entries.popitem()
            for table in _tables():
                table.pop(entry, None)
    _orders.clear()


def _seeing() -> list[See]:
    if not hasattr(_local, "seeing"):
        _local.seeing = []
    return _local.seeing


def _registry() -> Any:
    return sys.modules[DISPATCHER]._AttentionBackendRegistry


def _tables() -> list[dict[Any, Any]]:
    registry = _registry()
    return [registry._backends, registry._constraints, registry._supported_arg_names]


def _entry(name: str) -> Any:
    """The key of our entry for a backend: a value of diffusers' Enum that is none of its members, and whose copies are the member."""
    if name not in _entries:
        kind = sys.modules[DISPATCHER].AttentionBackendName
        entry = str.__new__(kind, PREFIX + name)
        entry._name_, entry._value_ = PREFIX + name, name
        entry.__deepcopy__ = lambda memo: kind(name)
        _entries[name] = entry
        functions, constraints, arguments = _tables()
        functions[entry], constraints[entry], arguments[entry] = Backend(name), constraints[name], arguments[name]
    return _entries[name]


class Backend:
    """Stands in for one of the user's backends."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, **arguments: Any) -> Any:
        seeing = _seeing()
        return seeing[-1](self, arguments) if seeing else self.run(arguments)

    def run(self, arguments: dict[str, Any]) -> Any:
        """The user's own backend, as diffusers would have called it: output [B, T, H, D]."""
        return _registry()._backends[self.name](**arguments)

    def with_lse(self, arguments: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """The same call, giving (output [B, H, T, D], log-sum-exp [B, H, T] float32); None where the backend has none that can be used.

        Backends that compute with quantised queries and keys have none: their sums are not those of the scores that edits go by. Under a
        mask, those that take one pack its rows, and their sums with them.
        """
        flag = next((n for n in ("return_lse", "return_attn_probs") if n in _registry()._supported_arg_names[self.name]), None)
        if flag is None or self.name.lstrip("_").startswith("sage") or arguments.get("attn_mask") is not None:
            return None
        query = arguments["query"]
        key = (self.name, query.device, query.dtype, query.shape[-1])
        if key not in _orders:
            _orders[key] = self._order(flag, query)
        order = _orders[key]
        return None if order is None else order(self.run, {**arguments, flag: True})

    def _order(self, flag: str, query: Tensor) -> Callable[[Callable, dict[str, Any]], tuple[Tensor, Tensor]] | None:
        """Asks the backend for a small call with its log-sum-exp, and compares: whether it gives one, of what shape and to which base."""
        generator = torch.Generator().manual_seed(0)
        rows, heads, dim = 32, 2, query.shape[-1]
        with torch.no_grad():
            q, k, v = (2 * torch.randn(1, rows, heads, dim, generator=generator) for _ in range(3))
            q, k, v = (x.to(query.dtype) for x in (q, k, v))
            wanted = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()).mul(dim**-0.5).logsumexp(-1)
            q, k, v = (x.to(query.device) for x in (q, k, v))
            for order in (_heads_first, _rows_first):
                try:
                    found = order(self.run, {"query": q, "key": k, "value": v, flag: True})[1]
                except Exception:
                    return None
                if found.shape == wanted.shape and torch.allclose(found.cpu().double(), wanted, atol=2e-3, rtol=0):
                    return order
        return None


def _heads_first(run: Callable, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp [B, H, T]) of a backend that gives it as [B, H, T] or [B, H, T, 1]."""
    output, lse, *_ = run(arguments)
    return output.transpose(1, 2), lse.squeeze(-1) if lse.dim() == 4 else lse


def _rows_first(run: Callable, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The same of one that gives it as [B, T, H] or [B, T, H, 1]."""
    output, lse = _heads_first(run, arguments)
    return output, lse.transpose(1, 2)


def call_of(backend: Backend, arguments: dict[str, Any], site: Site) -> Call:
    """A call of the dispatcher [B, T, H, D] as a Call [B, H, T, D], its mask read as the native backend reads it.

    Raises ReattendError for what no mask tells: block masks, causality between sequences of different lengths, further arguments.
    """

    def refuse(what: str) -> ReattendError:
        return ReattendError(
            f"{site.name}: attention backend {backend.name!r} was given {what}, which cannot be edited: call "
            f"set_attention_backend('native') on the model"
        )

    query, key, value = (arguments[name].transpose(1, 2) for name in ("query", "key", "value"))
    mask, causal = arguments.get("attn_mask"), bool(arguments.get("is_causal", False))
    if mask is not None and not isinstance(mask, Tensor):
        raise refuse(f"a mask of type {type(mask).__name__}")
    if mask is not None and mask.dim() < 4:
        by_key = mask.dim() == 2 and mask.shape == (query.shape[0], key.shape[2])
        mask = mask[:, None, None] if by_key else mask[(None,) * (4 - mask.dim())]
    if causal and query.shape[2] != key.shape[2]:
        raise refuse("causal attention of queries over other keys")
    further: dict[str, Any] = {
        name: given for name, given in arguments.items() if name not in READ and (isinstance(given, Tensor) or given)
    }
    left, right = further.pop("window_size", (-1, -1))
    softcap = further.pop("softcap", None)
    if further:
        raise refuse(f"the argument {min(further)!r}")
    if (left, right) != (-1, -1):
        mask = _in_window(mask, left, right, query.shape[2], key.shape[2], query.device)
    return Call(
        query, key, value, mask, causal, arguments.get("scale"), softcap=softcap, site=site, original_is_sdpa=False,
        original=lambda: backend.run(arguments).transpose(1, 2), original_with_lse=lambda: backend.with_lse(arguments),
    )  # fmt: skip


def _in_window(mask: Tensor | None, left: int, right: int, rows: int, keys: int, device: torch.device) -> Tensor:
    """The mask [.., Tq, Tk] that also hides what lies more than `left` before or `right` after a row; -1: no bound, as in flash."""
    distance = torch.arange(keys, device=device) - torch.arange(keys - rows, keys, device=device)[:, None]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    seen = seen[None, None]
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))
