"""The one door that changes models: attach, detach, activate, collect, merge, probe, moments."""

from lorakit.attach.active import activate, active, attached, disabled
from lorakit.attach.attach import attach, detach, unfreeze
from lorakit.attach.collect import collect
from lorakit.attach.fresh import base_fingerprint, init
from lorakit.attach.merge import merge, unmerge
from lorakit.attach.moments import moments, moments_watched
from lorakit.attach.probe import probe, recorded, refuse_unseen

__all__ = [
    "activate",
    "active",
    "attach",
    "attached",
    "base_fingerprint",
    "collect",
    "detach",
    "disabled",
    "init",
    "merge",
    "moments",
    "moments_watched",
    "probe",
    "recorded",
    "refuse_unseen",
    "unfreeze",
    "unmerge",
]
