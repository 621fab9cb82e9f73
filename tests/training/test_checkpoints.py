"""Checkpoints of a state of three numbers: which stay, what they hold, and what damage leads to."""

import gc
import json
import warnings

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.training.checkpoints import Checkpoints
from qwen_jax.training.train_step import TrainState


def state_of(step):
    params = {"weight": jnp.array([step, step + 0.5], jnp.float32)}
    return TrainState(jnp.int32(step), params, (jnp.float32(-step),))


def numbers():
    return iter(grain.MapDataset.range(100).to_iter_dataset())


def save(checkpoints, step, data=None, metrics=None):
    checkpoints.save(state_of(step), step, data or numbers(), metrics)


def damage(checkpoints, step):
    """Halves every file of the arrays."""
    files = list((checkpoints.directory / str(step) / "state").rglob("d/*"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_the_newest_stay_and_the_one_of_the_least_loss(tmp_path):
    losses = [3.0, 1.0, 2.0, 4.0, 5.0]
    with Checkpoints(tmp_path, keep=2, best="eval_loss") as checkpoints:
        for step, loss in enumerate(losses, 1):
            save(checkpoints, step, metrics={"eval_loss": loss})
    with Checkpoints(tmp_path, keep=2, best="eval_loss") as checkpoints:
        assert checkpoints.steps == [2, 4, 5]
        save(checkpoints, 6, metrics={"eval_loss": 6.0})
    with Checkpoints(tmp_path, keep=2, best="eval_loss") as checkpoints:
        assert checkpoints.steps == [2, 5, 6]
        # One whose loss nobody measured is never the best.
        save(checkpoints, 7)
        save(checkpoints, 8)
    folders = {path.name for path in checkpoints.directory.iterdir() if path.name.isdecimal()}
    assert folders == {"2", "7", "8"}


def test_a_measure_that_cannot_be_read_is_named(tmp_path):
    with Checkpoints(tmp_path, keep=2, best="eval_loss") as checkpoints:
        save(checkpoints, 1, metrics={"eval_loss": 1.0})
    (checkpoints.directory / "1" / "metrics" / "metrics").write_text("")
    with pytest.raises(UserError, match="a STEP/metrics/metrics there is not JSON"):
        Checkpoints(tmp_path, keep=2, best="eval_loss")


def test_without_a_measure_the_newest_stay(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in range(1, 5):
            save(checkpoints, step)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps == [3, 4]


def test_writes_that_a_failure_leaves_unbegun_are_not_warned_of(tmp_path, recwarn):
    async def write():
        pass

    def leave_one():
        write()
        gc.collect()

    warnings.simplefilter("always")
    with Checkpoints(tmp_path, keep=1):
        leave_one()
        warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in recwarn] == ["something else"]
    leave_one()
    assert len(recwarn) == 2
    with pytest.raises(OSError), Checkpoints(tmp_path, keep=1):
        raise OSError
    # They may be collected as late as that.
    leave_one()
    assert len(recwarn) == 2


def test_a_state_may_be_donated_as_soon_as_it_is_being_saved(tmp_path):
    overwrite = jax.jit(lambda state: jax.tree.map(lambda a: 0 * a - 7, state), donate_argnums=0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        state, data = state_of(3), numbers()
        taken = [int(next(data)) for _ in range(4)]
        checkpoints.save(state, 3, data)
        # On a CPU JAX gives a copy away as long as a thread of Orbax's holds a view of a buffer.
        overwrite(state)
        # The place in the data is that of the save as well.
        taken.append(int(next(data)))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        data = numbers()
        like = jax.eval_shape(lambda: state_of(0)).replace(beside="as it came")
        restored, step = checkpoints.restore(like, data)
    assert (step, int(next(data)), restored.beside) == (3, taken[-1], "as it came")
    jax.tree.map(np.testing.assert_array_equal, restored.replace(beside=None), state_of(3))


def test_biases_that_steps_move_are_kept_and_told_of_only_where_there_are_some(tmp_path):
    """Runs that began before there were biases go on."""
    fields = {"step", "params", "opt_state", "frozen", "beside"}
    for moved, names in ((None, fields), ({"bias": jnp.arange(3.0)}, fields | {"moved"})):
        state = state_of(1).replace(moved=moved)
        workdir = tmp_path / str(len(names))
        with Checkpoints(workdir, keep=1) as checkpoints:
            checkpoints.save(state, 1, numbers())
        metadata = json.loads((workdir / "checkpoints/1/state/_METADATA").read_text())
        paths = [leaf["key_metadata"] for leaf in metadata["tree_metadata"].values()]
        assert {path[0]["key"] for path in paths} == names
        with Checkpoints(workdir, keep=1) as checkpoints:
            restored, _ = checkpoints.restore(jax.eval_shape(lambda s=state: s), numbers())
        jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_where_the_newest_is_damaged_the_one_before_is_taken(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, step)
    damage(checkpoints, 3)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        with pytest.warns(UserWarning, match=r"3: cannot be read .* the run goes on from step 2$"):
            restored, step = checkpoints.restore(state_of(0), numbers())
        assert step == 2
        jax.tree.map(np.testing.assert_array_equal, restored, state_of(2))
        assert (checkpoints.directory / "damaged" / "3").is_dir()
        # The run comes by that step again.
        assert checkpoints.steps == [1, 2]
        save(checkpoints, 3)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.restore(state_of(0), numbers())[1] == 3


def test_where_all_are_damaged_one_line_says_so(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            save(checkpoints, step)
    damage(checkpoints, 1)
    damage(checkpoints, 2)
    with (
        Checkpoints(tmp_path, keep=2) as checkpoints,
        pytest.raises(
            UserError, match=r"checkpoints/2: cannot be read .*nor can any other there;"
        ) as e,
    ):
        checkpoints.restore(state_of(0), numbers())
    assert "\n" not in str(e.value)
    # They are left where they are, for whoever can mend them.
    assert checkpoints.steps == [1, 2]
    assert not (checkpoints.directory / "damaged").exists()
