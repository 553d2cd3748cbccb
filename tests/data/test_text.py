"""Sentences of installed documentation, and their word numbers."""

import numpy as np
import pytest

from varan.data import documentation_sentences, token_sequences


@pytest.fixture(scope="module")
def sentences():
    return documentation_sentences(100)


def test_sentences_are_prose_and_do_not_name_their_label(sentences):
    texts, labels = sentences
    assert len(set(texts)) == len(texts) == 400
    np.testing.assert_array_equal(labels, np.repeat(np.arange(4), 100))
    for text in texts:
        words = text.split()
        assert 6 <= len(words) <= 40 and text == text.lower()
        assert not {"numpy", "scipy", "sklearn", "matplotlib"} & set(words)


def test_the_order_is_fixed_and_more_sentences_continue_it(sentences):
    more, _ = documentation_sentences(120)
    assert more[:100] == sentences[0][:100]


def test_words_are_numbered_by_frequency_of_the_training_part_only():
    (train, test), words = token_sequences(
        ["b a b", "a b c"], ["c a z", ""], length=4, words=4
    )
    assert words == ["", "?", "b", "a"]
    np.testing.assert_array_equal(train, [[2, 3, 2, 0], [3, 2, 1, 0]])
    np.testing.assert_array_equal(test, [[1, 3, 1, 0], [0, 0, 0, 0]])


def test_long_sentences_are_cut():
    (train,), _ = token_sequences(["x y x y x"], length=2)
    np.testing.assert_array_equal(train, [[2, 3]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: documentation_sentences(0), "`per_package` must be at least 1"),
        (lambda: token_sequences([]), "`train` must hold words"),
        (lambda: token_sequences(["a"], length=0), "`length` must be at least 1"),
        (lambda: token_sequences(["a"], words=2), "`words` must be at least 3"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_more_than_there_is_is_refused(monkeypatch):
    module = __import__("varan.data._text", fromlist=["_text"])
    monkeypatch.setattr(module, "_package_sentences", lambda package: iter(["a b"]))
    with pytest.raises(ValueError, match="must be at most 1, what numpy has"):
        documentation_sentences(2)
    monkeypatch.undo()
    monkeypatch.setattr(module, "_PACKAGES", ("no_such_package",))
    with pytest.raises(ImportError, match="no_such_package is needed"):
        documentation_sentences(2)
