"""Games with closed forms: what solvers and certificates are tested on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ..core._checks import (
    check_finite,
    check_nonempty,
    check_positive,
    check_shape,
    is_traced,
)
from ..operators import project_simplex
from ._game import Game


def rotation_game(
    lipschitz: float | Float[Array, ""] = 1.0, angle: float | Float[Array, ""] = 0.0
) -> Game:
    """The plane turned and stretched: `F(z) = L R(angle) z`, solved by zero.

    Every direction is alike: `F` is L-Lipschitz and exactly `rho`-negatively comonotone
    with `rho = -cos(angle) / L`: monotone up to a right angle, the identity at zero.
    One can say by hand which steps converge.

    Args:
        lipschitz: `L`, positive.
        angle: In radians.

    Returns:
        A game on vectors of length 2.

    Raises:
        ValueError: If `lipschitz` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import rotation_game
        >>> force = rotation_game(2.0, jnp.pi / 2).apply(jnp.ones(2))
        >>> [round(float(v), 3) for v in force]
        [-2.0, 2.0]

    Source:
        Gorbunov, Taylor, Horvath and Gidel, 2023 (arXiv 2210.13831), counterexamples.
    """
    check_positive("rotation_game", "lipschitz", lipschitz)
    return Game(_turn, lipschitz, angle)


def _turn(z, lipschitz, angle):
    c, s = (jnp.asarray(f(angle), z.dtype) for f in (jnp.cos, jnp.sin))
    turned = jnp.stack([c * z[0] - s * z[1], s * z[0] + c * z[1]])
    return jnp.asarray(lipschitz, z.dtype) * turned


def bilinear_game(
    A: Float[Array, "m n"],
    b: Float[Array, " m"] | None = None,
    c: Float[Array, " n"] | None = None,
) -> Game:
    """`min_x max_y x'A y + b'x - c'y`: rotation alone, the hardest monotone game.

    Solved by `A y = -b`, `A'x = c`. Descent-ascent diverges for every step.

    Args:
        A: Matrix, shape (m, n).
        b: Shape (m,); zero by default.
        c: Shape (n,); zero by default.

    Returns:
        A monotone game on pairs `(x, y)` of shapes (m,) and (n,).

    Raises:
        ValueError: If `A` is no finite matrix or `b` or `c` does not fit it.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import bilinear_game
        >>> x, y = bilinear_game(jnp.eye(2)).apply((jnp.zeros(2), jnp.ones(2)))
        >>> x.tolist()
        [1.0, 1.0]
    """
    A = _matrix("bilinear_game", A)
    b = jnp.zeros_like(A[:, 0]) if b is None else b
    c = jnp.zeros_like(A[0]) if c is None else c
    check_shape("bilinear_game", "b", b, (A.shape[0],))
    check_shape("bilinear_game", "c", c, (A.shape[1],))
    square = A.shape[0] == A.shape[1]
    return Game.from_saddle(_bilinear, A, b, c, monotone=True, unique=square)


def _matrix(owner, A):
    check_shape(owner, "A", A, (None, None))
    check_nonempty(owner, "A", A)
    check_finite(owner, "A", A)
    A = jnp.asarray(A)
    return A if jnp.issubdtype(A.dtype, jnp.floating) else A.astype(float)


def _bilinear(x, y, A, b, c):
    return x @ (A @ y) + b @ x - c @ y


def quadratic_game(
    blocks: list[list[Float[Array, "m n"]]], offsets: list[Float[Array, " m"]]
) -> Game:
    """Players with quadratic losses: player i's gradient is `sum_j B_ij z_j + b_i`.

    Args:
        blocks: A square table of matrices; `B_ij` of shape (d_i, d_j).
        offsets: `b_i` of shape (d_i,).

    Returns:
        A game on tuples with one vector a player; linear, so that every constant of it
        is one of the blocks' matrix.

    Raises:
        ValueError: If the table is not square.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import quadratic_game
        >>> one = jnp.ones((1, 1))
        >>> game = quadratic_game([[one, 3 * one], [-one, one]], [jnp.zeros(1)] * 2)
        >>> [float(v[0]) for v in game.apply((jnp.ones(1), jnp.ones(1)))]
        [4.0, 0.0]
    """
    if any(len(row) != len(offsets) for row in blocks) or len(blocks) != len(offsets):
        raise ValueError(
            "quadratic_game: `blocks` must be a square table with a row for each "
            f"offset (got {[len(row) for row in blocks]} for {len(offsets)})."
        )
    return Game(_linear_players, blocks, offsets)


def _linear_players(z, blocks, offsets):
    def own(row, offset):
        return offset + sum(B @ v for B, v in zip(row, z, strict=True))

    return type(z)(own(r, b) for r, b in zip(blocks, offsets, strict=True))


def quartic_saddle(
    key: PRNGKeyArray,
    size: int = 50,
    curvature: tuple[float, float] = (1.0, 0.0),
    dtype: jnp.dtype | None = None,
) -> Game:
    """Random quadratic and quartic terms with a coupling, solved by zero.

    `f(x, y) = 2 e1 x'A1 x + e2 (x'A2 x)^2 - 2 e1 y'B1 y - e2 (y'B2 y)^2 + 4 x'C y`,
    with positive definite matrices. `(1, 0)` is strongly monotone, `(0, 1)` monotone
    without curvature at the solution, `(1, -1)` not monotone, but with a positive
    definite Jacobian at the solution.

    Args:
        key: Draws the matrices.
        size: Length of `x` and of `y`.
        curvature: `(e1, e2)`.
        dtype: Of the data; JAX's default.

    Returns:
        A game on pairs of vectors. The definite matrices have eigenvalues uniform in
        [1/2, 1], the coupling a spectral norm of 1; all are divided by 4, so that the
        Lipschitz constant at the solution is of order one.

    Raises:
        ValueError: If `size` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.games import quartic_saddle
        >>> game = quartic_saddle(jax.random.key(0), 3)
        >>> game.monotone, float(jnp.max(game.apply((jnp.zeros(3),) * 2)[0]))
        (True, 0.0)

    Source:
        Hsieh, Iutzeler, Malick and Mertikopoulos, 2019 (arXiv 1908.08465),
        the experiments.

    Differences:
        The paper does not give the spectra; these are ours.
    """
    check_positive("quartic_saddle", "size", size)
    keys = jax.random.split(key, 5)
    dtype = jnp.result_type(float) if dtype is None else dtype

    def definite(key):
        turn, values = jax.random.split(key)
        Q = jax.random.orthogonal(turn, size, (), dtype)
        d = jax.random.uniform(values, (size,), dtype, 0.5, 1.0)
        return (Q * d[None, :]) @ Q.T / 4

    matrices = [definite(k) for k in keys[:4]]
    C = jax.random.normal(keys[4], (size, size), dtype)
    C = C / (4 * jnp.linalg.norm(C, 2))
    weights = jnp.asarray(curvature, dtype)
    monotone = min(curvature) >= 0
    return Game.from_saddle(_quartic, *matrices, C, weights, monotone=monotone)


def _quartic(x, y, A1, A2, B1, B2, C, weights):
    e1, e2 = weights
    convex = 2 * e1 * (x @ A1 @ x) + e2 * (x @ A2 @ x) ** 2
    concave = 2 * e1 * (y @ B1 @ y) + e2 * (y @ B2 @ y) ** 2
    return convex - concave + 4 * (x @ C @ y)


def matrix_game(A: Float[Array, "m n"]) -> Game:
    """A zero-sum matrix game: `min_x max_y x'A y` over two probability simplices.

    Args:
        A: The row player's losses, shape (m, n).

    Returns:
        A monotone game on pairs of probability vectors. The certificate of a solution
        is the duality gap `max_j (A'x)_j - min_i (A y)_i`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.games import Extragradient, matrix_game
        >>> game = matrix_game(jnp.array([[0.0, 1.0], [1.0, 0.0]]))
        >>> start = (jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]))
        >>> solution = solve(game, Extragradient(0.5), start)
        >>> round(float(solution.x[0][0]), 3), solution.certificate.kind
        (0.5, 'gap')

    Source:
        Von Neumann, 1928.
    """
    A = _matrix("matrix_game", A)
    b, c = jnp.zeros_like(A[:, 0]), jnp.zeros_like(A[0])
    return Game.from_saddle(
        _bilinear,
        A,
        b,
        c,
        project=_project_simplices,
        support=_support_of_simplices,
        monotone=True,
    )


def _project_simplices(z, *params):
    del params
    x, y = z
    return project_simplex(x), project_simplex(y)


def _support_of_simplices(direction):
    d_x, d_y = direction
    return jnp.max(d_x) + jnp.max(d_y)


def degenerate_minimax(
    coupling: float | Float[Array, ""] = 1.0, curvature: float | Float[Array, ""] = -0.1
) -> Game:
    """`f(x, y) = curvature x^2 / 2 + coupling x y`: no curvature in `y` at all.

    Zero is a local minimax point as long as the coupling is not zero, also where `f` is
    concave in `x`: any step of `x` is answered without bound. Descent-ascent diverges
    for every step and timescale where `curvature <= 0`.

    Args:
        coupling: Not zero.
        curvature: Of `f` in `x`.

    Returns:
        A game on pairs of scalars, solved by zero.

    Raises:
        ValueError: If `coupling` is zero.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.games import Extragradient, degenerate_minimax
        >>> start = (jnp.array(1.0), jnp.array(1.0))
        >>> method = Extragradient(0.3, timescale=2.0)
        >>> game = degenerate_minimax()
        >>> bool(solve(game, method, start, tol=1e-3, max_steps=5000).converged)
        True

    Source:
        The mechanism of Chae, Kim and Kim, 2024 (arXiv 2305.16242).
    """
    if not is_traced(coupling) and np.any(np.asarray(coupling) == 0):
        raise ValueError(
            "degenerate_minimax: `coupling` must not be zero (got 0). There is no "
            "local minimax point then."
        )
    return Game.from_saddle(_degenerate, coupling, curvature)


def _degenerate(x, y, coupling, curvature):
    coupling, curvature = (jnp.asarray(v, x.dtype) for v in (coupling, curvature))
    return curvature * x * x / 2 + coupling * x * y
