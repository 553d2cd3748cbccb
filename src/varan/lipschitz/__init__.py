"""Lipschitz constants of networks, proved.

How far can a network's output move when its input moves? `local_lipschitz` answers
with an upper bound that is a proof and a value that is attained; `jacobian_bounds`,
`jvp_bounds`, `monotone` and `certified_radius` are its uses. `bounds` encloses the
outputs themselves.

A model is an Equinox module in inference mode, any JAX callable of one input without
batch axis, or a pair `(weights, biases)` of a ReLU network. A set of inputs is a `Box`.
Everything but branch and bound works under `jit`, `vmap` and `grad`.
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._branch import BaB as BaB
    from ._builder import register_activation as register_activation
    from ._certified_training import ibp_initialise as ibp_initialise
    from ._certified_training import ibp_loss as ibp_loss
    from ._certified_training import ibp_margins as ibp_margins
    from ._certified_training import sabr_loss as sabr_loss
    from ._curves import PiecewiseLinear as PiecewiseLinear
    from ._curves import SmoothCurve as SmoothCurve
    from ._exact import ExactLipschitz as ExactLipschitz
    from ._exact import exact_lipschitz as exact_lipschitz
    from ._expert_rate import ExpertRate as ExpertRate
    from ._expert_rate import estimate_expert_rate as estimate_expert_rate
    from ._expert_rate import linear_expert_rate as linear_expert_rate
    from ._extensions import Kirszbraun as Kirszbraun
    from ._extensions import McShane as McShane
    from ._feature_game import GameNode as GameNode
    from ._feature_game import GameResult as GameResult
    from ._feature_game import feature_game as feature_game
    from ._filters import FilterBank as FilterBank
    from ._filters import random_filters as random_filters
    from ._filters import wavelet_filters as wavelet_filters
    from ._filters import weyl_heisenberg_filters as weyl_heisenberg_filters
    from ._forward import bounds as bounds
    from ._graph import BoundGraph as BoundGraph
    from ._great_score import Calibration as Calibration
    from ._great_score import GreatScore as GreatScore
    from ._great_score import calibrate_temperature as calibrate_temperature
    from ._great_score import great_score as great_score
    from ._great_score import great_score_samples as great_score_samples
    from ._grid_safety import GridSafety as GridSafety
    from ._grid_safety import grid_safety as grid_safety
    from ._iclrnn import ICLRNN as ICLRNN
    from ._iclrnn import nonnegative_spectral as nonnegative_spectral
    from ._imitation import LipschitzPolicy as LipschitzPolicy
    from ._imitation import lipschitz_policy as lipschitz_policy
    from ._keypoints import Keypoints as Keypoints
    from ._keypoints import sift_keypoints as sift_keypoints
    from ._ldlt import LDLTBlock as LDLTBlock
    from ._ldlt import ResidualBlock as ResidualBlock
    from ._ldlt import certify as certify
    from ._ldlt import lmi as lmi
    from ._linear_fractional import LinearFractional as LinearFractional
    from ._lipschitz import jacobian_bounds as jacobian_bounds
    from ._lipschitz import jvp_bounds as jvp_bounds
    from ._lipschitz import local_lipschitz as local_lipschitz
    from ._lipsdp import LipSDPResult as LipSDPResult
    from ._lipsdp import lipsdp as lipsdp
    from ._lowrank_sdp import SDPResult as SDPResult
    from ._lowrank_sdp import lowrank_sdp as lowrank_sdp
    from ._lq_vae import LQVAE as LQVAE
    from ._manifold import ManifoldSolution as ManifoldSolution
    from ._manifold import laplacian_weights as laplacian_weights
    from ._manifold import manifold_lipschitz as manifold_lipschitz
    from ._milp import exact_bounds as exact_bounds
    from ._monotone import Monotonicity as Monotonicity
    from ._monotone import monotone as monotone
    from ._nodes import UnsupportedPrimitive as UnsupportedPrimitive
    from ._norms import spectral_norm_bound as spectral_norm_bound
    from ._norms import spectral_norm_estimate as spectral_norm_estimate
    from ._one_lipschitz import AOL as AOL
    from ._one_lipschitz import SLL as SLL
    from ._one_lipschitz import SpectralNormLinear as SpectralNormLinear
    from ._onnx import OnnxNetwork as OnnxNetwork
    from ._onnx import load_onnx as load_onnx
    from ._orthogonal_conv import OrthConv2d as OrthConv2d
    from ._orthogonal_conv import OrthogonalConvExistence as OrthogonalConvExistence
    from ._orthogonal_conv import OrthogonalityErrors as OrthogonalityErrors
    from ._orthogonal_conv import construct_orthogonal_conv as construct_orthogonal_conv
    from ._orthogonal_conv import conv_singular_values as conv_singular_values
    from ._orthogonal_conv import orth_conv_loss as orth_conv_loss
    from ._orthogonal_conv import orthogonal_conv_exists as orthogonal_conv_exists
    from ._orthogonal_conv import orthogonality_errors as orthogonality_errors
    from ._radius import certified_radius as certified_radius
    from ._relu_program import layer_bounds as layer_bounds
    from ._result import LipschitzResult as LipschitzResult
    from ._scattering import FrameBounds as FrameBounds
    from ._scattering import FrameModule as FrameModule
    from ._scattering import FrameNet as FrameNet
    from ._scattering import admissible as admissible
    from ._scattering import frame_bounds as frame_bounds
    from ._scattering import normalize_frame as normalize_frame
    from ._scattering import translation_bound as translation_bound
    from ._sets import Ball as Ball
    from ._sets import Box as Box
    from ._smoothed_samples import SimplexMap as SimplexMap
    from ._smoothed_samples import SmoothedSamples as SmoothedSamples
    from ._smoothed_samples import lvm_maps as lvm_maps
    from ._smoothed_samples import smooth_samples as smooth_samples
    from ._smoothing import SmoothedCertificate as SmoothedCertificate
    from ._smoothing import certify_samples as certify_samples
    from ._smoothing import choose_map as choose_map
    from ._smoothing import smooth_certify as smooth_certify
    from ._smoothing import smoothed_lipschitz as smoothed_lipschitz
    from ._spectral_cap import rms_cap as rms_cap
    from ._spectral_cap import rms_muon as rms_muon
    from ._spectral_cap import spectral_cap as spectral_cap
    from ._spectral_cap import spectral_weight_decay as spectral_weight_decay
    from ._tightness import expected_tightness as expected_tightness
    from ._tightness import propagation_tightness as propagation_tightness
    from ._transformer import LipschitzTransformer as LipschitzTransformer
    from ._transformer import lipschitz_bound as lipschitz_bound
    from ._universal import UniversalPerturbation as UniversalPerturbation
    from ._universal import aggregate_gradients as aggregate_gradients
    from ._universal import fooling_rate as fooling_rate
    from ._universal import universal_perturbation as universal_perturbation
    from ._verify import Verification as Verification
    from ._verify import robustness_property as robustness_property
    from ._verify import verify as verify
    from ._vnnlib import UnsafeCase as UnsafeCase
    from ._vnnlib import read_vnnlib as read_vnnlib

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "AOL": "_one_lipschitz",
        "BaB": "_branch",
        "Ball": "_sets",
        "BoundGraph": "_graph",
        "Box": "_sets",
        "Calibration": "_great_score",
        "ExactLipschitz": "_exact",
        "ExpertRate": "_expert_rate",
        "FilterBank": "_filters",
        "FrameBounds": "_scattering",
        "FrameModule": "_scattering",
        "FrameNet": "_scattering",
        "GameNode": "_feature_game",
        "GameResult": "_feature_game",
        "GreatScore": "_great_score",
        "GridSafety": "_grid_safety",
        "ICLRNN": "_iclrnn",
        "Keypoints": "_keypoints",
        "Kirszbraun": "_extensions",
        "LDLTBlock": "_ldlt",
        "LQVAE": "_lq_vae",
        "LinearFractional": "_linear_fractional",
        "LipSDPResult": "_lipsdp",
        "LipschitzPolicy": "_imitation",
        "LipschitzResult": "_result",
        "LipschitzTransformer": "_transformer",
        "ManifoldSolution": "_manifold",
        "McShane": "_extensions",
        "Monotonicity": "_monotone",
        "OnnxNetwork": "_onnx",
        "OrthConv2d": "_orthogonal_conv",
        "OrthogonalConvExistence": "_orthogonal_conv",
        "OrthogonalityErrors": "_orthogonal_conv",
        "PiecewiseLinear": "_curves",
        "SDPResult": "_lowrank_sdp",
        "ResidualBlock": "_ldlt",
        "SLL": "_one_lipschitz",
        "SimplexMap": "_smoothed_samples",
        "SmoothCurve": "_curves",
        "SmoothedCertificate": "_smoothing",
        "SmoothedSamples": "_smoothed_samples",
        "SpectralNormLinear": "_one_lipschitz",
        "UniversalPerturbation": "_universal",
        "UnsafeCase": "_vnnlib",
        "UnsupportedPrimitive": "_nodes",
        "Verification": "_verify",
        "admissible": "_scattering",
        "aggregate_gradients": "_universal",
        "bounds": "_forward",
        "calibrate_temperature": "_great_score",
        "certified_radius": "_radius",
        "certify": "_ldlt",
        "certify_samples": "_smoothing",
        "choose_map": "_smoothing",
        "construct_orthogonal_conv": "_orthogonal_conv",
        "conv_singular_values": "_orthogonal_conv",
        "estimate_expert_rate": "_expert_rate",
        "exact_bounds": "_milp",
        "exact_lipschitz": "_exact",
        "expected_tightness": "_tightness",
        "feature_game": "_feature_game",
        "fooling_rate": "_universal",
        "frame_bounds": "_scattering",
        "great_score": "_great_score",
        "great_score_samples": "_great_score",
        "grid_safety": "_grid_safety",
        "ibp_initialise": "_certified_training",
        "ibp_loss": "_certified_training",
        "ibp_margins": "_certified_training",
        "jacobian_bounds": "_lipschitz",
        "jvp_bounds": "_lipschitz",
        "laplacian_weights": "_manifold",
        "linear_expert_rate": "_expert_rate",
        "lipschitz_bound": "_transformer",
        "lipschitz_policy": "_imitation",
        "layer_bounds": "_relu_program",
        "lipsdp": "_lipsdp",
        "lmi": "_ldlt",
        "load_onnx": "_onnx",
        "lowrank_sdp": "_lowrank_sdp",
        "local_lipschitz": "_lipschitz",
        "lvm_maps": "_smoothed_samples",
        "manifold_lipschitz": "_manifold",
        "monotone": "_monotone",
        "nonnegative_spectral": "_iclrnn",
        "normalize_frame": "_scattering",
        "orth_conv_loss": "_orthogonal_conv",
        "orthogonal_conv_exists": "_orthogonal_conv",
        "orthogonality_errors": "_orthogonal_conv",
        "propagation_tightness": "_tightness",
        "random_filters": "_filters",
        "read_vnnlib": "_vnnlib",
        "register_activation": "_builder",
        "rms_cap": "_spectral_cap",
        "rms_muon": "_spectral_cap",
        "robustness_property": "_verify",
        "sabr_loss": "_certified_training",
        "sift_keypoints": "_keypoints",
        "smooth_certify": "_smoothing",
        "smooth_samples": "_smoothed_samples",
        "smoothed_lipschitz": "_smoothing",
        "spectral_cap": "_spectral_cap",
        "spectral_norm_bound": "_norms",
        "spectral_norm_estimate": "_norms",
        "spectral_weight_decay": "_spectral_cap",
        "translation_bound": "_scattering",
        "universal_perturbation": "_universal",
        "verify": "_verify",
        "wavelet_filters": "_filters",
        "weyl_heisenberg_filters": "_filters",
    },
)
