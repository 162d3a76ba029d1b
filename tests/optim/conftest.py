from tests.mpt.conftest import triton_runs

__all__ = ["triton_runs"]
