"""Caches of keys and values in few bits: their formats, their memory, and attention that reads it as it lies there.

formats     what a layer's cache stores, and its bytes
store       one layer's memory: packed codes that only grow (codes), behind them the newest tokens (tail)
attend      attention over a store, tile by tile: by torch's operators, or by kernels built on this machine (native)
states      what a model gets for its keys and values
layers      one layer as transformers calls it
static      the same in memory that never moves, for compiled decoding; static_packed below 8 bits, with packed_ops
cache       `qfx.QuantizedCache`, a cache of transformers
"""

from __future__ import annotations

from qfx.kv.formats import CacheFormat, cache_formats

__all__ = ["CacheFormat", "cache_formats"]
