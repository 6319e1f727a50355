"""Real rows and tokenizers, as the data room's tests have them."""

from tests.data.conftest import gpt_oss, qwen3, real_data, real_rows

__all__ = ["gpt_oss", "qwen3", "real_data", "real_rows"]
