"""Black-box safety testing of an image classifier as a game on the image's features.

Two players change an image in turns until its class changes: the first picks a
feature, the second a pixel there and how to change it. The first wants the change to be
small; the second helps, hinders or plays at random. Monte Carlo tree search plays the
game with nothing but the classifier's scores. Take it where gradients cannot be had;
where they can, an attack by gradients needs fewer evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import ArrayLike, Float, PRNGKeyArray

from ..core._checks import (
    check_choice,
    check_finite,
    check_nonempty,
    check_positive,
)
from ._game_images import (
    BATCH,
    Manipulation,
    Options,
    Queries,
    as_options,
    saliency,
)
from ._keypoints import Keypoints, sift_keypoints

Player = Literal["cooperative", "adversarial", "random"]
Selection = Literal["uct", "repo_ucb"]

_MOVES = 100  # draws of changes at a feature, as in the authors' code
_EXPLORATION = math.sqrt(2)  # of UCB1, for rewards between 0 and 1
_PASSES = 4  # how often a random continuation may try every change before it gives up


class GameResult(NamedTuple):
    """What a game found.

    Args:
        best: The closest misclassified image that was met, whoever played, or `None`.
        distance: Its distance from the image, infinite without one: an upper bound of
            the distance to the closest that these changes can make.
        queries: Different images that were classified.
        value: The distance that the first player can enforce against the second, as
            the tree knows it: an estimate, of the reciprocal of the mean reward.
        history: The smallest distance known after each simulation.
        saliency: `"keypoints"`, or `"uniform"` where the image has none.
        tree: The game's root.
    """

    best: np.ndarray | None
    distance: float
    queries: int
    value: float
    history: Float[np.ndarray, " simulations"]
    saliency: Literal["keypoints", "uniform"]
    tree: GameNode


class GameNode:
    """A position of the game at which the first player is to move.

    Args:
        image: The image, as pixels and channels.
        reward: What the game is worth if it ends here, else `None`.
        features: Number of features; `visits` and `total` count how often each was
            chosen here and the rewards that followed.
    """

    def __init__(self, image: np.ndarray, reward: float | None, features: int):
        self.image, self.reward = image, reward
        self.visits = np.zeros(features, int)
        self.total = np.zeros(features)
        self.choices: list[_Choice | None] = [None] * features
        self.estimate = 0.0  # of a random continuation
        self.shares: np.ndarray | None = None  # of the authors' rule


class _Choice:
    """A position at which the second player is to move, at a feature."""

    def __init__(self, moves: np.ndarray, weights: np.ndarray, margins: np.ndarray):
        self.moves, self.weights, self.margins = moves, weights, margins
        self.visits = np.zeros(len(moves), int)
        self.total = np.zeros(len(moves))
        self.nodes: dict[int, GameNode] = {}


def feature_game(
    predict: Callable[[np.ndarray], ArrayLike],
    image: Float[np.ndarray, "height width ..."],
    *,
    manipulate: Manipulation = "paint",
    player2: Player = "cooperative",
    budget: int = 200,
    keypoints: Keypoints | None = None,
    sigma: float = 1.0,
    norm: Literal["l0", "l2"] = "l0",
    selection: Selection = "uct",
    max_distance: float = math.inf,
    backtrack: int = 10,
    label: int | None = None,
    key: PRNGKeyArray,
) -> GameResult:
    """Searches for a small change of an image that changes its class.

    The saliency is a mixture of normal densities, one for each keypoint, as heavy as
    its response; it is made once, of the image as given. A simulation walks down the
    tree, draws 100 changes at a feature not yet seen there, classifies the different
    ones at once, and continues one of them at random until the class changes; the
    reward is 1 / distance there. The cost is that of about 100 to 200 classifications a
    simulation. With a cooperating second player and enough simulations the closest
    image is found.

    Args:
        predict: Scores (n, classes) of n images (n, *image's shape); anything callable,
            a jitted network for instance. It is always asked for 64 images.
        image: Values in [0, 1], with or without channels at the end.
        manipulate: What can be done to a pixel: `"paint"` it black or white; a number
            t: add or subtract t, again and again; or a function from pixels (pixels,
            channels), each by itself, to what they can become, (options, pixels,
            channels). A pixel can only be moved farther from what it was.
        player2: `"cooperative"` wants what the first wants, `"adversarial"` the
            opposite, `"random"` draws from the feature's density.
        budget: Simulations, at least 1.
        keypoints: Those of the image; `sift_keypoints(image)` by default.
        sigma: Added to every keypoint's size, in pixels: the authors' 15 on images
            enlarged 15 times.
        norm: Of the distance: the number of changed pixels, or the Euclidean norm.
        selection: How the first player searches: `"uct"` by upper confidence bounds of
            the mean reward; `"repo_ucb"` draws as the authors' code does, from shares
            of the features that drops of confidence raise.
        max_distance: Beyond it the game is lost.
        backtrack: Changed pixels of a misclassified image that are taken back together
            where it stays so, halved until single ones; 0 for never.
        label: The image's class; the predicted one by default.
        key: Randomness.

    Returns:
        The closest image with its distance, the number of queries, and the tree.

    Raises:
        ValueError: An image that is empty, not finite or misclassified already, a
            budget, `sigma` or t that is not positive, keypoints outside the image,
            scores of another shape or not finite, an unknown choice.

    Example:
        >>> import jax, numpy as np
        >>> from varan.lipschitz import Keypoints, feature_game
        >>> def predict(x):  # the class changes once three pixels are bright
        ...     bright = x.reshape(len(x), -1).sum(1)
        ...     return np.stack([2.5 - bright, bright - 2.5], 1)
        >>> points = Keypoints(np.array([[1.0, 1.0]]), np.ones(1), np.ones(1))
        >>> found = feature_game(predict, np.zeros((4, 4)), keypoints=points,
        ...                      budget=20, key=jax.random.key(0))
        >>> found.distance
        3.0

    Source:
        Wicker, Huang, Kwiatkowska (2018), "Feature-Guided Black-Box Safety Testing of
        Deep Neural Networks", TACAS, arXiv:1710.07859.

    Differences:
        UCT in place of the authors' rule, which stays by name and lacks the usual form.
        The mean reward is scaled by the smallest and largest reward seen. The second
        player's changes are opened one after the other as a feature is visited, the
        square root of the visits at a time, those first that drop the lead most (least,
        against an adversary). Confidence is the lead of the class over the next.
    """
    owner = "feature_game"
    image = np.asarray(image)
    if not np.issubdtype(image.dtype, np.floating):
        image = image.astype(float)
    check_nonempty(owner, "image", image)
    check_finite(owner, "image", image)
    for name, value, choices in (
        ("player2", player2, ("cooperative", "adversarial", "random")),
        ("norm", norm, ("l0", "l2")),
        ("selection", selection, ("uct", "repo_ucb")),
    ):
        check_choice(owner, name, value, choices)
    check_positive(owner, "budget", budget)
    check_positive(owner, "sigma", sigma)
    if image.ndim not in (2, 3) or backtrack < 0:
        raise ValueError(
            f"{owner}: `image` must be (height, width) or (height, width, channels), "
            f"and `backtrack` at least 0 (got shape {image.shape} and {backtrack})."
        )
    pixels = image.reshape(-1, image[0, 0].size)
    points = sift_keypoints(image) if keypoints is None else keypoints
    game = _Game(
        Queries(predict, image, label),
        pixels,
        as_options(manipulate, pixels),
        *saliency(points, image.shape[:2], sigma),
        player2,
        norm,
        selection,
        max_distance,
        backtrack,
        np.random.default_rng(np.asarray(jax.random.bits(key, (4,))).tolist()),
    )
    return game.play(budget, image.shape, bool(len(points.size)))


@dataclass
class _Game:
    """One game: its rules, its tree's policy, and the best image so far."""

    queries: Queries
    pixels: np.ndarray  # of the image, (pixels, channels)
    options: Options
    shares: np.ndarray  # of the features in the saliency
    densities: np.ndarray  # of each feature over the pixels
    player2: Player
    norm: str
    selection: Selection
    max_distance: float
    backtrack: int
    rng: np.random.Generator
    best: np.ndarray | None = None
    distance: float = math.inf
    low: float = math.inf  # rewards so far
    high: float = -math.inf

    def __post_init__(self):
        self.mixture = np.cumsum(self.shares @ self.densities)

    def play(self, budget: int, shape, salient: bool) -> GameResult:
        """All simulations, and what came of them."""
        root, history = GameNode(self.pixels, None, len(self.shares)), []
        for _ in range(budget):
            self.simulate(root)
            history.append(self.distance)
        worth = self.worth(root)
        return GameResult(
            None if self.best is None else self.best.reshape(shape),
            self.distance,
            self.queries.count,
            1 / worth if worth > 0 else math.inf,
            np.array(history),
            "keypoints" if salient else "uniform",
            root,
        )

    def simulate(self, node: GameNode) -> None:
        """Selection, expansion, a random continuation, and back."""
        path, reward, margin = [], node.reward, self.queries.margin
        while reward is None:
            feature = self.pick_feature(node)
            choice = node.choices[feature]
            if choice is None:
                choice = node.choices[feature] = self.expand(node, feature)
            if not len(choice.moves):  # every pixel there is at its end
                path.append((node, feature, None, None))
                reward = 0.0
                break
            move = self.pick_move(choice)
            margin = choice.margins[move]
            path.append((node, feature, choice, move))
            if move in choice.nodes:
                node = choice.nodes[move]
                reward = node.reward
            else:
                node = choice.nodes[move] = self.child(node, choice, move)
                reward = node.reward
                if reward is None:
                    reward = node.estimate = self.continued(node.image)
        self.low, self.high = min(self.low, reward), max(self.high, reward)
        drop = (self.queries.margin - margin) / max(len(path), 1)
        for node, feature, choice, move in path:
            node.visits[feature] += 1
            node.total[feature] += reward
            if node.shares is not None:
                node.shares[feature] = max(node.shares[feature] + drop, 0)
                node.shares /= max(node.shares.sum(), np.finfo(float).tiny)
            if choice is not None:
                choice.visits[move] += 1
                choice.total[move] += reward

    # The players ------------------------------------------------------------------

    def pick_feature(self, node: GameNode) -> int:
        if self.selection == "repo_ucb":
            if node.shares is None:
                node.shares = self.shares.copy()
            plays = node.visits + 1
            bound = node.shares + np.sqrt(np.log(plays) / plays.sum())
            if not bound.sum() > 0:
                bound = self.shares
            return int(self.rng.choice(len(bound), p=bound / bound.sum()))
        if not node.visits.all():
            return int(np.argmax(np.where(node.visits == 0, self.shares, -1)))
        return int(np.argmax(self.bound(node.total, node.visits, 1.0)))

    def pick_move(self, choice: _Choice) -> int:
        if self.player2 == "random":
            ends = np.cumsum(choice.weights)
            return int(np.searchsorted(ends, self.rng.random() * ends[-1], "right"))
        # Moves stand in the order in which they promise most.
        opened = math.isqrt(int(choice.visits.sum())) + 1
        visits = choice.visits[:opened]
        if not visits.all():
            return int(np.argmin(visits))
        sign = 1.0 if self.player2 == "cooperative" else -1.0
        return int(np.argmax(self.bound(choice.total[:opened], visits, sign)))

    def bound(self, total, visits, sign: float) -> np.ndarray:
        """Upper confidence bounds of the mean reward, or of what the reward lacks."""
        spread = self.high - self.low
        mean = (total / visits - self.low) / spread if spread > 0 else 0 * total
        return sign * mean + _EXPLORATION * np.sqrt(np.log(visits.sum()) / visits)

    # The rules --------------------------------------------------------------------

    def expand(self, node: GameNode, feature: int) -> _Choice:
        """Lists changes at a feature and classifies them all."""
        options = self.options(node.image)
        option, pixel = np.nonzero(self.legal(node.image, options))
        weights = self.densities[feature, pixel]
        drawn = np.zeros(0, int)
        if weights.any():
            draws = self.rng.choice(len(weights), _MOVES, p=weights / weights.sum())
            drawn = np.unique(draws)
        option, pixel, weights = option[drawn], pixel[drawn], weights[drawn]
        images = np.repeat(node.image[None], len(option), 0)
        images[np.arange(len(option)), pixel] = options[option, pixel]
        margins = self.queries(images)
        lost = np.where(margins < 0, self.measure(images), math.inf)
        if np.min(lost, initial=math.inf) < self.distance:
            self.keep(images[int(np.argmin(lost))])
        order = np.argsort(-margins if self.player2 == "adversarial" else margins)
        moves = np.column_stack([option, pixel])
        return _Choice(moves[order], weights[order], margins[order])

    def child(self, node: GameNode, choice: _Choice, move: int) -> GameNode:
        image = node.image.copy()
        option, pixel = choice.moves[move]
        image[pixel] = self.options(image[[pixel]])[option, 0]
        distance, reward = self.measure(image[None])[0], None
        if choice.margins[move] < 0 and distance <= self.max_distance:
            reward = 1 / distance
        elif distance > self.max_distance:
            reward = 0.0
        return GameNode(image, reward, len(self.shares))

    def continued(self, image: np.ndarray) -> float:
        """The reward of changes drawn from the saliency until the class changes."""
        image, size = image.copy(), len(image) * len(self.options(image))
        for _ in range(0, _PASSES * size, min(size, BATCH)):
            met = self.wander(image, min(size, BATCH))
            if len(met):
                margins, distances = self.queries(met), self.measure(met)
                ends = (margins < 0) | (distances > self.max_distance)
                if ends.any():
                    end = int(np.argmax(ends))
                    if distances[end] > self.max_distance:
                        return 0.0
                    self.keep(met[end])
                    return 1 / distances[end]
            elif not self.legal(image, self.options(image)).any():
                break
        return 0.0

    def wander(self, image: np.ndarray, tries: int) -> np.ndarray:
        """Changes an image at random, in place; what it was after each change."""
        draws = self.rng.random(tries) * self.mixture[-1]
        met = []
        for pixel in np.searchsorted(self.mixture, draws, "right").tolist():
            options = self.options(image[[pixel]])[:, 0]
            new = options[self.rng.integers(len(options))]
            old, start = image[pixel], self.pixels[pixel]
            if np.abs(new - start).sum() > np.abs(old - start).sum():
                image[pixel] = new
                met.append(image.copy())
        return np.array(met)

    def legal(self, image: np.ndarray, options: np.ndarray) -> np.ndarray:
        """Which options move which pixels farther from what they were."""
        gains = np.abs(options - self.pixels).sum(2)
        return gains > np.abs(image - self.pixels).sum(1)

    def measure(self, images: np.ndarray) -> np.ndarray:
        """Distances from the image."""
        change = images - self.pixels
        if self.norm == "l0":
            return np.any(change != 0, 2).sum(1).astype(float)
        return np.sqrt((change**2).sum((1, 2)))

    # What was found ---------------------------------------------------------------

    def keep(self, image: np.ndarray) -> None:
        """Remembers a misclassified image, as far as it is needed, if it is closest."""
        image = self.taken_back(image.copy())
        distance = float(self.measure(image[None])[0])
        if distance < self.distance and distance <= self.max_distance:
            self.best, self.distance = image, distance

    def taken_back(self, best: np.ndarray) -> np.ndarray:
        """A misclassified image without the changes that it does not need."""
        size = self.backtrack
        while size:
            changed = np.flatnonzero(np.any(best != self.pixels, 1))
            self.rng.shuffle(changed)
            groups = [changed[k : k + size] for k in range(0, len(changed), size)]
            images = np.repeat(best[None], len(groups), 0)
            for image, group in zip(images, groups, strict=True):
                image[group] = self.pixels[group]
            lost = np.where(self.queries(images) < 0, self.measure(images), math.inf)
            if np.isfinite(lost).any():
                best = images[int(np.argmin(lost))].copy()
            else:
                size //= 2
        return best

    def worth(self, node: GameNode) -> float:
        """The reward that the first player can enforce, as far as the tree knows."""
        if node.reward is not None:
            return node.reward
        values = [
            self.worth_of(choice) for choice in node.choices if choice is not None
        ]
        return max(values, default=node.estimate)

    def worth_of(self, choice: _Choice) -> float:
        if not choice.nodes:
            return 0.0
        values = np.array([self.worth(node) for node in choice.nodes.values()])
        if self.player2 == "random":
            weights = choice.weights[list(choice.nodes)]
            return float(weights @ values / weights.sum())
        return float(values.max() if self.player2 == "cooperative" else values.min())
