"""moediff: turn one pretrained diffusion model into a mixture of efficient timestep experts."""

from diffusers import ModelMixin

from moediff.allowance import Allowance, Step
from moediff.anatomy import Anatomy, Layer, Slice, Unit, Width
from moediff.cost import Budget, Cost, CostModel, cost_model
from moediff.denoising import denoising_loss
from moediff.engine import build_experts
from moediff.errors import (
    MoediffError,
    NoEffectWarning,
    PluginWarning,
)
from moediff.hookspecs import hookimpl
from moediff.masking import masked
from moediff.mixture import ExpertMixture
from moediff.plan import Blueprint, Plan
from moediff.recipe import Recipe
from moediff.recipefile import load_recipe
from moediff.registry import Registry, installed
from moediff.roles import Measurement
from moediff.sampling import Sampling, generate
from moediff.space import Chain, Scores, SearchSpace
from moediff.subject import Subject
from moediff.surgery import cut
from moediff.task import Task
from moediff.timesteps import Intervals
from moediff.workdir import Run

__all__ = [
    "Allowance",
    "Anatomy",
    "Blueprint",
    "Budget",
    "Chain",
    "Cost",
    "CostModel",
    "ExpertMixture",
    "Intervals",
    "Layer",
    "Measurement",
    "ModelMixin",
    "MoediffError",
    "NoEffectWarning",
    "Plan",
    "PluginWarning",
    "Recipe",
    "Registry",
    "Run",
    "Sampling",
    "Scores",
    "SearchSpace",
    "Slice",
    "Step",
    "Subject",
    "Task",
    "Unit",
    "Width",
    "build_experts",
    "cost_model",
    "cut",
    "denoising_loss",
    "generate",
    "hookimpl",
    "installed",
    "load_recipe",
    "masked",
]
