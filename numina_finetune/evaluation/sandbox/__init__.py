"""A sandbox for the Python code of a model that uses the tool ``python``."""

from numina_finetune.evaluation.sandbox.limits import Execution, Limits, Minimum, Outcome
from numina_finetune.evaluation.sandbox.sandbox import Sandbox, protections, require, run_all

__all__ = ["Execution", "Limits", "Minimum", "Outcome", "Sandbox", "protections", "require", "run_all"]
