"""Bad inputs (tests/bad_inputs.py makes and runs them).

Each ends with exit code 2 and one line that names the file and the remedy, and leaves nothing.
"""

import json
import os

import bad_inputs
import pytest
from conftest import python, shared


@pytest.fixture(scope="session")
def answers(tmp_path_factory):
    """What the scripts said to each input, by its name."""

    def made(folder):
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        argv = ["tests/bad_inputs.py", folder / "inputs", folder / "answers.json"]
        done = python(*argv, env=env)
        assert done.returncode == 0, done.stderr

    found = json.loads((shared(tmp_path_factory, "bad", made) / "answers.json").read_text())
    return {f"{f['stage']}: {f['name']}": f for f in found}


@pytest.mark.parametrize("name", bad_inputs.names(), ids=ascii)
def test_a_bad_input_is_refused_in_one_line(name, answers):
    assert not bad_inputs.faults(answers[name]), answers[name]["error"][-2000:]


def test_there_is_no_input_twice_and_each_kind_is_there():
    names, everything = bad_inputs.names(), bad_inputs.names(everything=True)
    assert (
        len(names) == len(set(names))
        and set(names) < set(everything)
        and len(everything) == len(set(everything)) > 1000
    )
    kinds = lambda names: {name.split(": ")[1] for name in names if ": data, " in name}
    assert kinds(names) >= {
        f"data, {kind}"
        for kind in bad_inputs.DATASETS
        if not any(k == kind for k, _ in bad_inputs.NOT_READ)
    }
