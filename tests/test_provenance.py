"""What results say of how they were made."""

import subprocess

import jax

from qwen_jax.provenance import git_hash, provenance


def test_no_hash_is_recorded_outside_a_checkout(tmp_path):
    assert git_hash(tmp_path) is None
    (tmp_path / ".git").mkdir()
    assert git_hash(tmp_path) is None


def test_a_hash_says_whether_files_differ_from_it(tmp_path):
    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)

    git("init", "--quiet")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "-m", "one")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert git_hash(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert git_hash(tmp_path) == f"{commit}-dirty"


def test_versions_are_told_of_what_took_part_and_null_of_what_is_not_installed():
    told = provenance("float32", {"seed": 1}, also=("numpy", "no-such-package"))
    assert told["versions"]["jax"] == jax.__version__
    assert told["versions"]["numpy"]
    assert told["versions"]["no-such-package"] is None
    assert (told["device"], told["dtype"], told["flags"]) == ("cpu", "float32", {"seed": 1})
