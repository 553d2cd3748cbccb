"""Checks of input: one wording, and silence about traced values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.core._checks import (
    check_choice,
    check_finite,
    check_nonempty,
    check_positive,
    check_shape,
)


@pytest.mark.parametrize(
    ("check", "arguments", "message"),
    [
        (check_finite, (np.array([1, np.nan, np.inf]),), "finite .got 2 .* of 3"),
        (check_positive, (0.0,), r"positive \(got 0.0\)"),
        (check_positive, (np.nan,), r"positive \(got nan\)"),
        (check_positive, (np.inf,), r"positive \(got inf\)"),
        (check_positive, (np.array([1.0, -2.0]),), "positive .got minimum -2.0"),
        (check_nonempty, (np.zeros((0, 3)),), r"empty \(got shape \(0, 3\)\)"),
        (check_shape, (np.zeros(3), (2,)), r"shape \(2\) \(got \(3,\)\)"),
        (check_shape, (np.zeros(3), (None, 2)), r"shape \(any, 2\) \(got \(3,\)\)"),
        (check_choice, ("newton", ("gd", "cg")), "'gd', 'cg' .got 'newton'"),
    ],
)
def test_refusals_name_who_what_and_got(check, arguments, message):
    with pytest.raises(
        ValueError, match=r"^owner: `name` must (not )?\w+ .*" + message
    ):
        check("owner", "name", *arguments)


def test_good_values_pass():
    check_finite("owner", "name", jnp.ones(3))
    check_positive("owner", "name", np.array([1.0, 2.0]))
    check_nonempty("owner", "name", np.zeros(1))
    check_shape("owner", "name", np.zeros((3, 2)), (None, 2))
    check_choice("owner", "name", "a", ("a", "b"))


def test_traced_values_pass_but_their_shapes_do_not():
    @jax.jit
    def run(value):
        check_finite("owner", "name", value)
        check_positive("owner", "name", value)
        check_shape("owner", "name", value, (2,))
        return value

    run(jnp.asarray([np.nan, -1.0]))
    with pytest.raises(ValueError, match="shape"):
        run(jnp.ones(3))
