"""One frozen configuration tree, made from Flower's run config and validated once.

Every field of `RunConfig` and its sections is a run-config key: `TrainConfig.learning_rate` is `train.learning-rate`. Its default there, its
default in `pyproject.toml` and its line in docs/configuration.md are the same; a test compares them.
"""

from fbl_flower.config.attack import NOT_ROBUST as NOT_ROBUST
from fbl_flower.config.attack import AttackConfig as AttackConfig
from fbl_flower.config.options import Limits as Limits
from fbl_flower.config.options import Value as Value
from fbl_flower.config.options import shortened as shortened
from fbl_flower.config.options import shown_key as shown_key
from fbl_flower.config.parsing import Setting as Setting
from fbl_flower.config.parsing import flatten as flatten
from fbl_flower.config.parsing import parse_config as parse_config
from fbl_flower.config.parsing import surface as surface
from fbl_flower.config.privacy import NOT_PRIVATE as NOT_PRIVATE
from fbl_flower.config.privacy import PrivacyConfig as PrivacyConfig
from fbl_flower.config.sections import AUTO as AUTO
from fbl_flower.config.sections import DATA_NAMES as DATA_NAMES
from fbl_flower.config.sections import FEDERATED as FEDERATED
from fbl_flower.config.sections import OWN_IMAGES as OWN_IMAGES
from fbl_flower.config.sections import AggregationConfig as AggregationConfig
from fbl_flower.config.sections import BalancingConfig as BalancingConfig
from fbl_flower.config.sections import DataConfig as DataConfig
from fbl_flower.config.sections import FederatedGeneratorConfig as FederatedGeneratorConfig
from fbl_flower.config.sections import GeneratorConfig as GeneratorConfig
from fbl_flower.config.sections import ModelConfig as ModelConfig
from fbl_flower.config.sections import TrainConfig as TrainConfig
from fbl_flower.config.sections import WarmStartConfig as WarmStartConfig
from fbl_flower.config.toml import flat_table as flat_table
from fbl_flower.config.toml import parse_toml as parse_toml
from fbl_flower.config.toml import read_toml_file as read_toml_file
from fbl_flower.config.toml import to_toml as to_toml
from fbl_flower.config.tree import RunConfig as RunConfig
from fbl_flower.config.tree import rounded_up as rounded_up
