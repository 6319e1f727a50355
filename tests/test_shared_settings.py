"""What many tests share cuts a run's size and nothing else: what users do not say, no test may say for them."""

from __future__ import annotations

import pytest
import yaml

from numina_finetune.cli.training import training_options
from tests import conftest
from tests.pipeline import bench
from tests.recipes.settings import REPLACED

SIZES = {
    *("model_name", "max_seq_length", "per_device_train_batch_size", "global_batch_size", "max_steps"),
    *("num_train_epochs", "validation_size", "eval_steps", "save_steps"),
}
PLACES = {
    *("datasets", "dataset_name", "format", "eval_dataset_name", "eval_split"),
    *("cache_dir", "backend", "metadata_url"),  # no metadata service can be reached from a test
}
TRAINING = yaml.safe_load(bench.TINY)["steps"][1]["options"]


@pytest.mark.parametrize(
    "said",
    [{name for name, value in training_options(conftest.TINY).items() if value}, set(TRAINING), REPLACED],
    ids=["tests", "pipelines", "recipes"],
)
def test_shared_settings_are_sizes_and_places(said: set[str]) -> None:
    assert said and said <= SIZES | PLACES
