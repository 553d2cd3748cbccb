"""The game of features: exact on tiny images, honest about distances and queries."""

import itertools

import jax
import numpy as np
import pytest

from varan.lipschitz import Keypoints, feature_game, sift_keypoints

POINTS = Keypoints(
    np.array([[0.5, 0.5], [0.5, 1.5], [1.5, 0.5], [1.5, 1.5]]),
    np.full(4, 0.3),
    np.array([1.0, 0.5, 0.8, 0.6]),
)
KEY = jax.random.key(0)
ALL = np.array(list(itertools.product([0.0, 1.0], repeat=9))).reshape(-1, 3, 3)


def flip(pixels):
    return (1 - pixels)[None]


def classifier(seed):
    rng = np.random.default_rng(seed)
    first, bias, last = (rng.normal(size=s) for s in ((16, 9), 16, (2, 16)))

    def predict(images):
        hidden = np.tanh((images.reshape(len(images), -1) - 0.5) @ first.T + bias / 3)
        return hidden @ last.T

    return predict


def exact_distances(predict):
    """The number of flips to the closest image of the other class, of every image."""
    classes = np.argmax(predict(ALL), 1)
    apart = np.abs(ALL[:, None] - ALL[None]).sum((2, 3))
    return np.where(classes[:, None] != classes[None], apart, np.inf).min(1)


def brightness(threshold):
    def predict(images):
        bright = images.reshape(len(images), -1).sum(1)
        return np.stack([threshold - bright, bright - threshold], 1)

    return predict


class TestExact:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_finds_the_closest_image(self, seed):
        """Of the four images that are hardest to change, without taking back."""
        predict = classifier(seed)
        exact = exact_distances(predict)
        for hard in np.argsort(-exact)[:4]:
            found = feature_game(
                predict,
                ALL[hard],
                manipulate=flip,
                keypoints=POINTS,
                budget=300,
                backtrack=0,
                key=KEY,
            )
            assert found.distance == exact[hard]
            assert found.value == exact[hard]
            assert found.queries <= 512
            changed = np.sum(found.best != ALL[hard])
            lost = np.argmax(predict(found.best[None])) != np.argmax(
                predict(ALL[[hard]])
            )
            assert changed == found.distance and lost

    def test_players_are_ordered(self):
        """On three pixels the tree is complete: values are those of the game."""
        points = Keypoints(np.array([[0.0, 0.0], [0.0, 2.0]]), np.ones(2), np.ones(2))
        weights = np.array([1.5, 1.0, 0.6])
        predict = lambda x: np.stack([2 - x[:, 0] @ weights, x[:, 0] @ weights - 2], 1)  # noqa: E731

        def value(player, budget=400):
            return feature_game(
                predict,
                np.zeros((1, 3)),
                manipulate=flip,
                player2=player,
                keypoints=points,
                budget=budget,
                key=KEY,
            ).value

        def exact(player, image=(0, 0, 0)):
            """The reward by recursion over all plays."""
            if np.dot(image, weights) > 2:
                return 1 / sum(image)
            if sum(image) == 3:
                return 0.0
            best = 0.0
            for place in (0, 2):
                rewards, shares = [], []
                for pixel in np.flatnonzero(np.equal(image, 0)):
                    moved = tuple(np.add(image, np.eye(3, dtype=int)[pixel]).tolist())
                    rewards.append(exact(player, moved))
                    shares.append(np.exp(-((pixel - place) ** 2) / 8))
                best = max(
                    best,
                    {
                        "cooperative": max(rewards),
                        "adversarial": min(rewards),
                        "random": np.average(rewards, weights=shares),
                    }[player],
                )
            return best

        values = [value(p) for p in ("cooperative", "random", "adversarial")]
        truth = [1 / exact(p) for p in ("cooperative", "random", "adversarial")]
        np.testing.assert_allclose(values, truth, rtol=1e-9)
        assert values[0] <= values[1] <= values[2] and values[0] < values[2]


class TestHonesty:
    @pytest.mark.parametrize("player", ["cooperative", "adversarial", "random"])
    @pytest.mark.parametrize("selection", ["uct", "repo_ucb"])
    def test_distance_is_that_of_a_misclassified_image(self, player, selection):
        seen = set()
        inner = classifier(3)

        def predict(images):
            assert images.shape == (64, 3, 3)
            seen.update(image.tobytes() for image in images)
            return inner(images)

        found = feature_game(
            predict,
            ALL[7],
            manipulate=0.4,
            player2=player,
            selection=selection,
            keypoints=POINTS,
            norm="l2",
            budget=30,
            key=KEY,
        )
        np.testing.assert_allclose(found.distance, np.linalg.norm(found.best - ALL[7]))
        assert found.queries == len(seen)
        assert np.argmax(inner(found.best[None])) != np.argmax(inner(ALL[[7]]))
        assert np.all((found.best >= 0) & (found.best <= 1))
        assert (
            np.all(np.diff(found.history) <= 0) and found.history[-1] == found.distance
        )
        assert found.tree.visits.sum() == 30

    def test_taking_back_leaves_nothing_to_take_back(self):
        found = feature_game(
            brightness(4.5), np.zeros((6, 6)), budget=1, keypoints=POINTS, key=KEY
        )
        assert found.distance == 5  # the first random continuation had more
        without = feature_game(
            brightness(4.5),
            np.zeros((6, 6)),
            budget=1,
            keypoints=POINTS,
            backtrack=0,
            key=KEY,
        )
        assert without.distance >= 5

    def test_bounded_game_is_lost(self):
        found = feature_game(
            brightness(4.5),
            np.zeros((4, 4)),
            budget=20,
            keypoints=POINTS,
            max_distance=3,
            key=KEY,
        )
        assert found.best is None
        assert found.distance == found.value == np.inf

    def test_game_that_cannot_be_won_ends(self):
        never = lambda x: np.tile([1.0, 0.0], (len(x), 1))  # noqa: E731
        found = feature_game(never, ALL[0], budget=5, keypoints=POINTS, key=KEY)
        assert found.best is None and not np.isfinite(found.history).any()

    def test_same_key_same_game(self):
        def play(seed):
            return feature_game(
                classifier(0),
                ALL[9],
                player2="random",
                budget=10,
                keypoints=POINTS,
                key=jax.random.key(seed),
            )

        first, again, other = play(1), play(1), play(2)
        np.testing.assert_array_equal(first.tree.total, again.tree.total)
        assert np.any(first.tree.total != other.tree.total)

    def test_features_guide_the_search(self):
        """Only the corner matters, and the keypoint there is found out."""
        image, points = np.zeros((8, 8)), np.array([[1.0, 1.0], [6.0, 6.0]])
        corner = lambda x: brightness(3.5)(x[:, :3, :3])  # noqa: E731
        keypoints = Keypoints(points, np.full(2, 0.5), np.ones(2))
        found = feature_game(
            corner, image, budget=60, keypoints=keypoints, sigma=0.5, key=KEY
        )
        assert found.distance == 4
        near, far = found.tree.total / found.tree.visits
        # A change at the far keypoint is one pixel wasted.
        assert near > far and found.tree.visits[0] > found.tree.visits[1]

    def test_colours(self):
        found = feature_game(
            brightness(5.5),
            np.zeros((4, 4, 3)),
            budget=10,
            keypoints=POINTS,
            key=KEY,
        )
        assert found.distance == 2 and found.best.shape == (4, 4, 3)  # two white pixels


class TestKeypoints:
    def test_finds_blobs_with_their_places_and_sizes(self):
        """A Gaussian blob of deviation s has its extreme at s, a little below."""
        rows, columns = np.indices((48, 48))
        image = np.zeros((48, 48))
        for row, column, size in ((12, 30, 3.0), (34, 14, 5.0)):
            away = (rows - row) ** 2 + (columns - column) ** 2
            image += np.exp(-away / 2 / size**2)
        found = sift_keypoints(image, enlarge=1)
        strong = np.argsort(-found.response)[:2]
        order = strong[np.argsort(found.position[strong][:, 0])]
        np.testing.assert_allclose(
            found.position[order], [[12, 30], [34, 14]], atol=1.01
        )
        np.testing.assert_allclose(found.size[order], [3, 5], rtol=0.3)

    def test_moves_with_the_image(self):
        image = np.zeros((12, 12))
        image[3:6, 2:4] = 1.0
        still, moved = (
            sift_keypoints(np.roll(image, shift, (0, 1)), enlarge=4)
            for shift in ((0, 0), (4, 4))
        )
        first, second = (
            found.position[np.argmax(found.response)] for found in (still, moved)
        )
        np.testing.assert_allclose(second - first, 4, atol=1e-9)

    def test_even_image_has_none_and_the_game_says_so(self):
        image = np.full((4, 4), 0.0)
        assert not len(sift_keypoints(image).size)
        found = feature_game(brightness(1.5), image, budget=5, key=KEY)
        assert found.saliency == "uniform" and found.distance == 2
        assert found.tree.visits.shape == (1,)

    def test_edges_are_no_features(self):
        image = np.zeros((32, 32))
        image[:, 16:] = 1.0
        assert not len(sift_keypoints(image, enlarge=1).size)

    @pytest.mark.parametrize(
        ("image", "enlarge", "message"),
        [
            (np.zeros(4), 1, "must be \\(height, width\\)"),
            (np.zeros((0, 4)), 1, "must not be empty"),
            (np.full((4, 4), np.nan), 1, "must be finite"),
            (np.zeros((4, 4)), 0, "`enlarge` must be positive"),
        ],
    )
    def test_bad_input(self, image, enlarge, message):
        with pytest.raises(ValueError, match=message):
            sift_keypoints(image, enlarge=enlarge)


OUTSIDE = Keypoints(np.array([[5.0, 0.0]]), np.ones(1), np.ones(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": np.ones((3, 3))}, "label` must|be classified as 0"),
        ({"image": np.zeros(9)}, "must be \\(height, width\\)"),
        ({"image": np.full((3, 3), np.inf)}, "`image` must be finite"),
        ({"budget": 0}, "`budget` must be positive"),
        ({"sigma": 0.0}, "`sigma` must be positive"),
        ({"player2": "friendly"}, "`player2` must be one of"),
        ({"norm": "l1"}, "`norm` must be one of"),
        ({"selection": "ucb"}, "`selection` must be one of"),
        ({"manipulate": "erase"}, "`manipulate` must be one of"),
        ({"manipulate": -0.1}, "`manipulate` must be positive"),
        ({"manipulate": lambda p: p[:2]}, r"`manipulate\(pixels\)` must have shape"),
        ({"keypoints": OUTSIDE}, "`keypoints` must lie in the image"),
        ({"label": 2}, "`label` must be one of 2 classes"),
        ({"predict": lambda x: x[:, 0, 0]}, "must return scores"),
        ({"predict": lambda x: np.full((len(x), 2), np.nan)}, "must be finite"),
    ],
)
def test_bad_input(arguments, message):
    given = {
        "predict": brightness(4.5),
        "image": np.zeros((3, 3)),
        "keypoints": POINTS,
        "label": 0,
        "budget": 1,
        "key": KEY,
    }
    with pytest.raises(ValueError, match=message):
        feature_game(**(given | arguments))
