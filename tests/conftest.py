import gc
import os
import signal

# Before anything imports JAX, which looks for accelerators once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the tests' work. XLA's own passes over a program stay as they are; without
# LLVM's on the code of each operation it takes a quarter of the time. Children inherit it;
# `XLA_FLAGS= make test` compiles everything as users do.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

# There are as many processes as cores: the threads of torch's products would only wait in turn.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import jax
import pytest

# A shell's background jobs ignore it, and so would all that they start; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What shares work among devices is tested on these; the rest runs on the first.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_collection_finish():
    """What was imported stays: looking through it for garbage took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


# The system lets a process have 65,530, and one more ends it.
_MOST_MAPS = 30_000


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Thousands of compiled programs would use up the process's memory maps."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def forget_programs_of_many(forget_programs):
    """The same within a module that compiles so many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that wants the hub has to start one on loopback."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
