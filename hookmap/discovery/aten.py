"""The vocabulary of ATen operators: groups of operators by what they do to numbers, shapes and positions.

An operator has the name of its overload packet, such as `add` for aten.add.Tensor and aten.add_.Tensor alike.
Operators that PyTorch composes of others (reshape, chunk, layer_norm, lstm) are in no group: a dataflow is recorded
below autograd, where only their parts are seen. `alias_update` is the dataflow's own: a view of memory that was
written to.
"""

# Shapes: the result holds numbers of the argument, each as it was.
RESHAPES = {"view", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze"}
"""the same numbers in the same order"""
TURNS = {"transpose", "permute", "t"}
"""the same numbers, with the axes in another order"""
CUTS = {"slice": 0, "select": 0, "unbind": 0, "split": 1, "split_with_sizes": 1}
"""pieces along one axis -> the number of arguments between the tensor and the axis"""
REPEATS = {"expand", "repeat"}
ALIASES = {"alias", "detach"}
VIEWS = {*RESHAPES, *TURNS, *CUTS, *REPEATS, *ALIASES}
COPIES = {"_to_copy", "clone", "lift_fresh", "native_dropout"}
MOVES = VIEWS | COPIES
"""operators that compute nothing: they only say where a number goes"""
JOINS = {"cat", "stack"}
SAME = {*RESHAPES, *ALIASES, "clone", "lift_fresh", "_to_copy", "slice", "expand", "constant_pad_nd"}
"""the argument itself, where the result has its dtype and as many numbers"""
ONLY_SHAPE = {
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like",
    "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided",
}  # fmt: skip
"""operators that read no number of their argument"""
DRAWS = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "poisson",
    "multinomial", "normal", "uniform", "random", "exponential", "geometric", "log_normal", "cauchy", "binomial",
}  # fmt: skip
"""operators that draw numbers at random"""

# Arithmetic.
ADDITIONS = {"add", "sub", "rsub"}
MULTIPLICATIONS = {"mul", "div"}
ACTIVATIONS = {
    "silu", "gelu", "sigmoid", "tanh", "relu", "leaky_relu", "softplus", "clamp", "clamp_min", "clamp_max", "elu",
    "hardswish", "mish",
}  # fmt: skip
"""functions of each number that are not linear"""
POINTWISE = {
    *ADDITIONS, *MULTIPLICATIONS, *ACTIVATIONS, "neg", "where", "masked_fill", "pow", "exp", "minimum", "maximum",
    "rsqrt", "sqrt", "reciprocal", "abs",
}  # fmt: skip
BATCHED_PRODUCTS = {"bmm", "baddbmm"}
MATRIX_PRODUCTS = {"mm", "addmm", *BATCHED_PRODUCTS}
PRODUCTS = {*MATRIX_PRODUCTS, "convolution", "_grouped_mm", "dot", "mv"}
"""operators that sum over features; one operand is the weights, or both are activations"""
SOFTMAXES = {"_softmax", "_safe_softmax"}
TOP_K = {"topk", "sort"}
"""what chooses a token's experts"""

# Norms.
NORMS = {"native_layer_norm", "_fused_rms_norm"}
STATISTICS = {"mean", "sum", "var", "std", "linalg_vector_norm"}
EXTREMES = {"amax", "amin", "max", "min"}
ROOTS = {"rsqrt", "sqrt", "std", "linalg_vector_norm"}

LIGHT = {
    *POINTWISE, *MOVES, *JOINS, *NORMS, *STATISTICS, *EXTREMES, *ROOTS,
    "alias_update", "copy", "constant_pad_nd", "roll", "lerp", "addcmul",
}  # fmt: skip
"""operators that multiply with no matrix"""

# Positions.
SHIFTS = {*CUTS, *JOINS, "constant_pad_nd", "roll", "copy"}
"""operators that at most move the sequence along"""
REORDERS = {
    "index", "index_select", "gather", "masked_select", "scatter", "scatter_add", "index_add", "index_put",
    "_grouped_mm", *TOP_K,
}  # fmt: skip
"""operators whose result has an order that the data decides: tokens on their way to experts and back"""
ALONG_AXES = {
    **dict.fromkeys(("sum", "mean", "prod", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean"), 1),
    **dict.fromkeys(("any", "all", "median", "logsumexp", "_softmax", "_log_softmax", "flip", "unfold"), 1),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "_logcumsumexp"), 1),
    **dict.fromkeys(("_fft_r2c", "_fft_c2c", "_fft_c2r"), 1),
    **dict.fromkeys(("linalg_vector_norm", "norm", "roll", "renorm"), 2),
}
"""operators along axes -> which argument names the axes; where none does, all axes are meant"""
ALONG_AN_INDEX = {"index_select", "gather", "scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy"}
"""operators that read or write in the order of an index along one axis: the tensor, the axis, the index"""
DECAYS = {"exp", "softplus", "cumsum"}
"""how a scan forgets"""
CUMULATIVE = {"cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "_logcumsumexp"}
"""operators that carry a value along an axis"""
RECURRENT = {"mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn"}


def is_fused_attention(name: str) -> bool:
    """Whether one operator computes a whole attention, such as `_scaled_dot_product_flash_attention`."""
    return name.startswith("_scaled_dot_product") or name == "_native_multi_head_attention"
