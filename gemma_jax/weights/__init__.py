"""What a layer multiplies by: the table of parameters, and the kinds of weight that hold their numbers.

Only this package looks inside a weight. Quantised weights and low-rank pairs are further kinds of `Weight`.
"""

from gemma_jax.weights.low_rank import Adapters, is_trained
from gemma_jax.weights.matmul import matmul
from gemma_jax.weights.quantization import Quantization, kind_of
from gemma_jax.weights.table import EMBEDDING, FINAL_NORM, Parameter, parameter_table
from gemma_jax.weights.weight import NO_CONTEXT, Context, Dense, Kind, Weight
