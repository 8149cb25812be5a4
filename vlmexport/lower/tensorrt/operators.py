"""What TensorRT's ONNX parser takes, as tables: read once from the parser of TensorRT for RTX, and tested against it.

TensorRT for RTX shares its parser with TensorRT 11. `tests/lower/tensorrt/test_lint.py` reads every table back from the
installed parser.
"""

from __future__ import annotations

from onnx import TensorProto

READ_FROM = "TensorRT for RTX 1.7.1.116"

# Operators of the standard domain, opset 28 (onnx 1.23), that `OnnxParser.supports_operator` denies.
NOT_IMPORTED = frozenset(
    {
        "AffineGrid",
        "Bernoulli",
        "BitCast",
        "BitShift",
        "BitwiseAnd",
        "BitwiseNot",
        "BitwiseOr",
        "BitwiseXor",
        "CenterCropPad",
        "Col2Im",
        "Compress",
        "ConcatFromSequence",
        "ConvInteger",
        "CumProd",
        "DFT",
        "DeformConv",
        "Det",
        "DynamicQuantizeLinear",
        "ImageDecoder",
        "MatMulInteger",
        "MaxRoiPool",
        "MaxUnpool",
        "MelWeightMatrix",
        "Multinomial",
        "NegativeLogLikelihoodLoss",
        "Optional",
        "OptionalGetElement",
        "OptionalHasElement",
        "QLinearConv",
        "QLinearMatMul",
        "RegexFullMatch",
        "SequenceAt",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceErase",
        "SequenceInsert",
        "SequenceLength",
        "SequenceMap",
        "SoftmaxCrossEntropyLoss",
        "SplitToSequence",
        "StringConcat",
        "StringNormalizer",
        "StringSplit",
        "SwiGLU",
        "TfIdfVectorizer",
        "Unique",
    }
)
# It has importers for these, which ask for a plugin or a kernel that the library does not ship.
NEEDS_PLUGIN = {
    "NonZero": "its output's size depends on the data, and the plugin that would do it is not shipped",
    "NonMaxSuppression": "its output's size depends on the data, and no kernel of the library does it",
    "RoiAlign": "the plugin that would do it is not shipped",
    "CausalConvWithState": "the plugin that would do it is not shipped",
    "LinearAttention": "the plugin that would do it is not shipped",
    "MatMulNBits": "the plugin that would do it is not shipped",
    "GroupQueryAttention": "the plugin that would do it is not shipped",
}
# Importers of names that the standard domain lacks. Importers go by the name alone: the domain is not looked at.
MORE_IMPORTED = frozenset(
    {"SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "MultiHeadAttention", "TRT_KVCacheUpdate"}
)
# Operators of com.microsoft that a standard one of the same name is taken for, with other inputs.
MISTAKEN = frozenset({"Attention"})

# Data types that it reads; every other one of ONNX is refused in inputs, initializers, constants and casts.
READ_TYPES = frozenset(
    {
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
        TensorProto.DOUBLE,
        TensorProto.INT64,
        TensorProto.INT32,
        TensorProto.INT8,
        TensorProto.UINT8,
        TensorProto.BOOL,
        TensorProto.INT4,
        TensorProto.FLOAT8E4M3FN,
        TensorProto.FLOAT4E2M1,
    }
)
# What may read a UINT8 tensor: inputs of the graph, and what QuantizeLinear made for DequantizeLinear.
READS_UINT8 = frozenset({"Cast", "Equal", "QuantizeLinear", "DequantizeLinear"})
# What may read INT4 and INT8 initializers (scalars apart), and it must read them directly.
READS_CODES = frozenset({"DequantizeLinear", "QuantizeLinear"})
MAX_RANK = 8

# Operators with one importable output.
ONE_OUTPUT = frozenset({"LayerNormalization", "MaxPool", "BatchNormalization"})
# (operator, attribute): the values it takes.
ATTRIBUTE_VALUES: dict[tuple[str, str], tuple[int | str, ...]] = {
    ("BatchNormalization", "training_mode"): (0,),
    ("LpPool", "p"): (1, 2),
    ("Resize", "antialias"): (0,),
    ("Resize", "keep_aspect_ratio_policy"): ("stretch",),
    ("Resize", "coordinate_transformation_mode"): (
        "half_pixel",
        "align_corners",
        "asymmetric",
        "pytorch_half_pixel",
        "tf_half_pixel_for_nn",
    ),
    ("ScatterND", "reduction"): ("none",),
    ("ScatterElements", "reduction"): ("none",),
    ("TensorScatter", "mode"): ("linear",),
}
# Operators whose windows may have no holes.
NO_DILATION = frozenset({"AveragePool", "MaxPool", "LpPool"})
# Input (by index) that must be an initializer or a constant, perhaps cast.
CONSTANT_INPUTS = {
    "ReduceL1": 1,
    "ReduceL2": 1,
    "ReduceLogSum": 1,
    "ReduceLogSumExp": 1,
    "ReduceMax": 1,
    "ReduceMean": 1,
    "ReduceMin": 1,
    "ReduceProd": 1,
    "ReduceSum": 1,
    "ReduceSumSquare": 1,
}
# Input (by index) that may be computed, but not be an input of the graph.
INNER_INPUTS = {"Squeeze": 1, "Unsqueeze": 1, "Resize": 2, "Dropout": 2, "OneHot": 1, "STFT": 1}

# Head sizes that have attention kernels, in FP16 and BF16 only; with a mask, multiples of MASKED_HEAD_STEP.
SMALLEST_HEAD, SMALLEST_MASKED_HEAD, LARGEST_HEAD, MASKED_HEAD_STEP = 9, 16, 256, 8
