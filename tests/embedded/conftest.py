from tests.tools.conftest import environment, run_tool  # noqa: F401
