"""All dataclasses of the configuration. `metajax/core/fields.py` reads and checks their values."""

from metajax.config.data import Data, Switch, Tasks
from metajax.config.evaluation import Choice, Evaluation, Guidance, Temperature, TopK, TopP
from metajax.config.experiment import AnyConfig, Config, Scale
from metajax.config.families import CONFIG_VERSION, config_from, config_hash, difference, require_text
from metajax.config.metadata import Metadata, MetaTokens
from metajax.config.model import Hybrid, Imported, Model, hymba_ntk_factor
from metajax.config.runtime import AUTO_MESH, AXES, Processes, Runtime, mesh_axes
from metajax.config.training import Dpo, Init, Optimizer, Training
