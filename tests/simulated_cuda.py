"""A simulated CUDA device for machines without one.

    with SimulatedCuda() as gpu:                                values, by the CPU's kernels
    with SimulatedCuda(values=False, limit=12 * 2**30) as gpu:  shapes alone, of models of any size

Within it torch.cuda is there, and a tensor of the device is a Sim: to Python one of cuda:0, to
torch's C++ code one of PrivateUse1, the backend of devices that torch does not know, so that
autograd and factories take it for a device of its own. Below autograd each operation comes to
SimulatedCuda.dispatch, which checks it as CUDA would and computes it on the tensors that the Sims
hold.

It sees
- tensors of the host beside those of the device, where CUDA refuses them;
- where the host waits for the device (gpu.waits): copies between the two, but those from pinned
  memory that are non-blocking; shapes that depend on values; numbers that the host asks for;
- what varlen_attn demands of its arguments, and attention that departs from its definition;
- memory: the bytes of all tensors (gpu.alive), the most at once (gpu.peak), OutOfMemoryError
  beyond gpu.limit;
- costs: kernels, FLOPs, bytes that they read and write, and from these a bound of the time.

It cannot see the numbers of CUDA's kernels and their limits, operations that have none, which
kernel SDPA and cuDNN choose, races, streams, fragmentation, workspaces other than those of
varlen_attn, NCCL and several devices, and speed beyond that bound.
"""

import contextlib
import math
import os
import sys
import weakref
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import elm

BACKEND = "simulated"  # what C++ calls the device
CUDA = torch.device("cuda", 0)  # what Python calls it
GIB = 2**30

# -----------------------------------------------------------------------------
# torch's private interface

PRIVATE_NAMES = (
    "Tensor._make_wrapper_subclass",
    "_C._acc.PrivateUse1Hooks",
    "_C._disabled_torch_function_impl",
    "_C._get_privateuse1_backend_name",
    "_C._only_lift_cpu_tensors",
    "_C._set_only_lift_cpu_tensors",
    "autograd._engine_run_backward",
    "utils.backend_registration._setup_privateuseone_for_python_backend",
    "nn.attention.varlen._varlen_attn",
)  # fmt: skip


def missing_interface() -> str:
    """What this torch lacks of the private interface that the simulation is made of, or ""."""
    import torch.nn.attention.varlen  # noqa: F401, else it is no attribute yet

    for name in PRIVATE_NAMES:
        owner = torch
        for part in name.split("."):
            if not hasattr(owner, part):
                return f"torch {torch.__version__} has no torch.{name}, which the simulation needs"
            owner = getattr(owner, part)
    return ""


class BackendModule:
    """torch.simulated: what torch asks of the module of a backend. There is a device only while
    one is simulated."""

    def is_available(self) -> bool:
        return bool(RUNNING)

    def device_count(self) -> int:
        return len(RUNNING)

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass


def register_backend() -> None:
    """Once in a process, for good."""
    if torch._C._get_privateuse1_backend_name() == BACKEND:
        return

    class Hooks(torch._C._acc.PrivateUse1Hooks):
        def is_available(self) -> bool:
            return bool(RUNNING)

        def has_primary_context(self, device_id: int) -> bool:
            return True

        def is_built(self) -> bool:
            return True

    torch.utils.backend_registration._setup_privateuseone_for_python_backend(
        BACKEND, BackendModule(), Hooks())
    # CUDA has a kernel for it, so that it comes to us whole; without one, autograd would take it
    # apart. It is never called: Sims are dispatched before.
    LIBRARY.impl("silu_backward", lambda *_: None, "PrivateUse1")


LIBRARY = torch.library.Library("aten", "IMPL")
RUNNING: list["SimulatedCuda"] = []


# -----------------------------------------------------------------------------
# Tensors of the device


class Sim(Tensor):
    """A tensor on the device. `inner` holds its values, on the CPU, or only its shape, on meta."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Sim":
        sim = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=f"{BACKEND}:0")
        sim.inner = inner
        return sim

    # None where torch lacks it: see missing_interface
    __torch_function__ = getattr(torch._C, "_disabled_torch_function_impl", None)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return RUNNING[-1].dispatch(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    @property
    def is_meta(self) -> bool:
        return False

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        Tensor.data.__set__(self, new)
        self.inner = new.inner

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec)

    def __repr__(self, **_) -> str:
        return f"Sim({self.inner!r})"

    def __deepcopy__(self, memo: dict) -> "Sim":
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        for name, value in vars(self).items():
            if name != "inner":
                setattr(copied, name, value)
        return copied


def inner_of(x):
    return x.inner if isinstance(x, Sim) else x


def backend_device() -> torch.device:
    """The device as C++ knows it."""
    return torch.device(BACKEND, 0)


def is_name_of_device(device) -> bool:
    return device is not None and torch.device(device).type in (BACKEND, "cuda")


def pin_memory(tensor: Tensor) -> Tensor:
    """In the place of Tensor.pin_memory. Reader threads call it."""
    pinned = tensor.clone()
    pinned.is_in_pinned_memory = True
    return pinned


def is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor, "is_in_pinned_memory", False)


# -----------------------------------------------------------------------------
# Operations: what CUDA refuses, and where the host waits

COPIES = ("_to_copy", "copy_")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
# Operations of which the host needs the outcome: a number, a shape or an error.
WAITING = (
    "_linalg_check_errors", "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero",
    "masked_select", "nonzero", "unique_consecutive", "unique_dim")  # fmt: skip


class Wait(NamedTuple):
    """The host waited for the device."""

    reason: str
    functions: tuple[str, ...]  # of elm.py that were running, the innermost last
    line: int  # of elm.py, in the innermost

    @property
    def function(self) -> str:
        return self.functions[-1] if self.functions else ""


def find_caller(reason: str) -> Wait:
    functions = []
    line = 0
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == elm.__file__:
            line = line or frame.f_lineno
            name = frame.f_code.co_name
            if not name.startswith("<"):  # no lambda, no comprehension
                functions.insert(0, name)
        frame = frame.f_back
    return Wait(reason, tuple(functions), line)


class Operation:
    """A call of one of ATen's operations, or of a custom one."""

    def __init__(self, func, args: tuple, kwargs: dict):
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.name = func._schema.name.split("::")[1]
        self.tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.on_device = [x for x in self.tensors if isinstance(x, Sim)]
        self.on_host = [x for x in self.tensors if not isinstance(x, Sim)]
        device = kwargs.get("device")
        self.goes_to_device = is_name_of_device(device)
        self.goes_to_host = device is not None and not self.goes_to_device
        if self.name == "copy_":
            self.goes_to_device = isinstance(args[0], Sim)
            self.goes_to_host = not self.goes_to_device

    def arguments(self) -> SimpleNamespace:
        """All arguments by their names, also those that have their defaults."""
        named = {}
        for i, argument in enumerate(self.func._schema.arguments):
            if i < len(self.args):
                named[argument.name] = self.args[i]
            else:
                named[argument.name] = self.kwargs.get(argument.name, argument.default_value)
        return SimpleNamespace(**named)

    def concerns_device(self) -> bool:
        names_device = any(is_name_of_device(x) for x in self.args if isinstance(x, torch.device))
        return bool(self.on_device) or self.goes_to_device or names_device

    def source(self) -> Tensor:
        """What a copy copies."""
        return self.args[1] if self.name == "copy_" else self.args[0]

    def is_copy_to_device(self) -> bool:
        return self.name in COPIES and self.goes_to_device and not isinstance(self.source(), Sim)

    def is_copy_to_host(self) -> bool:
        return self.name in COPIES and self.goes_to_host and isinstance(self.source(), Sim)

    def refused_tensors(self) -> list[Tensor]:
        """Tensors of the host that CUDA does not take beside those of the device. It takes single
        numbers, and indices, which it copies. (Some operations refuse single numbers, too: that
        is not seen.)"""
        if not self.on_device or self.name in COPIES:
            return []
        candidates = self.on_host
        if self.name in INDEXING:
            candidates = [x for x in self.on_host if not self.is_index(x)]
            if candidates and candidates[0] is self.args[0]:  # indices of the device
                return candidates
        return [x for x in candidates if x.ndim > 0]

    def is_index(self, tensor: Tensor) -> bool:
        return any(tensor is index for index in self.args[1])

    def reason_to_wait(self) -> str:
        """Why the host waits for the device in it, or ""."""
        if self.is_copy_to_host():
            return "copy to the host"
        if self.is_copy_to_device():
            is_non_blocking = self.arguments().non_blocking
            return "" if is_non_blocking and is_pinned(self.source()) else "copy to the device"
        if self.name in WAITING:
            return self.name
        if self.name in INDEXING:
            indices = [index for index in self.args[1] if index is not None]
            if any(not isinstance(index, Sim) for index in indices):
                return "index of the host"
            if any(index.dtype == torch.bool for index in indices):
                return "index by a mask"
        return ""

    def is_view(self) -> bool:
        """Whether its results only look at other tensors' bytes."""
        return any(result.alias_info is not None and not result.alias_info.is_write
                   for result in self.func._schema.returns)

    def changed_tensors(self) -> list[Tensor]:
        """That it writes to in place."""
        given = vars(self.arguments())
        changed = []
        for argument in self.func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                changed += [x for x in tree_leaves(given[argument.name]) if isinstance(x, Tensor)]
        return changed


# -----------------------------------------------------------------------------
# Attention by its definition


def visible_keys(num_tokens: int, window: list[int]) -> Tensor:
    """[queries, keys] bool of one example: query i sees keys i - left to i + right; -1: all."""
    left, right = window
    positions = torch.arange(num_tokens)
    distance = positions[:, None] - positions  # of a query from a key before it
    visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool)
    if left >= 0:
        visible &= distance <= left
    if right >= 0:
        visible &= -distance <= right
    return visible


class PackedAttention:
    """Attention within each of several examples packed end to end: q [T, heads, d], k and v with as
    many heads or fewer. In fp32, on the CPU."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float | None,
                 window: list[int] | None):
        self.group_size = q.shape[1] // k.shape[1]
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.window = window or [-1, -1]
        self.lengths = bounds.diff().tolist()
        self.q = self.by_example(q)
        self.k = self.by_example(k.repeat_interleave(self.group_size, 1))
        self.v = self.by_example(v.repeat_interleave(self.group_size, 1))

    def by_example(self, x: Tensor) -> list[Tensor]:
        """[T, heads, d] -> [heads, t, d] fp32 of each example."""
        return [part.transpose(0, 1).float() for part in x.split(self.lengths)]

    def pack(self, parts: list[Tensor]) -> Tensor:
        """[heads, t, d] of each example -> [T, heads, d]."""
        return torch.cat([part.transpose(0, 1) for part in parts])

    def scores(self, i: int) -> Tensor:
        """[heads, queries, keys] of example i."""
        scores = self.q[i] @ self.k[i].mT * self.scale
        return scores.masked_fill(~visible_keys(self.lengths[i], self.window), -torch.inf)

    def forward(self) -> tuple[Tensor, Tensor]:
        """(output [T, heads, d], logarithm of the softmax's denominator [heads, T])."""
        outputs = []
        denominators = []
        for i, v in enumerate(self.v):
            scores = self.scores(i)
            outputs.append(scores.softmax(-1) @ v)
            denominators.append(scores.logsumexp(-1))
        return self.pack(outputs), torch.cat(denominators, dim=1)

    def backward(self, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient at the output [T, heads, d] -> those at q, k and v."""
        at_q = []
        at_k = []
        at_v = []
        for i, at_output in enumerate(self.by_example(gradient)):
            shares = self.scores(i).softmax(-1)
            at_shares = at_output @ self.v[i].mT
            inner_product = (at_shares * shares).sum(-1, keepdim=True)
            at_scores = shares * (at_shares - inner_product) * self.scale
            at_q.append(at_scores @ self.k[i])
            at_k.append(at_scores.mT @ self.q[i])
            at_v.append(shares.mT @ at_output)
        return self.pack(at_q), self.sum_groups(at_k), self.sum_groups(at_v)

    def sum_groups(self, parts: list[Tensor]) -> Tensor:
        """Over the query heads that share a head of keys."""
        return self.pack(parts).unflatten(1, (-1, self.group_size)).sum(2)


def check_varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> None:
    """Raises: RuntimeError at what flash attention's kernel for rows of any lengths refuses, or at
    bounds that are not those of the row."""
    head_dim = q.shape[-1]
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError(f"FlashAttention only support fp16 and bf16 data type, not {q.dtype}")
    if bounds.dtype != torch.int32 or not bounds.is_contiguous():
        raise RuntimeError(f"cu_seqlens must be contiguous int32, not {bounds.dtype}")
    if head_dim % 8 or head_dim > 256:
        raise RuntimeError(f"head_dim {head_dim}: must be a multiple of 8 up to 256")
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise RuntimeError("the last dimension of q, k and v must be contiguous")
    if int(bounds[0]) != 0 or int(bounds[-1]) != len(q):
        raise RuntimeError(f"cu_seqlens {bounds.tolist()} are not those of {len(q)} tokens")
    if int(bounds.diff().max()) != longest:
        raise RuntimeError(f"max_q = {longest}: the longest example has {int(bounds.diff().max())}")


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention by its definition, of Sims: torch has no kernel for a backend
    that it does not know. Without values, as CUDA's kernels have it: no scores are held, but a mask
    in the query's dtype; no gradient."""
    if dropout_p:
        raise NotImplementedError("dropout in attention")
    if not RUNNING[-1].values and not torch.is_grad_enabled():
        if attn_mask is not None:
            attn_mask.to(query.dtype)
        return torch.empty_like(query)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.float() @ key.float().mT * scale
    if is_causal:
        queries = torch.arange(query.shape[-2], device=backend_device())
        keys = torch.arange(key.shape[-2], device=backend_device())
        scores = scores.masked_fill(queries[:, None] < keys, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    shares = scores.softmax(-1)
    sees_nothing = (scores == -torch.inf).all(-1, keepdim=True)  # as padding at the left
    return (shares.masked_fill(sees_nothing, 0.0) @ value.float()).to(query.dtype)


# -----------------------------------------------------------------------------
# Memory and costs


class Memory:
    """The bytes of the tensors behind Sims, as torch's allocator counts them."""

    BLOCK = 512  # it gives out multiples of so many bytes

    def __init__(self, limit: int):
        self.limit = limit
        self.alive = 0
        self.peak = 0
        self.held: set[int] = set()  # storages, by address
        self.is_in_backward = False
        self.shortage = ""  # of a backward pass that still runs, as a message

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor's storage until nothing refers to it. Raises: OutOfMemoryError."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self.held:
            return
        num_bytes = math.ceil(storage.nbytes() / self.BLOCK) * self.BLOCK
        self.need(num_bytes)
        self.held.add(address)
        self.alive += num_bytes
        weakref.finalize(storage, self.release, address, num_bytes)

    def release(self, address: int, num_bytes: int) -> None:
        self.held.discard(address)
        self.alive -= num_bytes

    def need(self, num_bytes: int) -> None:
        """For a moment, beside what is alive. Raises: OutOfMemoryError."""
        if self.alive + num_bytes <= self.limit:
            self.peak = max(self.peak, self.alive + num_bytes)
            return
        message = (f"CUDA out of memory (simulated): tried to allocate {num_bytes:,} bytes beside "
                   f"{self.alive:,} of {self.limit:,}")
        if not self.is_in_backward:
            raise torch.OutOfMemoryError(message)
        self.shortage = self.shortage or message

    @contextlib.contextmanager
    def raise_after_backward(self):
        """Around a backward pass: a shortage within it is raised when it has ended, as torch calls
        Python for the backend while it unwinds, and aborts if recomputation has raised an error."""
        if self.is_in_backward:  # one within another
            yield
            return
        self.shortage = ""
        self.is_in_backward = True
        try:
            yield
        finally:
            self.is_in_backward = False
        if self.shortage:
            raise torch.OutOfMemoryError(self.shortage)

    def reset_peak(self) -> None:
        self.peak = self.alive


class Rates(NamedTuple):
    """What a card does in a second."""

    flops: dict[torch.dtype, float]
    num_bytes: float


# 75 to 90 % of an H200's data sheet: 989e12 in half precision, 67e12 in fp32 and in fp64, 4.8e12
# bytes.
H200 = Rates(
    {torch.bfloat16: 790e12, torch.float16: 790e12, torch.float32: 50e12, torch.float64: 55e12},
    4.3e12)

# Operations that start no kernel, beside views.
WITHOUT_KERNEL = (
    "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "alias", "detach", "empty",
    "empty_like", "empty_strided", "lift_fresh", "new_empty", "new_empty_strided", "set_", "unbind",
    "view_as")  # fmt: skip
MATRIX_PRODUCTS = ("addmm", "baddbmm", "bmm", "mm")
LOOKUPS = ("embedding", "gather", "index", "index_select")  # which read as much as they write


class Costs:
    """Sums over operations, and by their names. `seconds`: each takes at least the time of its
    FLOPs, and at least that of its bytes."""

    def __init__(self, rates: Rates):
        self.rates = rates
        self.clear()

    def clear(self) -> None:
        self.flops: Counter[torch.dtype] = Counter()
        self.num_bytes = 0
        self.num_kernels: Counter[str] = Counter()  # by operation
        self.seconds: Counter[str] = Counter()  # by operation

    def add(self, operation: Operation, results: list[Tensor]) -> None:
        if operation.is_view() or operation.name in WITHOUT_KERNEL:
            return
        dtype = operation.tensors[0].dtype if operation.tensors else torch.float32
        flops = count_flops(operation)
        num_bytes = count_bytes(operation, results)
        self.flops[dtype] += flops
        self.num_bytes += num_bytes
        self.num_kernels[operation.name] += 1
        seconds_of_flops = flops / self.rates.flops.get(dtype, self.rates.flops[torch.float32])
        seconds_of_bytes = num_bytes / self.rates.num_bytes
        self.seconds[operation.name] += max(seconds_of_flops, seconds_of_bytes)


def count_flops(operation: Operation) -> int:
    """Of matrix products; a multiplication and an addition are two. Of others none are counted."""
    if operation.name in MATRIX_PRODUCTS:
        a, b = operation.tensors[-2:]
        return 2 * a.numel() * b.shape[-1]
    if operation.name == "_varlen_attn":  # two products
        return 2 * count_of_attention_product(operation)
    if operation.name == "_varlen_attn_backward":  # five, of which one repeats the forward pass's
        return 5 * count_of_attention_product(operation)
    return 0


def count_of_attention_product(operation: Operation) -> int:
    """FLOPs of one product of queries and keys, where these see each other."""
    given = operation.arguments()
    _, num_heads, head_dim = given.query.shape
    window = given.window_size or [-1, -1]
    lengths = Counter(inner_of(given.cu_seq_q).diff().tolist())
    num_pairs = sum(n * count_visible(length, window) for length, n in lengths.items())
    return 2 * num_pairs * num_heads * head_dim


def count_visible(num_tokens: int, window: list[int]) -> int:
    """The pairs of a query and a key that it sees, of one example: see visible_keys."""
    left, right = window
    positions = torch.arange(num_tokens)
    first = torch.zeros_like(positions)
    last = torch.full_like(positions, num_tokens - 1)
    if left >= 0:
        first = (positions - left).clamp(min=0)
    if right >= 0:
        last = (positions + right).clamp(max=num_tokens - 1)
    return int((last - first + 1).sum())


def count_bytes(operation: Operation, results: list[Tensor]) -> int:
    """That the tensors of an operation have, each once."""
    read = operation.tensors
    if operation.name in LOOKUPS:
        read = [*operation.tensors[1:], *results]
    return sum(x.numel() * x.element_size() for x in [*read, *results])


# -----------------------------------------------------------------------------
# Shapes alone

# Operations of which the results' shapes depend on values.
SHAPED_BY_VALUES = ("_unique2", "bincount", "masked_select", "nonzero", "unique_consecutive",
                    "unique_dim")


def is_known(tensor: Tensor) -> bool:
    """Whether its values are there, not its shape alone."""
    return inner_of(tensor).device.type != "meta"


def is_worth_knowing(tensor: Tensor) -> bool:
    """Of shapes alone we keep what lengths, masks and decisions are made of: integers, bools and
    single numbers, as far as they follow from values of the host."""
    return not tensor.is_floating_point() or tensor.numel() == 1


def as_meta(x):
    """The shape alone of a tensor. Single numbers of the host stay what they are."""
    inner = inner_of(x)
    is_single = not isinstance(x, Sim) and isinstance(x, Tensor) and x.ndim == 0
    if not isinstance(inner, Tensor) or inner.device.type == "meta" or is_single:
        return inner
    return torch.empty_strided(inner.shape, inner.stride(), dtype=inner.dtype, device="meta")


def without_masks(operation: Operation) -> tuple:
    """The arguments of an indexing operation with numbers of rows in place of masks."""
    tensor, indices, *rest = operation.args
    numbers = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            numbers.append(index)
            continue
        if not is_known(index):
            raise NotImplementedError("a mask whose values are not known")
        numbers += [places.contiguous() for places in inner_of(index).nonzero().unbind(1)]
    return (tensor, numbers, *rest)


def run_on_shapes(operation: Operation):
    """The results of an operation on meta; on the CPU where all that it reads is known, and its
    results are worth knowing."""
    is_all_known = all(is_known(x) for x in operation.tensors)
    if is_all_known and operation.name in SHAPED_BY_VALUES:
        return run_at(operation, "cpu", inner_of, operation.args)
    if operation.name in SHAPED_BY_VALUES:
        raise NotImplementedError(f"{operation.name} of values that are not known")
    args = without_masks(operation) if operation.name in INDEXING else operation.args
    results = run_at(operation, "meta", as_meta, args)
    are_worth_it = all(is_worth_knowing(x) for x in tree_leaves(results) if isinstance(x, Tensor))
    if is_all_known and are_worth_it:
        return run_at(operation, "cpu", inner_of, operation.args)
    return results


def run_at(operation: Operation, home: str, convert, args: tuple):
    """Run it on the tensors that `convert` makes of its own, at `home` where it makes new ones."""
    kwargs = dict(operation.kwargs)
    if operation.goes_to_device and "device" in kwargs:
        kwargs["device"] = torch.device(home)
    return operation.func(*tree_map(convert, args), **tree_map(convert, kwargs))


def invented_values(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What the host gets of values that are not known: ones, or zeros of integers and bools."""
    value = 1 if dtype.is_floating_point else 0
    return torch.full(tensor.shape, value, dtype=dtype)


# -----------------------------------------------------------------------------
# The device


class SimulatedCuda:
    """One device, while it is entered. `limit`: the bytes of its memory.

    Attributes: waits, a list of Wait; memory; costs. Its tensors are of use only while it is
    entered."""

    def __init__(self, values: bool = True, limit: int = 80 * GIB, rates: Rates = H200):
        self.values = values
        self.memory = Memory(limit)
        self.costs = Costs(rates)
        self.waits: list[Wait] = []
        self.sync_debug_mode = "default"
        self.dispatch_mode = DispatchMode(self)
        self.stack = contextlib.ExitStack()
        self.own_operations = {
            "_varlen_attn": self.varlen_attn,
            "_varlen_attn_backward": self.varlen_attn_backward}

    @property
    def alive(self) -> int:
        """Bytes of all tensors on the device."""
        return self.memory.alive

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once, since reset_peak."""
        return self.memory.peak

    def reset_peak(self) -> None:
        self.memory.reset_peak()

    # Entering and leaving

    def __enter__(self) -> "SimulatedCuda":
        register_backend()
        RUNNING.append(self)
        self.stack.callback(RUNNING.remove, self)
        for name, stand_in in self.stand_ins().items():
            self.stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        self.stack.enter_context(mock.patch.dict(os.environ))  # elm sets the allocator's
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks once in a process
        self.stack.enter_context(mock.patch.object(Tensor, "pin_memory", pin_memory))
        self.stack.enter_context(mock.patch.object(nn.Module, "_apply", apply_and_tie))
        # A backward pass is to run in the thread that asks for it, where the modes are.
        self.stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        self.run_engine = torch.autograd._engine_run_backward
        self.stack.enter_context(
            mock.patch.object(torch.autograd, "_engine_run_backward", self.run_backward))
        # torch.tensor(…, device=…) is to copy by an operation.
        lifts_cpu_tensors_only = torch._C._only_lift_cpu_tensors()
        self.stack.callback(torch._C._set_only_lift_cpu_tensors, lifts_cpu_tensors_only)
        torch._C._set_only_lift_cpu_tensors(True)
        self.stack.enter_context(DeviceNames())
        self.stack.enter_context(self.dispatch_mode)
        return self

    def __exit__(self, *exception) -> None:
        self.stack.close()

    def stand_ins(self) -> dict:
        """Of functions of torch.cuda."""
        properties = SimpleNamespace(
            name="simulated", major=9, minor=0, total_memory=self.memory.limit,
            multi_processor_count=132)
        return {
            "current_device": lambda: 0,
            "device_count": lambda: 1,
            "empty_cache": lambda: None,
            "get_device_capability": lambda *_: (9, 0),
            "get_device_name": lambda *_: properties.name,
            "get_device_properties": lambda *_: properties,
            "is_available": lambda: True,
            "is_bf16_supported": lambda including_emulation=True: True,
            "is_current_stream_capturing": lambda: False,
            "manual_seed_all": lambda seed: None,
            "max_memory_allocated": lambda *_: self.peak,
            "mem_get_info": lambda *_: (self.memory.limit - self.alive, self.memory.limit),
            "memory_allocated": lambda *_: self.alive,
            "reset_peak_memory_stats": lambda *_: self.reset_peak(),
            "set_device": lambda device: None,
            "set_sync_debug_mode": self.set_sync_debug_mode,
            "synchronize": lambda *_: None}

    def run_backward(self, *args, **kwargs):
        """What torch.autograd.grad and backward call. They come here by DeviceNames, which torch
        has left by then; recomputation needs it again."""
        with DeviceNames(), self.memory.raise_after_backward():
            return self.run_engine(*args, **kwargs)

    def set_sync_debug_mode(self, mode: str) -> None:
        self.sync_debug_mode = mode

    # Operations

    def dispatch(self, func, args: tuple, kwargs: dict):
        operation = Operation(func, args, kwargs)
        if not operation.concerns_device():
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # autograd, which takes some apart, is not above us
            with self.dispatch_mode:
                results = func.decompose(*args, **kwargs)
            if results is not NotImplemented:
                return results
        self.check_devices(operation)
        self.note_wait(operation)
        if operation.is_copy_to_host() or operation.name == "_local_scalar_dense":
            return self.give_to_host(operation)
        if operation.name == "equal" and not self.values:
            return True  # of shapes alone
        results = self.compute(operation)
        tensors = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
        self.costs.add(operation, tensors)
        wrapped = tree_map(self.wrap, results)
        if operation.changed_tensors():  # it returns the very tensor that it has changed
            return return_and_correct_aliasing(func, args, kwargs, wrapped)
        return wrapped

    def check_devices(self, operation: Operation) -> None:
        refused = operation.refused_tensors()
        if refused:
            shapes = [tuple(x.shape) for x in refused]
            raise RuntimeError("Expected all tensors to be on the same device, but found at least "
                               f"two devices, cuda:0 and cpu! {operation.name} of {shapes}")

    def note_wait(self, operation: Operation) -> None:
        reason = operation.reason_to_wait()
        if not reason:
            return
        self.waits.append(find_caller(reason))
        if self.sync_debug_mode == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation: {reason}")

    def give_to_host(self, operation: Operation):
        """The result of an operation that lies on the host."""
        if operation.name == "_local_scalar_dense":
            (tensor,) = operation.args
            if is_known(tensor):
                return inner_of(tensor).item()
            return invented_values(tensor, tensor.dtype).item()
        source = operation.source()
        if is_known(source):
            return operation.func(*tree_map(inner_of, operation.args), **operation.kwargs)
        dtype = operation.kwargs.get("dtype") or source.dtype
        if operation.name == "copy_":
            return operation.args[0].copy_(invented_values(source, dtype))
        return invented_values(source, dtype)

    def compute(self, operation: Operation):
        if operation.name in self.own_operations:
            return self.own_operations[operation.name](operation.arguments())
        if self.values:
            return run_at(operation, "cpu", inner_of, operation.args)
        results = run_on_shapes(operation)
        if not all(is_known(x) for x in operation.tensors):
            for changed in operation.changed_tensors():
                self.forget(changed)
        return results

    def forget(self, sim: Sim) -> None:
        """The values of a tensor that now has others, which are not known."""
        if is_known(sim):
            sim.inner = as_meta(sim)
            self.memory.hold(sim.inner)

    def wrap(self, x):
        if not isinstance(x, Tensor) or isinstance(x, Sim):
            return x
        self.memory.hold(x)
        return Sim(x)

    # varlen_attn, of which the CPU has no kernel

    def varlen_attn(self, given: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
        """(output, logarithm of the softmax's denominator, state of the random generator)."""
        q, k, v, bounds = map(inner_of, (given.query, given.key, given.value, given.cu_seq_q))
        check_varlen(q, k, v, bounds, given.max_q)
        random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        if not self.values:
            denominators = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
            return torch.empty_like(q), denominators, random_state
        attention = PackedAttention(q, k, v, bounds, given.scale, given.window_size)
        output, denominators = attention.forward()
        return output.to(q.dtype), denominators, random_state

    def varlen_attn_backward(self, given: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, bounds = map(inner_of, (given.query, given.key, given.value, given.cu_seq_q))
        if not self.values:
            gradients = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
            num_bytes = sum(x.numel() * x.element_size() for x in gradients)
            self.memory.need(num_bytes + backward_workspace(q, k, len(bounds) - 1))
            return gradients
        attention = PackedAttention(q, k, v, bounds, given.scale, given.window_size)
        gradients = attention.backward(inner_of(given.grad_out))
        return tuple(x.to(q.dtype) for x in gradients)


def backward_workspace(q: Tensor, k: Tensor, num_examples: int) -> int:
    """Bytes that flash attention 2 (mha_varlen_bwd) holds beside its results: the gradient at q and
    the sums of its softmax in fp32, of rows that are padded to multiples of 128 tokens; where query
    heads share keys, the gradients at k and v of each query head."""
    num_tokens, num_heads, head_dim = q.shape
    num_padded = num_tokens + 128 * num_examples
    padded_dim = math.ceil(head_dim / 32) * 32
    num_bytes = 4 * num_padded * num_heads * (padded_dim + 1)
    if k.shape[1] != num_heads:
        num_bytes += 2 * q.numel() * q.element_size()
    return num_bytes


class DispatchMode(TorchDispatchMode):
    """Brings operations that make tensors here; those that read Sims come by these."""

    def __init__(self, gpu: SimulatedCuda):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.gpu.dispatch(func, args, kwargs or {})


class DeviceNames(TorchFunctionMode):
    """What Python calls cuda is to C++ the backend."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and isinstance(args[0], Sim):
            return scaled_dot_product_attention(*args, **kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = self.rename(torch.device(kwargs["device"]))
        if func in (Tensor.to, Tensor.cuda):  # which take a device's name by position
            args = tuple(self.rename_text(x) for x in args)
        return func(*(self.rename(x) for x in args), **kwargs)

    def rename(self, x):
        if isinstance(x, torch.device) and x.type == "cuda":
            return backend_device()
        return x

    def rename_text(self, x):
        if isinstance(x, str) and x.split(":")[0] == "cuda":
            return backend_device()
        return x


own_apply = nn.Module._apply


def apply_and_tie(module: nn.Module, function, recurse: bool = True) -> nn.Module:
    """nn.Module._apply, after which parameters that were one still are. (To a device that C++
    knows, torch moves a parameter in place; to this one it makes a new one for each name.)"""
    places_of: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                places_of.setdefault(parameter, []).append((owner, name))
    own_apply(module, function, recurse)
    for (first_owner, first_name), *others in places_of.values():
        for owner, name in others:
            owner._parameters[name] = first_owner._parameters[first_name]
    return module
