"""Optimisers that look around the weights, and measures of how flat it is there.

`perturbed` turns a rule (where else to take gradients, and what to make of them) into
an optax transformation around any base optimiser; `sam` and its relatives are such.
The measures say how sharp a minimum is, each with its kind of proof and a witness.
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._amp import AMPState as AMPState
    from ._amp import amp as amp
    from ._cells import BallCells as BallCells
    from ._cells import Cells as Cells
    from ._cells import GridCells as GridCells
    from ._cells import kmeans_cells as kmeans_cells
    from ._classwise import ClasswiseSpectrum as ClasswiseSpectrum
    from ._classwise import batches_by_class as batches_by_class
    from ._classwise import classwise_spectrum as classwise_spectrum
    from ._correlate import CorrelationTable as CorrelationTable
    from ._correlate import correlate as correlate
    from ._diagonal_linear import DiagonalFlow as DiagonalFlow
    from ._diagonal_linear import DiagonalLinear as DiagonalLinear
    from ._engine import Call as Call
    from ._engine import Diagnostics as Diagnostics
    from ._engine import PerturbedState as PerturbedState
    from ._engine import Rule as Rule
    from ._engine import grad_fn_from as grad_fn_from
    from ._engine import perturbed as perturbed
    from ._fad import fad as fad
    from ._fsam import FisherMaskState as FisherMaskState
    from ._fsam import fisher_diagonal as fisher_diagonal
    from ._fsam import fisher_masked as fisher_masked
    from ._fsam import fsam as fsam
    from ._gam import gam as gam
    from ._gradient_regularisation import GRState as GRState
    from ._gradient_regularisation import flooding as flooding
    from ._gradient_regularisation import gr as gr
    from ._group_actions import DataDependentGL as DataDependentGL
    from ._group_actions import EllipsoidRotation as EllipsoidRotation
    from ._group_actions import GLLinear as GLLinear
    from ._group_actions import GroupAction as GroupAction
    from ._group_actions import OrthogonalRadial as OrthogonalRadial
    from ._group_actions import RescaleReLU as RescaleReLU
    from ._group_actions import linear_layers as linear_layers
    from ._hessian import Eigenpairs as Eigenpairs
    from ._hessian import ggn_operator as ggn_operator
    from ._hessian import hessian_operator as hessian_operator
    from ._hessian import hessian_top as hessian_top
    from ._hessian import hvp as hvp
    from ._imbalance import drw_weights as drw_weights
    from ._imbalance import ldam as ldam
    from ._imbalance import vs as vs
    from ._masks import complement as complement
    from ._masks import elementwise_scale as elementwise_scale
    from ._masks import layerwise_scale as layerwise_scale
    from ._masks import norm_params as norm_params
    from ._masks import random_mask_like as random_mask_like
    from ._masks import topk_mask as topk_mask
    from ._measures import first_order_flatness as first_order_flatness
    from ._measures import sharpness as sharpness
    from ._measures import sharpness_quadratic as sharpness_quadratic
    from ._objective import LogitLoss as LogitLoss
    from ._objective import MeasureResult as MeasureResult
    from ._ood_bound import OODBound as OODBound
    from ._ood_bound import Oscillation as Oscillation
    from ._ood_bound import ood_bound as ood_bound
    from ._ood_bound import oscillation as oscillation
    from ._ood_bound import relative_sharpness as relative_sharpness
    from ._sam import asam as asam
    from ._sam import sam as sam
    from ._sam import usam as usam
    from ._sam_edge import QuadraticRegression as QuadraticRegression
    from ._sam_edge import normalised_eigenvalue as normalised_eigenvalue
    from ._sam_edge import sam_edge as sam_edge
    from ._sam_sde import SamSDE as SamSDE
    from ._sam_sde import dnsam as dnsam
    from ._sam_sde import sam_sde as sam_sde
    from ._sam_sde import stationary_variance as stationary_variance
    from ._sam_variants import WeightAverage as WeightAverage
    from ._sam_variants import averaged_weights as averaged_weights
    from ._sam_variants import gsam as gsam
    from ._sam_variants import looksam as looksam
    from ._sam_variants import lsam as lsam
    from ._sam_variants import wasam as wasam
    from ._spectrum import SpectralDensity as SpectralDensity
    from ._spectrum import hessian_trace as hessian_trace
    from ._spectrum import spectral_density as spectral_density
    from ._surface import LossSurface as LossSurface
    from ._surface import loss_surface as loss_surface
    from ._teleport import TeleportReport as TeleportReport
    from ._teleport import TeleportState as TeleportState
    from ._teleport import teleport as teleport
    from ._teleport import with_teleport as with_teleport
    from ._teleport_objectives import GradNorm as GradNorm
    from ._teleport_objectives import OrbitCurvature as OrbitCurvature
    from ._teleport_objectives import PerturbedLoss as PerturbedLoss
    from ._teleport_objectives import TeleportObjective as TeleportObjective
    from ._teleport_objectives import curvature as curvature
    from ._top_eigs import TopEigs as TopEigs
    from ._top_eigs import track_top_eigs as track_top_eigs
    from ._tram import TRAMState as TRAMState
    from ._tram import tram as tram
    from ._tram import tram_fisher as tram_fisher
    from ._xor import TwoLayer as TwoLayer
    from ._xor import flatness_certificate as flatness_certificate
    from ._xor import flattest_generalizer as flattest_generalizer
    from ._xor import flattest_memorizer as flattest_memorizer
    from ._xor import interpolation_trace as interpolation_trace
    from ._xor import label_noise as label_noise
    from ._xor import make_xor as make_xor
    from ._xor import trace_lower_bound as trace_lower_bound

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "AMPState": "_amp",
        "BallCells": "_cells",
        "Call": "_engine",
        "Cells": "_cells",
        "ClasswiseSpectrum": "_classwise",
        "CorrelationTable": "_correlate",
        "DataDependentGL": "_group_actions",
        "Diagnostics": "_engine",
        "DiagonalFlow": "_diagonal_linear",
        "DiagonalLinear": "_diagonal_linear",
        "Eigenpairs": "_hessian",
        "EllipsoidRotation": "_group_actions",
        "FisherMaskState": "_fsam",
        "GLLinear": "_group_actions",
        "GRState": "_gradient_regularisation",
        "GradNorm": "_teleport_objectives",
        "GridCells": "_cells",
        "GroupAction": "_group_actions",
        "LogitLoss": "_objective",
        "LossSurface": "_surface",
        "MeasureResult": "_objective",
        "OODBound": "_ood_bound",
        "OrbitCurvature": "_teleport_objectives",
        "OrthogonalRadial": "_group_actions",
        "Oscillation": "_ood_bound",
        "PerturbedLoss": "_teleport_objectives",
        "PerturbedState": "_engine",
        "QuadraticRegression": "_sam_edge",
        "RescaleReLU": "_group_actions",
        "Rule": "_engine",
        "SamSDE": "_sam_sde",
        "SpectralDensity": "_spectrum",
        "TRAMState": "_tram",
        "TeleportObjective": "_teleport_objectives",
        "TeleportReport": "_teleport",
        "TeleportState": "_teleport",
        "TopEigs": "_top_eigs",
        "TwoLayer": "_xor",
        "WeightAverage": "_sam_variants",
        "amp": "_amp",
        "asam": "_sam",
        "averaged_weights": "_sam_variants",
        "batches_by_class": "_classwise",
        "classwise_spectrum": "_classwise",
        "complement": "_masks",
        "correlate": "_correlate",
        "curvature": "_teleport_objectives",
        "dnsam": "_sam_sde",
        "drw_weights": "_imbalance",
        "elementwise_scale": "_masks",
        "fad": "_fad",
        "first_order_flatness": "_measures",
        "fisher_diagonal": "_fsam",
        "fisher_masked": "_fsam",
        "flatness_certificate": "_xor",
        "flattest_generalizer": "_xor",
        "flattest_memorizer": "_xor",
        "flooding": "_gradient_regularisation",
        "fsam": "_fsam",
        "gam": "_gam",
        "ggn_operator": "_hessian",
        "gr": "_gradient_regularisation",
        "grad_fn_from": "_engine",
        "gsam": "_sam_variants",
        "hessian_operator": "_hessian",
        "hessian_top": "_hessian",
        "hessian_trace": "_spectrum",
        "hvp": "_hessian",
        "interpolation_trace": "_xor",
        "kmeans_cells": "_cells",
        "label_noise": "_xor",
        "layerwise_scale": "_masks",
        "ldam": "_imbalance",
        "linear_layers": "_group_actions",
        "looksam": "_sam_variants",
        "loss_surface": "_surface",
        "lsam": "_sam_variants",
        "make_xor": "_xor",
        "norm_params": "_masks",
        "normalised_eigenvalue": "_sam_edge",
        "ood_bound": "_ood_bound",
        "oscillation": "_ood_bound",
        "perturbed": "_engine",
        "random_mask_like": "_masks",
        "relative_sharpness": "_ood_bound",
        "sam": "_sam",
        "sam_edge": "_sam_edge",
        "sam_sde": "_sam_sde",
        "sharpness": "_measures",
        "sharpness_quadratic": "_measures",
        "spectral_density": "_spectrum",
        "stationary_variance": "_sam_sde",
        "teleport": "_teleport",
        "topk_mask": "_masks",
        "trace_lower_bound": "_xor",
        "track_top_eigs": "_top_eigs",
        "tram": "_tram",
        "tram_fisher": "_tram",
        "usam": "_sam",
        "vs": "_imbalance",
        "wasam": "_sam_variants",
        "with_teleport": "_teleport",
    },
)
