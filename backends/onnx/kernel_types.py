"""Element types for which ONNX Runtime 1.31 has CPU kernels (opset 21), where these are fewer than torch has."""

from __future__ import annotations

import torch

_F32, _F64, _I64, _I32, _I8, _U8, _BOOL = (
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
)
_FLOATS = (_F32, _F64)
_ARITHMETIC = (_F32, _F64, _I64, _I32, _I8, _U8, torch.int16)
_REDUCED = (_F32, _F64, _I64, _I32)

KERNELS: dict[str, tuple[torch.dtype, ...]] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Mod", "Abs", "Less", "LessOrEqual"), _ARITHMETIC),
    **dict.fromkeys(("Greater", "GreaterOrEqual", "Sign"), _ARITHMETIC),
    "Equal": (*_ARITHMETIC, _BOOL),
    "Neg": (_F32, _F64, _I64, _I32, _I8, torch.int16),
    **dict.fromkeys(("Max", "Min", "Clip"), (_F32, _F64, _I64, _I32, _I8, _U8)),
    "Where": (_F32, _F64, _I64, _I32, _I8, _U8),
    **dict.fromkeys(
        ("ReduceSum", "ReduceMean", "ReduceProd", "ReduceL2", "ReduceLogSumExp", "CumSum", "Pow"), _REDUCED
    ),
    **dict.fromkeys(("ReduceMax", "ReduceMin"), (*_REDUCED, _I8, _U8, _BOOL)),
    **dict.fromkeys(("ArgMax", "ArgMin"), (*_REDUCED, _I8, _U8)),
    "TopK": _ARITHMETIC,
    "MatMul": _REDUCED,
    "Range": (_F32, _F64, _I64, _I32, torch.int16),
    "Trilu": (_F32, _F64, _I64, _I32, _BOOL),
    "NonZero": (_F32, _I64, _I32, _U8, _BOOL),
    "Pad": (_F32, _F64, _I64, _I32, _I8, _U8, _BOOL),
    "Relu": (_F32, _F64, _I32, _I8),
    "IsNaN": _FLOATS,
    "IsInf": _FLOATS,
    "Round": _FLOATS,
    **dict.fromkeys(("Ceil", "Floor", "Exp", "Log", "Sqrt", "Sin", "Cos", "Tanh", "Sigmoid", "Reciprocal"), _FLOATS),
    **dict.fromkeys(("Softmax", "LogSoftmax", "LayerNormalization", "SimplifiedLayerNormalization", "Gemm"), _FLOATS),
    **dict.fromkeys(("Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cosh", "Sinh", "Tan", "Erf"), (_F32,)),
    "FusedMatMul": _FLOATS,
    **dict.fromkeys(("QuickGelu", "FastGelu"), (_F32,)),
    **dict.fromkeys(("Conv", "ConvTranspose", "AveragePool", "Softplus", "Elu", "LeakyRelu", "PRelu", "Gelu"), (_F32,)),
    **dict.fromkeys(("InstanceNormalization", "Mish", "Selu", "Celu", "HardSigmoid", "HardSwish", "Resize"), (_F32,)),
}
_WIDER = {
    _BOOL: (_U8, _I32, _F32),
    _U8: (_I32, _I64, _F32),
    _I8: (_I32, _I64, _F32),
    torch.int16: (_I32, _I64, _F32),
    _I32: (_I64, _F32),
    _I64: (_F32,),
    _F64: (_F32,),
}


def fallback_type(op_type: str, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype to compute `op_type` in where it has no kernel for `dtype`; None where it has one."""
    kernels = KERNELS.get(op_type)
    if kernels is None or dtype in kernels:
        return None
    return next((wide for wide in _WIDER.get(dtype, ()) if wide in kernels), None)
