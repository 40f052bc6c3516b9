from .model import COMPATIBLE, COMPATIBLE_TUNER_TYPES, MixedModel, check_compatible

__all__ = ["COMPATIBLE", "COMPATIBLE_TUNER_TYPES", "MixedModel", "check_compatible"]
