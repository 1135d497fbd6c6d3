"""Second-order curvature of any loss in any variables: lenses, exact operators, estimates with errors, eigenvalues."""

from hesper.curvature.batches import Batch, ImageBatch
from hesper.curvature.differentiable import refuse_stochastic, twice_differentiable
from hesper.curvature.eigen import EigenPair, Spectrum, lanczos, power_iteration
from hesper.curvature.estimators import (
    Estimate,
    PointEstimate,
    diagonal,
    diagonal_from_probes,
    fisher_diagonal,
    fisher_diagonal_exact,
    quadratic_scores,
    trace,
    trace_from_probes,
)
from hesper.curvature.lens import Lens, weight_lens
from hesper.curvature.losses import CrossEntropy, DenseKL, Loss, draw_classes
from hesper.curvature.operators import GaussNewton, Hessian, MatrixOperator, SymmetricOperator, gradient
from hesper.curvature.points import (
    Point,
    axpy,
    dot,
    flatten,
    norm,
    random_normal,
    random_signs,
    scale,
    size,
    unflatten,
)
from hesper.curvature.randomness import Randomness, image_generators

__all__ = [
    "Batch",
    "CrossEntropy",
    "DenseKL",
    "EigenPair",
    "Estimate",
    "GaussNewton",
    "Hessian",
    "ImageBatch",
    "Lens",
    "Loss",
    "MatrixOperator",
    "Point",
    "PointEstimate",
    "Randomness",
    "Spectrum",
    "SymmetricOperator",
    "axpy",
    "diagonal",
    "diagonal_from_probes",
    "dot",
    "draw_classes",
    "fisher_diagonal",
    "fisher_diagonal_exact",
    "flatten",
    "gradient",
    "image_generators",
    "lanczos",
    "norm",
    "power_iteration",
    "quadratic_scores",
    "random_normal",
    "random_signs",
    "refuse_stochastic",
    "scale",
    "size",
    "trace",
    "trace_from_probes",
    "twice_differentiable",
    "unflatten",
    "weight_lens",
]
