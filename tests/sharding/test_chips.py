import pytest

from qwen_jax.errors import UserError
from qwen_jax.sharding.chips import CHIPS, read_topology


@pytest.mark.parametrize(
    ("text", "name", "shape", "chips", "host"),
    [
        ("v5p:8x8x8", "v5p", (8, 8, 8), 512, (2, 2, 1)),
        (" V5E:4x4 ", "v5e", (4, 4), 16, (2, 2, 1)),
        ("v6e:1x1", "v6e", (1, 1), 1, (1, 1, 1)),
        ("v4:2x2x1", "v4", (2, 2, 1), 4, (2, 2, 1)),
        ("v5e:1x2", "v5e", (1, 2), 2, (1, 2, 1)),
    ],
)
def test_a_topology_is_read(text, name, shape, chips, host):
    topology = read_topology(text)
    assert (topology.chip.name, topology.shape) == (name, shape)
    assert (topology.num_chips, topology.chips_per_host) == (chips, host)
    assert topology.name == text.strip().lower()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e", "give a generation and its chips along each side"),
        ("v5e:", "give a generation"),
        ("v5e:0x4", "give a generation"),
        ("v5e:4x", "give a generation"),
        ("v5e:4*4", "give a generation"),
        ("v9:4x4", "v9 is unknown; known: v4, v5e, v5p, v6e"),
        ("v5e:4x4x4", "v5e has 2 dimensions, not 3; give one such as v5e:4x4"),
        ("v5p:4x4", "v5p has 3 dimensions, not 2"),
    ],
)
def test_a_topology_that_is_none_is_refused_in_one_line(text, message):
    with pytest.raises(UserError) as error:
        read_topology(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_chips_have_two_links_a_dimension_and_more_compute_than_memory():
    for chip in CHIPS.values():
        assert chip.links == 2 * chip.dimensions
        # Operations for each byte read, by which decode is bound by memory on all of them.
        assert 100 < chip.flops / chip.hbm_bandwidth < 1000
        assert chip.link_bandwidth * chip.links < chip.hbm_bandwidth
