"""The kernels of `kernels.cpp`, built on this machine by its C++ compiler, once; torch's operators do without.

Building takes seconds and happens where the first token is decoded over codes. The result lies beside the compiled
graphs (`qfx.storage.folders`), under a name that covers the source, the compiler and the processor. CXX names another
compiler; QFX_KERNELS=torch says that torch's operators are meant, which are slower and tell the same. Without a
compiler one QfxWarning says so.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from ctypes import POINTER, Structure, byref, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qfx import numerics, processor
from qfx.errors import Note, warn
from qfx.format import Format
from qfx.storage.folders import default_folder

if TYPE_CHECKING:
    from qfx.kv.attend import Part, View
    from qfx.kv.codes import Codes

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.cpp", "codes.h"))
ROWS = 64  # queries of one head of keys from which torch's products are faster
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC")
_X86, _OTHERS = ("-march=native", "-mprefer-vector-width=512"), ("-mcpu=native",)
_THREADS = ("-fopenmp", "-fopenmp-simd")  # the second where there is no OpenMP to link: one thread
_SCALES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}
_E4M3 = "f8e4m3"
_LOG = logging.getLogger("qfx.kv")


class _Codes(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("data", "scale", "zero", "table")),
        *((name, c_int64) for name in ("data_batch", "data_head", "scale_batch", "scale_head")),
        *((name, c_int64) for name in ("width", "scales", "group", "channels")),
        *((name, c_int32) for name in ("bits", "kind", "scale_type", "zero_bytes")),
    ]


class _Floats(Structure):
    _fields_ = [("data", c_void_p), *((name, c_int64) for name in ("batch", "head", "token", "count"))]


class _Mask(Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64 * 5), ("is_float", c_int32)]


class _Layer(Structure):
    _fields_ = [
        ("stored", _Codes * 2),
        ("first", _Floats * 2),
        ("rest", _Floats * 2),
        ("heads", c_void_p),
        *((name, c_int64) for name in ("parts_heads", "start", "end", "batch", "groups", "many", "queries")),
    ]


@functools.cache
def library() -> Any:
    """The kernels, None where there are none, which one QfxWarning says unless it is meant."""
    if os.environ.get("QFX_KERNELS") == "torch":
        return None
    made = reason = None
    try:
        made = _loaded()
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        reason = f"{error.cmd[0]} cannot build them ({lines[0]})"
    except OSError as error:
        reason = str(error)
    if made is None:
        step = "install a C++ compiler (g++), or set QFX_KERNELS=torch to do without"
        what = "attention over quantized caches runs by torch's operators, which are slower"
        warn(str(Note("qfx.QuantizedCache", f"{what}: {reason}", step)), stacklevel=2)
        return None
    made.qfx_room.argtypes = [POINTER(_Layer), c_int64, c_int64]
    made.qfx_room.restype = c_int64
    made.qfx_attend.argtypes = [POINTER(_Layer), c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64]
    made.qfx_attend.restype = None
    made.qfx_take.argtypes = [POINTER(_Floats), POINTER(_Floats), c_int64, c_int64, c_int64]
    made.qfx_encode.argtypes = [POINTER(_Floats), POINTER(_Codes), c_int64, c_int64, c_int64]
    made.qfx_encode.restype = None
    return made


def _loaded() -> ctypes.CDLL:
    """Raises OSError where there is no compiler, no folder or nothing to load, CalledProcessError where it fails."""
    named = os.environ.get("CXX")
    compiler = shutil.which(named) if named else next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler is there ({named or ', '.join(_COMPILERS)})")
    stat = Path(compiler).resolve().stat()
    parts = (
        *(path.read_bytes() for path in SOURCES),
        compiler,
        stat.st_size,
        stat.st_mtime_ns,
        processor.flags(),
        *(_FLAGS, _X86, _OTHERS, _THREADS),
    )
    name = f"kernels-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.so"
    folder = default_folder()
    if folder is not None:
        path = folder / name
        try:
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                _build(compiler, path)
            return ctypes.CDLL(str(path))
        except OSError as error:
            _LOG.info("%s: %s", path, error)
    with tempfile.TemporaryDirectory(prefix="qfx-", ignore_cleanup_errors=True) as place:
        path = Path(place) / name
        _build(compiler, path)
        return ctypes.CDLL(str(path))


def _build(compiler: str, path: Path) -> None:
    """Raises CalledProcessError where the compiler fails, OSError where the folder cannot be written."""
    started = time.perf_counter()
    scratch = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        own = _X86 if processor.is_x86() else _OTHERS
        for threads in _THREADS:
            command = [compiler, *_FLAGS, *own, threads, str(SOURCES[0]), "-o", str(scratch)]
            done = subprocess.run(command, capture_output=True, check=threads == _THREADS[-1])
            if done.returncode == 0:
                break
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    _LOG.info("built %s in %.1f s", path, time.perf_counter() - started)


def attend(q: Tensor, view: View, mask: Tensor | None, scale: float) -> Tensor | None:
    """What `qfx.kv.attend` says of queries [B, G, n, S, D]: f32 [B, G, n, S, Dv]; None where torch must do it."""
    batch, groups, many, queries, width = q.shape
    if q.device.type != "cpu" or many * queries > ROWS or (mask is not None and mask.device.type != "cpu"):
        return None
    keys = view.rest[0]
    if (batch, groups, width) != (keys.shape[0], keys.shape[1], keys.shape[3]) or not batch:
        return None  # torch says what is wrong
    made = library()
    if made is None:
        return None
    layers = [_layer(part, view, q) for part in view.parts]
    if not layers or any(layer is None for layer in layers):
        return None
    rows = q.to(torch.float32).contiguous() * scale
    out = torch.empty((batch, groups, many, queries, view.rest[1].shape[-1]), dtype=torch.float32, device=q.device)
    bias = None if mask is None else _mask(mask, (batch, groups, many, queries, len(view)))
    threads = torch.get_num_threads()
    for layer in layers:
        assert layer is not None
        heads = batch * layer[0].parts_heads
        few = len(view) * width < 1 << 14
        pieces = 1 if few else -(-threads // heads)
        room = view.scratch.floats(made.qfx_room(layer[0], pieces, threads), q.device)
        made.qfx_attend(
            layer[0], rows.data_ptr(), None if bias is None else byref(bias[0]), room.data_ptr(), out.data_ptr(),
            pieces, 1 if few else threads,
        )  # fmt: skip
    return out


def take(new: tuple[Tensor, Tensor], to: tuple[Tensor, Tensor]) -> bool | None:
    """Copy keys and values [B, G, n, D] to tensors of the same shape; whether all is finite. None: torch must do it."""
    if not all(_plain(x) for x in (*new, *to)):
        return None
    made = library()
    if made is None:
        return None
    fine = True
    for x, place in zip(new, to, strict=True):
        batch, heads, _, width = x.shape
        fine &= bool(made.qfx_take(byref(floats_of(x)), byref(floats_of(place)), batch, heads, width))
    return fine


def encode(x: Tensor, codes: Codes, at: int) -> bool:
    """Store x [B, G, n, D] as tokens at, at + 1, ... of codes, as `Codes.write` does; False: torch must do it."""
    if codes.kind != "i8/tok/f16" or x.shape[2] > ROWS or not _plain(x):
        return False
    made = library()
    if made is None:
        return False
    codes.reserve(at + x.shape[2], at)
    struct = codes_of(codes)
    if struct is None:
        return False
    made.qfx_encode(byref(floats_of(x)), byref(struct), x.shape[0], x.shape[1], at)
    return True


def _plain(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.stride(3) == 1


def _layer(part: Part, view: View, q: Tensor) -> tuple[_Layer, list[Tensor]] | None:
    """The struct, and tensors that must live as long."""
    codes = [codes_of(part.keys), codes_of(part.values)]
    if codes[0] is None or codes[1] is None:
        return None
    kept: list[Tensor] = []
    made = _Layer()
    made.stored[0], made.stored[1] = codes
    for ends, floats in ((made.first, view.first), (made.rest, view.rest)):
        for role, given in enumerate(floats):
            x = given if _plain(given) else given.to(torch.float32).contiguous()
            kept.append(x)
            ends[role] = floats_of(x)
    if part.heads is not None:
        made.heads = part.heads.data_ptr()
    made.parts_heads = part.keys.data.shape[1]
    made.start, made.end = view.start, view.end
    made.batch, made.groups, made.many, made.queries = q.shape[:4]
    return made, kept


def floats_of(x: Tensor) -> _Floats:
    """f32 [B, G, n, D] with consecutive channels."""
    batch, head, token, _ = x.stride()
    return _Floats(x.data_ptr(), batch, head, token, x.shape[2])


def codes_of(codes: Codes) -> _Codes | None:
    """The struct of codes, made where their memory is new; None for what the kernels do not know."""
    known = codes.native
    if known is not None and known[0] is codes.data and known[1] is codes.scale:
        kept: _Codes | None = known[2]
        return kept
    made = _struct(codes)
    codes.native = (codes.data, codes.scale, made)
    return made


def _struct(codes: Codes) -> _Codes | None:
    fmt, data, scale, zero = codes.fmt, codes.data, codes.scale, codes.zero
    if data.device.type != "cpu" or fmt.is_plain or fmt.bits > 8 or scale.dtype not in _SCALES:
        return None
    rows = data.stride()[2:] == (codes.width, 1) and scale.stride()[2:] == (scale.shape[3], 1)
    if data.numel() and not (rows and (zero is None or zero.stride() == scale.stride())):
        return None
    table = _table(fmt.type) if fmt.is_float and fmt.type != _E4M3 else None
    channels = (fmt.group or codes.width) if not codes.by_tokens else 1
    return _Codes(
        data.data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr(),
        None if table is None else table.data_ptr(), *data.stride()[:2], *scale.stride()[:2],
        codes.width, scale.shape[3], codes.group, min(channels, codes.width), fmt.bits,
        3 if fmt.type == _E4M3 else 2 if table is not None else 0 if fmt.symmetric else 1, _SCALES[scale.dtype],
        0 if zero is None else zero.element_size(),
    )  # fmt: skip


@functools.cache
def _table(kind: str) -> Tensor:
    """What each code of a floating type stands for."""
    fmt = Format(kind)
    codes = torch.arange(1 << fmt.bits, dtype=torch.uint8, device="cpu")
    if fmt.bits == 8:
        codes = codes.view(fmt.code_dtype)
    return numerics.dequantize(codes, fmt, torch.ones((), device="cpu")).to(torch.float32).contiguous()


def _mask(mask: Tensor, shape: tuple[int, ...]) -> tuple[_Mask, Tensor]:
    """A mask of up to five dimensions that broadcasts to [B, G, n, S, L], and the tensor that must live as long."""
    plain = mask if mask.dtype == torch.bool else mask.to(torch.float32)
    whole = plain.expand(shape)
    return _Mask(whole.data_ptr(), (c_int64 * 5)(*whole.stride()), int(plain.dtype != torch.bool)), whole
