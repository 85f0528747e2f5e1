"""All dataclasses of the configuration. `metajax/core/fields.py` reads and checks their values."""

from metajax.config.clip import PIXEL_MEAN, PIXEL_STD, PUBLISHED, Clip, preset
from metajax.config.data import Data, Switch, Tasks
from metajax.config.dpo import Dpo
from metajax.config.evaluation import Choice, Evaluation, Guidance, Temperature, TopK, TopP
from metajax.config.experiment import Config, Scale
from metajax.config.families import CONFIG_VERSION, AnyConfig, config_from, config_hash, difference, require_text
from metajax.config.images import AUGMENTATIONS, OF_TEXT, ImageConfig, Images, Prompts
from metajax.config.metadata import Metadata, MetaTokens
from metajax.config.model import Hybrid, Imported, Model, hymba_ntk_factor
from metajax.config.runtime import AXES, Processes, Runtime, mesh_axes
from metajax.config.training import Init, Optimizer, Training

__all__ = [
    "AUGMENTATIONS",
    "AXES",
    "CONFIG_VERSION",
    "OF_TEXT",
    "PIXEL_MEAN",
    "PIXEL_STD",
    "PUBLISHED",
    "AnyConfig",
    "Choice",
    "Clip",
    "Config",
    "Data",
    "Dpo",
    "Evaluation",
    "Guidance",
    "Hybrid",
    "ImageConfig",
    "Images",
    "Imported",
    "Init",
    "MetaTokens",
    "Metadata",
    "Model",
    "Optimizer",
    "Processes",
    "Prompts",
    "Runtime",
    "Scale",
    "Switch",
    "Tasks",
    "Temperature",
    "TopK",
    "TopP",
    "Training",
    "config_from",
    "config_hash",
    "difference",
    "hymba_ntk_factor",
    "mesh_axes",
    "preset",
    "require_text",
]
