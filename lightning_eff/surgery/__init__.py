"""Channels of a network: find them, mask them, cut them, carry optimizer and checkpoint across the cut, count costs."""

from lightning_eff.surgery.cut import Cut, apply_plan
from lightning_eff.surgery.errors import BudgetError, PruningGraphError, SurgeryError
from lightning_eff.surgery.export import export_model
from lightning_eff.surgery.gates import Gates
from lightning_eff.surgery.graph import ChannelGraph, ChannelGroup, Member
from lightning_eff.surgery.plan import PruningPlan
from lightning_eff.surgery.prefix import PrefixCache, record_together
from lightning_eff.surgery.profile import Latency, Profile, measure_latency, profile
from lightning_eff.surgery.structure import apply_structure, load_pruned, prunable, save_pruned, structure_of
from lightning_eff.surgery.trial import Trial

__all__ = [
    "BudgetError",
    "ChannelGraph",
    "ChannelGroup",
    "Cut",
    "Gates",
    "Latency",
    "Member",
    "PrefixCache",
    "Profile",
    "PruningGraphError",
    "PruningPlan",
    "SurgeryError",
    "Trial",
    "apply_plan",
    "apply_structure",
    "export_model",
    "load_pruned",
    "measure_latency",
    "profile",
    "prunable",
    "record_together",
    "save_pruned",
    "structure_of",
]
