"""What graphs may be made of, so that other runtimes than ours can run them. No threads.

``PORTABLE_OPERATORS`` are those of Unity's Inference Engine 2 (Sentis), by its manual's page
"Supported ONNX operators", that compute the same each time and keep no state: neither control flow
nor random numbers nor recurrent cells. Unreal's ``NNERuntimeORTCpu`` is ONNX Runtime and reads every
operator of the opset; its HLSL runtime has no ``ArgMax``, which choosing needs.
"""

from __future__ import annotations

from typing import Final

OPSET: Final = 15
"""With IR 8 the newest that all of these runtimes read."""
IR_VERSION: Final = 8


class NotExportableError(Exception):
    """Why a module has no ONNX graph: one line, for the log."""


PORTABLE_OPERATORS: Final = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization
    Cast Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum
    DepthToSpace Div Dropout Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements
    GatherND Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual HardSigmoid HardSwish
    Hardmax Identity InstanceNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max
    MaxPool Mean Min Mod Mul Neg Not OneHot Or PRelu Pad Pow Range Reciprocal ReduceL1 ReduceL2
    ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape Round ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign
    Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan
    Tanh ThresholdedRelu Tile Transpose Trilu Unsqueeze Where Xor
    """.split()  # noqa: SIM905 - a paragraph is read faster than a column
)
