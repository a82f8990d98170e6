"""The JSON form of spaces."""

import json
import math

import numpy as np
import pytest
from gymnasium import spaces

from policy_server.commands.space_files import SpaceFileError, read_spaces, space_from_json


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (
            {"type": "Box", "low": -1, "high": 1, "shape": [3]},
            spaces.Box(-1, 1, (3,), np.float32),
        ),
        (
            {"type": "Box", "low": [0, -2], "high": [1, 2], "dtype": "float64"},
            spaces.Box(np.array([0.0, -2.0]), np.array([1.0, 2.0]), dtype=np.float64),
        ),
        (
            {"type": "Box", "low": 0, "high": 255, "shape": [84, 84, 3], "dtype": "uint8"},
            spaces.Box(0, 255, (84, 84, 3), np.uint8),
        ),
        (
            {"type": "Box", "low": "-inf", "high": "inf", "shape": [2]},
            spaces.Box(-math.inf, math.inf, (2,), np.float32),
        ),
        ({"type": "Discrete", "n": 4}, spaces.Discrete(4)),
        ({"type": "Discrete", "n": 4, "start": -1}, spaces.Discrete(4, start=-1)),
        ({"type": "MultiDiscrete", "nvec": [2, 3]}, spaces.MultiDiscrete([2, 3])),
        ({"type": "MultiBinary", "n": 5}, spaces.MultiBinary(5)),
        ({"type": "Text", "max_length": 8, "charset": "ab"}, spaces.Text(8, charset="ab")),
        (
            {"type": "Dict", "spaces": {"a": {"type": "Discrete", "n": 2}}},
            spaces.Dict({"a": spaces.Discrete(2)}),
        ),
        (
            {"type": "Tuple", "spaces": [{"type": "Discrete", "n": 2}]},
            spaces.Tuple([spaces.Discrete(2)]),
        ),
    ],
)
def test_every_space_can_be_written_down(written, meant):
    assert space_from_json(written) == meant


def test_file_gives_both_spaces(tmp_path):
    path = tmp_path / "robot.json"
    box = {"type": "Box", "low": -1, "high": 1, "shape": [4]}
    discrete = {"type": "Discrete", "n": 2}
    path.write_text(json.dumps({"observation_space": box, "action_space": discrete}))
    assert read_spaces(path) == (spaces.Box(-1, 1, (4,), np.float32), spaces.Discrete(2))


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"type": "Blob"}, 'space: expected an object whose "type" is one of Box, '),
        (7, 'space: expected an object whose "type" is one of Box, '),
        ({"type": "Discrete"}, 'space: a Discrete needs "n"'),
        ({"type": "Discrete", "n": 2, "m": 1}, 'a Discrete has no "m"; known: n, start'),
        ({"type": "Discrete", "n": -1}, "not a Discrete"),
        ({"type": "Box", "low": 0, "high": 1, "dtype": "bool"}, "expected a float or integer"),
        ({"type": "Box", "low": 2, "high": 1, "shape": [1]}, "not a Box"),
        (
            {"type": "Dict", "spaces": {"a": {"type": "Tuple", "spaces": [{"type": "Discrete"}]}}},
            'space["a"][0]: a Discrete needs "n"',
        ),
        ({"type": "Dict", "spaces": []}, "space.spaces: expected an object"),
        ({"type": "Tuple", "spaces": {}}, "space.spaces: expected a list"),
    ],
)
def test_what_is_wrong_is_named_with_its_path(written, said):
    with pytest.raises(SpaceFileError) as caught:
        space_from_json(written)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object with the keys"),
        ('{"observation_space": {}}', "expected an object with the keys"),
    ],
)
def test_file_that_describes_no_spaces_is_refused_by_name(tmp_path, content, said):
    path = tmp_path / "robot.json"
    path.write_text(content)
    with pytest.raises(SpaceFileError, match=said) as caught:
        read_spaces(path)
    assert str(path) in str(caught.value)


def test_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(SpaceFileError, match=r"nowhere\.json"):
        read_spaces(tmp_path / "nowhere.json")
